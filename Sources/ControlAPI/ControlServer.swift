import CLinux
package import EventLoop
import Glibc
import Synchronization

/// The control socket: accepts clients, answers their requests, passes events on. It has a thread of its own and waits for
/// nobody: what it answers with is published by others.
package final class ControlServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but `thread` and `path` is touched on the server's thread only.

  private let thread: LoopThread
  private let path: String
  private let methods: ControlMethods
  private let listener: OwnedDescriptor
  private var clients: [Int32: ControlConnection] = [:]
  private var accepting: AcceptLoop?
  private let identify: @Sendable (Int32) -> ControlCaller
  private let history = EventHistory()
  /// The socket's file is the service manager's.
  private let isInherited: Bool
  private let bounds: Bounds
  /// Bytes that are kept for all clients.
  private var held = 0

  /// What clients may take up.
  package struct Bounds: Sendable {
    /// Clients at a time.
    package var clients = 1024
    /// So many of these places are for admins only.
    package var reserved = 64
    /// Clients of one user; admins have no such limit.
    package var clientsPerUser = 128
    /// Bytes that are kept for all clients together. When it is more, the user with the most loses its largest client.
    package var bytes = 64 << 20
    /// Milliseconds after which a client is dropped that takes nothing of what waits for it.
    package var patience: UInt64 = 60_000

    package init() {}
  }

  /// Listens on a Unix socket, replacing a stale one that has no listener.
  ///
  /// - Parameters:
  ///   - inherited: a socket that listens already, of the service manager; nil to make one.
  ///   - identify: says who a connection's peer is; nil to ask the kernel.
  /// - Throws: EADDRINUSE when another daemon listens there.
  package init(
    path: String, mode: UInt32 = 0o660, inherited: Int32? = nil, access: ControlAccess = ControlAccess(),
    bounds: Bounds = Bounds(), identify: (@Sendable (Int32) -> ControlCaller)? = nil, methods: ControlMethods
  ) throws(Errno) {
    self.path = path
    self.bounds = bounds
    self.methods = methods
    self.identify = identify ?? { access.caller(of: $0) }
    isInherited = inherited != nil
    if let inherited {
      _ = fcntl(inherited, F_SETFL, fcntl(inherited, F_GETFL) | O_NONBLOCK)
      listener = OwnedDescriptor(adopting: inherited)
    } else {
      listener = OwnedDescriptor(adopting: try UnixSocket.listen(path, mode: mode))
    }
    thread = try LoopThread(name: "vxd-control")
    thread.loop.enqueue { [self] in
      accepting = try? AcceptLoop(listener.raw, on: thread.loop) { [unowned self] in accept($0) }
      sweepLater()
    }
  }

  private func accept(_ raw: Int32) {
    let caller = identify(raw)
    if let reason = refusal(of: caller) {
      let reply = ControlMethods.reply(
        error: ControlFault(
          code: -32007, message: reason, data: ["field": "message", "remedy": "close connections that are not needed"]),
        id: .null)
      let line = Array((JSONText.text(reply) + "\n").utf8)
      _ = send(raw, line, line.count, Int32(MSG_NOSIGNAL))
      close(raw)
      return
    }
    let connection = ControlConnection(
      OwnedDescriptor(adopting: raw), methods: methods, caller: caller, history: history)
    let token = try? thread.loop.add(
      raw, events: EPOLLIN.rawValue, source: ActionSource { [unowned self] events in serve(raw, events) })
    guard let token else { return }
    connection.token = token
    clients[raw] = connection
  }

  private func serve(_ raw: Int32, _ events: UInt32) {
    guard let connection = clients[raw] else { return }
    if events & EPOLLIN.rawValue != 0 { connection.receive() }
    // With EPOLLIN there is still something to read; the end shows there.
    if events & (EPOLLERR.rawValue | EPOLLHUP.rawValue) != 0 && events & EPOLLIN.rawValue == 0 {
      connection.hungUp()
    }
    settle(connection)
  }

  /// Why a connection is refused; nil if there is room.
  private func refusal(of caller: ControlCaller) -> String? {
    guard caller.role < .admin else {
      return clients.count < bounds.clients ? nil : "vxd has \(bounds.clients) connections, which is the limit"
    }
    if clients.count >= bounds.clients - bounds.reserved {
      return "vxd has \(clients.count) connections, and the last \(bounds.reserved) are for role admin"
    }
    let own = clients.values.count { $0.caller.user == caller.user }
    return own < bounds.clientsPerUser
      ? nil : "user \(caller.user) has \(own) connections, which is the limit for a user"
  }

  /// Sends what can be sent, and forgets a client that is gone or too slow.
  private func settle(_ connection: ControlConnection) {
    connection.flush()
    count(connection)
    while held > bounds.bytes, let largest { drop(largest) }
    guard !connection.isOver else { return drop(connection) }
    guard clients[connection.raw] === connection, let token = connection.token else { return }
    try? thread.loop.modify(token, events: connection.interest)
  }

  private func drop(_ connection: ControlConnection) {
    guard clients[connection.raw] === connection else { return }
    if let token = connection.token { thread.loop.remove(token) }
    held -= connection.counted
    connection.counted = 0
    clients[connection.raw] = nil
  }

  private func count(_ connection: ControlConnection) {
    guard clients[connection.raw] === connection else { return }
    held += connection.held - connection.counted
    connection.counted = connection.held
  }

  /// The largest client of the user whose clients together are the largest.
  private var largest: ControlConnection? {
    var users: [UInt32: Int] = [:]
    for client in clients.values { users[client.caller.user, default: 0] += client.counted }
    let user = users.max { $0.value < $1.value }?.key
    return clients.values.filter { $0.caller.user == user }.max { $0.counted < $1.counted }
  }

  /// Drops clients that have taken nothing for too long, from time to time.
  private func sweepLater() {
    thread.loop.schedule(afterMilliseconds: max(1, bounds.patience / 4)) { [weak self] in
      guard let self else { return }
      let now = EventLoop.now()
      for client in Array(clients.values)
      where client.isWaiting && now &- client.lastProgress > bounds.patience * 1_000_000 { drop(client) }
      sweepLater()
    }
  }

  /// Passes an event on to the clients that subscribed. May be called from any thread.
  package func publish(_ event: JSONValue) {
    thread.loop.enqueue { [self] in
      let (numbered, sequence) = history.add(event)
      for connection in Array(clients.values) where connection.isSubscribed {
        connection.send(event: numbered, sequence)
        settle(connection)
      }
    }
  }

  /// Closes the socket and ends the thread.
  package func stop() {
    thread.perform { [self] in
      accepting?.close()
      for connection in clients.values {
        if let token = connection.token { thread.loop.remove(token) }
      }
      clients = [:]
      if !isInherited { unlink(path) }
    }
    thread.stopAndJoin()
  }
}
