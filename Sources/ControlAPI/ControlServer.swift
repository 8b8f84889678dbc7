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
  private var token: EventLoop.Token?
  private static let clientLimit = 1024

  /// Listens on a Unix socket, replacing one that nobody listens on any more.
  ///
  /// - Throws: EADDRINUSE when another daemon listens there.
  package init(path: String, mode: UInt32 = 0o660, methods: ControlMethods) throws(Errno) {
    self.path = path
    self.methods = methods
    listener = OwnedDescriptor(adopting: try UnixSocket.listen(path, mode: mode))
    thread = try LoopThread(name: "vxd-control")
    thread.loop.enqueue { [self] in
      listen()
    }
  }

  private func listen() {
    token = try? thread.loop.onReadable(listener.raw) { [unowned self] in accept() }
  }

  /// Leaves waiting clients waiting for a second: without a free descriptor the listener would stay readable and the thread spin.
  private func pause() {
    if let token { thread.loop.remove(token) }
    token = nil
    thread.loop.schedule(afterMilliseconds: 1000) { [self] in listen() }
  }

  private func accept() {
    while true {
      let raw = clinux_accept(listener.raw)
      guard raw >= 0 else {
        if errno == EMFILE || errno == ENFILE { pause() }
        return
      }
      guard clients.count < Self.clientLimit else {
        close(raw)
        continue
      }
      let connection = ControlConnection(OwnedDescriptor(adopting: raw), methods: methods)
      do throws(Errno) {
        let token = try thread.loop.add(
          raw, events: EPOLLIN.rawValue,
          source: ActionSource { [unowned self] events in serve(raw, events) })
        connection.token = token
        clients[raw] = connection
      } catch {
        continue
      }
    }
  }

  private func serve(_ raw: Int32, _ events: UInt32) {
    guard let connection = clients[raw] else { return }
    if events & EPOLLIN.rawValue != 0 { connection.receive() }
    if events & (EPOLLERR.rawValue | EPOLLHUP.rawValue) != 0 && events & EPOLLIN.rawValue == 0 {
      connection.isOver = true
    }
    settle(connection)
  }

  /// Sends what can be sent, and forgets a client that is gone or too slow.
  private func settle(_ connection: ControlConnection) {
    connection.flush()
    guard !connection.isOver else {
      if let token = connection.token { thread.loop.remove(token) }
      clients[connection.raw] = nil
      return
    }
    guard let token = connection.token else { return }
    try? thread.loop.modify(token, events: connection.interest)
  }

  /// Passes an event on to the clients that subscribed. May be called from any thread.
  package func publish(_ event: JSONValue) {
    thread.loop.enqueue { [self] in
      for connection in Array(clients.values) where connection.isSubscribed {
        connection.send(["jsonrpc": "2.0", "method": "event", "params": event])
        settle(connection)
      }
    }
  }

  /// Closes the socket and ends the thread.
  package func stop() {
    thread.perform { [self] in
      if let token { thread.loop.remove(token) }
      for connection in clients.values {
        if let token = connection.token { thread.loop.remove(token) }
      }
      clients = [:]
      unlink(path)
    }
    thread.stopAndJoin()
  }
}

/// One client. Confined to the server's thread.
final class ControlConnection {
  private let descriptor: OwnedDescriptor
  private let methods: ControlMethods
  private var reader = FrameReader()
  private var outgoing: [UInt8] = []
  private var sent = 0
  var token: EventLoop.Token?
  private(set) var isSubscribed = false
  /// The client is gone, or is to be dropped.
  var isOver = false
  /// Bytes that may wait for a client; one that lets more pile up is dropped.
  private static let outgoingLimit = 8 << 20
  /// Above this no further request is read until some of it is taken.
  private static let outgoingPause = 1 << 20

  init(_ descriptor: consuming OwnedDescriptor, methods: ControlMethods) {
    self.descriptor = descriptor
    self.methods = methods
  }

  var raw: Int32 { descriptor.raw }

  private var waiting: Int { outgoing.count - sent }

  var interest: UInt32 {
    (waiting > 0 ? EPOLLOUT.rawValue : 0) | (waiting < Self.outgoingPause ? EPOLLIN.rawValue : 0)
  }

  func receive() {
    var buffer = [UInt8](repeating: 0, count: 65536)
    let count = read(raw, &buffer, buffer.count)
    if count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR) { isOver = true }
    guard count > 0 else { return }
    for item in reader.append(buffer[..<count]) {
      switch item {
      case .message(let message):
        if let answer = methods.answer(message, subscribe: { _ in isSubscribed = true }) { send(answer) }
      case .tooLong:
        send(
          ControlMethods.reply(
            error: .invalidRequest(
              "the message is longer than \(FrameReader.limit) bytes", field: "message",
              remedy: "send messages of at most 1 MiB"), id: .null))
      }
    }
  }

  func send(_ message: JSONValue) {
    outgoing.append(contentsOf: JSONText.text(message).utf8)
    outgoing.append(0x0a)
    if waiting > Self.outgoingLimit { isOver = true }
  }

  func flush() {
    while waiting > 0 && !isOver {
      let count = outgoing.withUnsafeBytes { bytes in
        Glibc.send(raw, bytes.baseAddress.map { $0 + sent }, waiting, Int32(MSG_NOSIGNAL))
      }
      if count < 0 {
        if errno == EINTR { continue }
        if errno != EAGAIN { isOver = true }
        break
      }
      sent += count
    }
    if waiting == 0 {
      outgoing.removeAll(keepingCapacity: outgoing.count < 65536)
      sent = 0
    }
  }
}
