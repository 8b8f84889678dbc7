package import EventLoop
import Glibc
package import Logging
import Synchronization
import Xen

/// The control socket for dom0, in a driver domain that it shares no network with: 'vxctl --domain' opens a stream through Xenstore, and this relays
/// it to the socket. On a thread of its own.
///
///     /local/domain/N/vxd/control/ID/      written by dom0, one for each client. The domain itself cannot write below vxd.
///     /local/domain/N/data/vxd-control/ID/ written here
///
/// Each has what `StoreStream` describes. dom0 removes its directory when it is done. Its clients are root's here: dom0 is root of the whole host.
package final class ToolstackRelay: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but the immutable parts is touched on the thread only.

  /// Clients at a time.
  package static let limit = 16
  /// Milliseconds after which a client is given up that has not said that it is there.
  private let patience: UInt64
  static let requests = "vxd/control"
  static let answers = "data/vxd-control"

  private let thread: LoopThread
  private let xenstoreSocket: String?
  private let control: String
  private let log: Logger
  private var xenstore: XenStore?
  private var token: EventLoop.Token?
  private var clients: [String: Client] = [:]

  private final class Client {
    /// nil once the stream is over: what remains waits for dom0 to remove its directory.
    var stream: StoreStream?
    /// When dom0 last wrote something: monotonic nanoseconds.
    var heard = EventLoop.now()
  }

  /// - Parameters:
  ///   - xenstoreSocket: of a simulated xenstored; nil for the real one.
  ///   - control: the path of the control socket.
  ///   - patience: milliseconds after which a client is given up that has not said that it is there; 'vxctl' says so every 20 s.
  package init(
    xenstoreSocket: String?, control: String, log: Logger, patience: UInt64 = 90_000
  ) throws(Errno) {
    self.patience = patience
    self.xenstoreSocket = xenstoreSocket
    self.control = control
    self.log = log
    thread = try LoopThread(name: "vxd-toolstack")
    thread.loop.enqueue { [self] in
      connect()
      lookLater()
    }
  }

  /// Ends every stream and the thread.
  package func stop() {
    thread.perform { [self] in
      for (identifier, client) in clients where client.stream != nil { finish(identifier, "vxd is stopping") }
      disconnect()
    }
    thread.stopAndJoin()
  }

  private func connect() {
    do throws(XenError) {
      let connection = try XenStore(socketPath: xenstoreSocket)
      // dom0 has the socket itself.
      guard connection.read("domid") ?? "0" != "0" else { return }
      xenstore = connection
      // What an earlier vxd left: its clients know by `end` that it is gone; a client that it never answered is ours.
      for identifier in connection.list(Self.answers) ?? [] {
        if connection.read("\(Self.requests)/\(identifier)/out") == nil {
          try connection.remove("\(Self.answers)/\(identifier)")
        } else {
          clients[identifier] = Client()
          try connection.write("\(Self.answers)/\(identifier)/end", "vxd was restarted")
        }
      }
      try connection.watch(Self.requests, token: Self.requests)
    } catch {
      log.error("vxd cannot be controlled from dom0: \(error)")
      return disconnect()
    }
    token = xenstore.flatMap { connection in
      try? thread.loop.onReadable(connection.eventDescriptor) { [unowned self] in changed() }
    }
  }

  private func disconnect() {
    if let token { thread.loop.remove(token) }
    (token, clients, xenstore) = (nil, [:], nil)
  }

  /// libxenstore does not tell of a connection that broke, nor dom0 of a client that was killed.
  private func lookLater() {
    thread.loop.schedule(afterMilliseconds: min(5000, patience)) { [weak self] in
      guard let self else { return }
      if let xenstore, !xenstore.isAlive {
        disconnect()
        connect()
      }
      let now = EventLoop.now()
      for (identifier, client) in clients
      where client.stream != nil && now &- client.heard > patience * 1_000_000 {
        finish(identifier, "the client was silent for \(patience / 1000) s")
      }
      lookLater()
    }
  }

  private func changed() {
    var named: Set<String> = []
    while let event = xenstore?.nextEvent() {
      let parts = event.path.split(separator: "/", omittingEmptySubsequences: false)
      if parts.count > 2 { named.insert(String(parts[2])) } else { named.formUnion(everything) }
    }
    for identifier in named { look(at: identifier) }
  }

  private var everything: Set<String> {
    Set(xenstore?.list(Self.requests) ?? []).union(clients.keys)
  }

  /// Something of a client's directory has changed, or it is gone.
  private func look(at identifier: String) {
    guard let xenstore else { return }
    guard xenstore.read("\(Self.requests)/\(identifier)/out") != nil else {
      // dom0 writes its first piece before anything else, and removes all of it at the end.
      guard clients.removeValue(forKey: identifier) != nil else { return }
      try? xenstore.remove("\(Self.answers)/\(identifier)")
      return
    }
    if clients[identifier] == nil { open(identifier, xenstore) }
    guard let client = clients[identifier] else { return }
    client.heard = EventLoop.now()
    client.stream?.step()
  }

  private func open(_ identifier: String, _ xenstore: XenStore) {
    let client = Client()
    clients[identifier] = client
    guard clients.values.count(where: { $0.stream != nil }) < Self.limit else {
      return refuse(identifier, "vxd has \(Self.limit) clients of dom0, which is the limit")
    }
    let socket: Int32
    do throws(Errno) { socket = try UnixSocket.connect(control) } catch {
      return refuse(identifier, "\(control): \(error)")
    }
    client.stream = StoreStream(
      xenstore, own: "\(Self.answers)/\(identifier)", other: "\(Self.requests)/\(identifier)",
      socket: OwnedDescriptor(adopting: socket), loop: thread.loop,
      onEnd: { [unowned self] in
        // Not from within the stream's own step.
        thread.loop.enqueue { [self] in finish(identifier, clients[identifier]?.stream?.end ?? "closed") }
      })
  }

  private func refuse(_ identifier: String, _ reason: String) {
    try? xenstore?.write("\(Self.answers)/\(identifier)/end", reason)
  }

  private func finish(_ identifier: String, _ reason: String) {
    guard let client = clients[identifier], let stream = client.stream else { return }
    stream.close(reason)
    client.stream = nil
  }
}
