import CLinux
import ControlAPI
package import EventLoop
import Glibc
import Synchronization

/// A xenstored in this process: the real wire protocol on a Unix socket, for the real libxenstore and the xenstore-* tools.
///
/// Every client is dom0. It has a thread of its own, which alone touches the state.
package final class XenstoreServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but `path` and `thread` is touched on the server's thread only.

  package let path: String
  private let thread: LoopThread
  private let listener: OwnedDescriptor
  private var tree = XenstoreTree()
  /// Changes since the oldest transaction that is open began, in their order: a transaction conflicts with those of nodes that it looked at.
  private var history: [Change] = []
  private var clients: [Int32: Client] = [:]
  private var transactions: [UInt32: Transaction] = [:]
  private var nextTransaction: UInt32 = 1
  private var isDown = false
  private var conflicts = 0
  /// What somebody writes right after the next read of a node.
  private var interjection: (path: String, values: [String: String])?

  private struct Transaction {
    var tree: XenstoreTree
    /// Changes that had happened by its start.
    var start: Int
    var seen: Set<String> = []
    var touched: [Change] = []
    /// What it does to the tree, to be done again to that of its end.
    var steps: [(inout XenstoreTree) -> Void] = []

    /// Whether a change is of a node that was looked at, of what is below it, or of what is above it and gone.
    func conflicts(with change: Change) -> Bool {
      let parent = change.path.split(separator: "/").dropLast().reduce(into: "") { $0 += "/" + $1 }
      return seen.contains(change.path) || seen.contains(parent)
        || change.isRemoval && seen.contains { $0.hasPrefix(change.path + "/") }
    }
  }

  private struct Change {
    var path: String
    var isRemoval = false
  }

  private struct Watch {
    var path: String
    var token: String
    /// The path as it was given: events are reported in the same form.
    var isRelative: Bool
  }

  private final class Client {
    let descriptor: OwnedDescriptor
    var token: EventLoop.Token?
    var incoming: [UInt8] = []
    var watches: [Watch] = []

    init(_ descriptor: consuming OwnedDescriptor) { self.descriptor = descriptor }
  }

  private static let ownDomain = "/local/domain/0"

  package init(path: String) throws(Errno) {
    self.path = path
    listener = OwnedDescriptor(adopting: try UnixSocket.listen(path, mode: 0o600))
    thread = try LoopThread(name: "sim-xenstored")
    tree.modify("/local/domain/0/domid") { $0.value = Array("0".utf8) }
    tree.modify("/local/domain/0/name") { $0.value = Array("Domain-0".utf8) }
    tree.modify("/tool/xenstored") { _ in }
    thread.loop.enqueue { [self] in
      _ = try? thread.loop.onReadable(listener.raw) { [unowned self] in accept() }
    }
  }

  /// Ends the server; clients find their connection closed.
  package func stop() {
    thread.perform { [self] in clients = [:] }
    thread.stopAndJoin()
    unlink(path)
  }

  /// As after a crash: every connection breaks, and none is taken until the next call with `false`. The tree stays.
  package func setDown(_ isDown: Bool) {
    thread.perform { [self] in
      self.isDown = isDown
      if isDown { for raw in clients.keys { drop(raw) } }
    }
  }

  /// Transactions of clients end with a conflict, so many times.
  package func failTransactions(_ count: Int) {
    thread.perform { [self] in conflicts = count }
  }

  /// Somebody else writes nodes between the next read of one, in a transaction or not, and whatever its reader does then.
  package func afterNextRead(of path: String, write values: [String: String]) {
    thread.perform { [self] in interjection = (path, values) }
  }

  /// Conflicts of `failTransactions` that nobody has met yet.
  package var conflictsLeft: Int {
    let count = Mutex(0)
    thread.perform { [self] in count.withLock { $0 = conflicts } }
    return count.withLock { $0 }
  }

  /// Watches that clients have set.
  package var watchCount: Int {
    let count = Mutex(0)
    thread.perform { [self] in count.withLock { $0 = clients.values.reduce(0) { $0 + $1.watches.count } } }
    return count.withLock { $0 }
  }

  /// Fires the watches on a special path such as @releaseDomain.
  package func fire(special path: String) {
    thread.loop.enqueue { [self] in notify([Change(path: path)]) }
  }

  // MARK: Connections

  private func accept() {
    // Closed on exec: a program that a test starts would keep the connection alive beyond its end.
    let raw = clinux_accept(listener.raw)
    guard raw >= 0 else { return }
    // Answers are written as a whole.
    _ = fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) & ~O_NONBLOCK)
    guard !isDown else {
      close(raw)
      return
    }
    let client = Client(OwnedDescriptor(adopting: raw))
    client.token = try? thread.loop.onReadable(raw) { [unowned self] in receive(raw) }
    clients[raw] = client
  }

  private func drop(_ raw: Int32) {
    if let token = clients[raw]?.token { thread.loop.remove(token) }
    clients[raw] = nil
  }

  private func receive(_ raw: Int32) {
    guard let client = clients[raw] else { return }
    var buffer = [UInt8](repeating: 0, count: 8192)
    let count = Glibc.read(raw, &buffer, buffer.count)
    guard count > 0 else { return drop(raw) }
    client.incoming += buffer[..<count]
    do throws(ProtocolFault) {
      while let message = try XenstoreMessage.take(from: &client.incoming) { answer(message, client) }
    } catch {
      drop(raw)
    }
  }

  private func send(_ message: XenstoreMessage, to client: Client) {
    let bytes = message.bytes
    var sent = 0
    while sent < bytes.count {
      let count = bytes.withUnsafeBytes {
        Glibc.send(client.descriptor.raw, $0.baseAddress.map { $0 + sent }, bytes.count - sent, Int32(MSG_NOSIGNAL))
      }
      if count <= 0 && errno != EINTR { return }
      sent += max(count, 0)
    }
  }

  // MARK: Requests

  private func answer(_ message: XenstoreMessage, _ client: Client) {
    var reply = message
    var changes: [Change] = []
    do throws(StoreFault) {
      reply.payload = try perform(message, client, &changes)
    } catch {
      reply.kind = XenstoreMessage.Kind.error.rawValue
      reply.payload = Array(error.name.utf8) + [0]
    }
    send(reply, to: client)
    // A watch's first event follows the answer.
    if message.kind == XenstoreMessage.Kind.watch.rawValue, reply.kind == message.kind, let watch = client.watches.last
    {
      sendEvent(watch, path: watch.path, to: client)
    }
    notify(changes)
    guard let interjection, message.kind == XenstoreMessage.Kind.read.rawValue,
      (try? Self.absolute(message.texts.first ?? "")) == interjection.path
    else { return }
    self.interjection = nil
    for (path, value) in interjection.values { tree.modify(path) { $0.value = Array(value.utf8) } }
    history += interjection.values.keys.map { Change(path: $0) }
    notify(interjection.values.keys.map { Change(path: $0) })
  }

  /// An error by its errno's name, as the protocol has it.
  private struct StoreFault: Error {
    let name: String
  }

  private static func absolute(_ path: String) throws(StoreFault) -> String {
    guard !path.isEmpty, path.utf8.count < 3072 else { throw StoreFault(name: "EINVAL") }
    if path.hasPrefix("@") || path == "/" { return path }
    guard !path.hasSuffix("/"), !path.contains("//") else { throw StoreFault(name: "EINVAL") }
    return path.hasPrefix("/") ? path : ownDomain + "/" + path
  }

  private func perform(
    _ message: XenstoreMessage, _ client: Client, _ changes: inout [Change]
  ) throws(StoreFault) -> [UInt8] {
    guard let kind = XenstoreMessage.Kind(rawValue: message.kind) else { throw StoreFault(name: "ENOSYS") }
    let texts = message.texts
    let first = texts.first ?? ""
    let ok = Array("OK".utf8) + [0]
    switch kind {
    case .read: return try node(first, message).value
    case .directory:
      return try node(first, message).children.keys.sorted().flatMap { Array($0.utf8) + [0] }
    case .directoryPart: throw StoreFault(name: "ENOSYS")
    case .getPermissions: return try node(first, message).permissions.flatMap { Array($0.utf8) + [0] }
    case .write:
      guard let end = message.payload.firstIndex(of: 0) else { throw StoreFault(name: "EINVAL") }
      let value = Array(message.payload[(end + 1)...])
      try change(first, message, &changes) { $0.value = value }
      return ok
    case .makeDirectory:
      if (try? node(first, message)) == nil { try change(first, message, &changes) { _ in } }
      return ok
    case .setPermissions:
      try change(first, message, &changes) { $0.permissions = texts.dropFirst().filter { !$0.isEmpty } }
      return ok
    case .remove:
      try remove(first, message, &changes)
      return ok
    case .watch:
      guard texts.count >= 2 else { throw StoreFault(name: "EINVAL") }
      let path = try Self.absolute(first)
      guard !client.watches.contains(where: { $0.path == path && $0.token == texts[1] }) else {
        throw StoreFault(name: "EEXIST")
      }
      client.watches.append(
        Watch(path: path, token: texts[1], isRelative: !first.hasPrefix("/") && !first.hasPrefix("@")))
      return ok
    case .unwatch:
      let path = try Self.absolute(first)
      guard
        let index = client.watches.firstIndex(where: { $0.path == path && $0.token == texts.dropFirst().first ?? "" })
      else { throw StoreFault(name: "ENOENT") }
      client.watches.remove(at: index)
      return ok
    case .resetWatches:
      client.watches = []
      return ok
    case .transactionStart:
      let identifier = nextTransaction
      nextTransaction &+= 1
      if transactions.isEmpty { history = [] }
      transactions[identifier] = Transaction(tree: tree, start: history.count)
      return Array("\(identifier)".utf8) + [0]
    case .transactionEnd:
      guard let transaction = transactions.removeValue(forKey: message.transaction) else {
        throw StoreFault(name: "ENOENT")
      }
      guard first == "T", !transaction.touched.isEmpty else { return ok }
      guard conflicts == 0 else {
        conflicts -= 1
        throw StoreFault(name: "EAGAIN")
      }
      guard !history[transaction.start...].contains(where: { transaction.conflicts(with: $0) }) else {
        throw StoreFault(name: "EAGAIN")
      }
      for step in transaction.steps { step(&tree) }
      history += transaction.touched
      changes = transaction.touched
      return ok
    case .getDomainPath: return Array("/local/domain/\(first)".utf8) + [0]
    case .isDomainIntroduced:
      return Array(tree.node("/local/domain/\(first)") == nil ? "F".utf8 : "T".utf8) + [0]
    case .control, .watchEvent, .error: throw StoreFault(name: "ENOSYS")
    }
  }

  private func node(_ path: String, _ message: XenstoreMessage) throws(StoreFault) -> XenstoreTree.Node {
    let path = try Self.absolute(path)
    let source = try message.transaction == 0 ? tree : open(message.transaction).tree
    transactions[message.transaction]?.seen.insert(path)
    guard let node = source.node(path) else { throw StoreFault(name: "ENOENT") }
    return node
  }

  private func open(_ identifier: UInt32) throws(StoreFault) -> Transaction {
    guard let transaction = transactions[identifier] else { throw StoreFault(name: "ENOENT") }
    return transaction
  }

  private func change(
    _ path: String, _ message: XenstoreMessage, _ changes: inout [Change],
    _ body: @escaping (inout XenstoreTree.Node) -> Void
  ) throws(StoreFault) {
    let path = try Self.absolute(path)
    if message.transaction == 0 {
      tree.modify(path, body)
      history.append(Change(path: path))
      changes.append(Change(path: path))
    } else {
      _ = try open(message.transaction)
      transactions[message.transaction]?.tree.modify(path, body)
      transactions[message.transaction]?.seen.insert(path)
      transactions[message.transaction]?.steps.append { $0.modify(path, body) }
      transactions[message.transaction]?.touched.append(Change(path: path))
    }
  }

  private func remove(_ path: String, _ message: XenstoreMessage, _ changes: inout [Change]) throws(StoreFault) {
    let path = try Self.absolute(path)
    if message.transaction == 0 {
      guard tree.remove(path) else { throw StoreFault(name: "ENOENT") }
      history.append(Change(path: path, isRemoval: true))
      changes.append(Change(path: path, isRemoval: true))
    } else {
      _ = try open(message.transaction)
      guard transactions[message.transaction]?.tree.remove(path) == true else { throw StoreFault(name: "ENOENT") }
      transactions[message.transaction]?.seen.insert(path)
      transactions[message.transaction]?.steps.append { _ = $0.remove(path) }
      transactions[message.transaction]?.touched.append(Change(path: path, isRemoval: true))
    }
  }

  // MARK: Watches

  private func notify(_ changes: [Change]) {
    for change in changes {
      for client in clients.values {
        for watch in client.watches {
          if change.path == watch.path || change.path.hasPrefix(watch.path + "/") {
            sendEvent(watch, path: change.path, to: client)
          } else if change.isRemoval && watch.path.hasPrefix(change.path + "/") {
            // What was watched went with a node above it.
            sendEvent(watch, path: watch.path, to: client)
          }
        }
      }
    }
  }

  private func sendEvent(_ watch: Watch, path: String, to client: Client) {
    let shown = watch.isRelative ? String(path.dropFirst(Self.ownDomain.count + 1)) : path
    send(
      XenstoreMessage(
        kind: XenstoreMessage.Kind.watchEvent.rawValue, request: 0, transaction: 0,
        payload: Array(shown.utf8) + [0] + Array(watch.token.utf8) + [0]), to: client)
  }
}
