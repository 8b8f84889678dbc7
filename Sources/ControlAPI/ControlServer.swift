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
  private let access: ControlAccess
  private let history = EventHistory()
  /// The socket's file is the service manager's.
  private let isInherited: Bool
  private static let clientLimit = 1024

  /// Listens on a Unix socket, replacing one that nobody listens on any more.
  ///
  /// - Parameter inherited: a socket that listens already, of the service manager; nil to make one.
  ///
  /// - Throws: EADDRINUSE when another daemon listens there.
  package init(
    path: String, mode: UInt32 = 0o660, inherited: Int32? = nil, access: ControlAccess = ControlAccess(),
    methods: ControlMethods
  ) throws(Errno) {
    self.path = path
    self.methods = methods
    self.access = access
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
    }
  }

  private func accept(_ raw: Int32) {
    guard clients.count < Self.clientLimit else {
      close(raw)
      return
    }
    let connection = ControlConnection(
      OwnedDescriptor(adopting: raw), methods: methods, role: access.role(of: raw), history: history)
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
