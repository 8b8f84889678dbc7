import CLinux
package import EventLoop
import Glibc
import Transport
import Xen

/// Lets a vxd in another process use the simulated Xen of this one. When that process dies, its guests see what Xen would show them:
/// the ioreq server stays, nobody answers.
package final class SimulatorServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but the immutable parts is touched on the server's thread only.

  package let path: String
  private let hypervisor: SimulatedHypervisor
  private let listener: OwnedDescriptor
  private let thread: LoopThread
  private var connections: [Int32: Connection] = [:]

  private final class Connection {
    let descriptor: OwnedDescriptor
    var domain: SimulatedDomain?
    var handle: SimulatedGuestHandle?
    var tokens: [EventLoop.Token] = []
    var mappings = 0

    init(_ raw: Int32) { descriptor = OwnedDescriptor(adopting: raw) }
  }

  package init(hypervisor: SimulatedHypervisor, path: String) throws(Errno) {
    self.hypervisor = hypervisor
    self.path = path
    let raw = RemotePacket.makeSocket()
    guard raw >= 0 else { throw Errno.last }
    listener = OwnedDescriptor(adopting: raw)
    try UnixSocket.withAddress(path) { bind(raw, $0, $1) }
    guard listen(raw, 64) == 0 else { throw Errno.last }
    thread = try LoopThread(name: "sim-xen")
    thread.loop.enqueue { [self] in
      _ = try? thread.loop.onReadable(listener.raw) { [unowned self] in accept() }
    }
  }

  package func stop() { thread.stopAndJoin() }

  private func accept() {
    let raw = clinux_accept(listener.raw)
    guard raw >= 0 else { return }
    let connection = Connection(raw)
    connections[raw] = connection
    if let token = try? thread.loop.onReadable(raw, { [unowned self] in serve(raw) }) {
      connection.tokens.append(token)
    }
  }

  private func serve(_ raw: Int32) {
    guard let connection = connections[raw] else { return }
    var isOver = false
    while let (packet, _) = RemotePacket.receive(raw, wait: false, isOver: &isOver) { perform(packet, connection) }
    if isOver { end(connection) }
  }

  private func end(_ connection: Connection) {
    for token in connection.tokens { thread.loop.remove(token) }
    connection.handle?.abandon()
    connection.domain?.state.withLock { $0.usage.mappings -= connection.mappings }
    connections[connection.descriptor.raw] = nil
  }

  private func reply(_ connection: Connection, _ value: UInt64 = 0, errno: Int32 = 0, _ payload: [UInt8] = []) {
    var packet = RemotePacket(.reply, first: value)
    packet.errno = Int64(errno)
    _ = packet.send(connection.descriptor.raw, payload)
  }

  private func perform(_ packet: RemotePacket, _ connection: Connection) {
    do throws(XenError) {
      try call(packet, connection)
    } catch {
      reply(connection, errno: error.errno.code)
    }
  }

  private func call(_ packet: RemotePacket, _ connection: Connection) throws(XenError) {
    guard let kind = packet.kind else { return }
    if kind == .open {
      guard let domain = hypervisor.domain(UInt16(truncatingIfNeeded: packet.first)) else {
        return reply(connection, errno: ESRCH)
      }
      let handle = try SimulatedGuestHandle(domain)
      connection.domain = domain
      connection.handle = handle
      let token = try? thread.loop.onReadable(handle.eventDescriptor) {
        while let port = handle.nextEvent() {
          _ = RemotePacket(.event, first: UInt64(port)).send(connection.descriptor.raw)
        }
      }
      if let token { connection.tokens.append(token) }
      return reply(connection, UInt64(domain.memory.pageCount), Array(domain.memory.path.utf8))
    }
    guard let handle = connection.handle, let domain = connection.domain else {
      return reply(connection, errno: EINVAL)
    }
    let server = UInt16(truncatingIfNeeded: packet.server)
    let port = UInt32(truncatingIfNeeded: packet.first)
    switch kind {
    case .create: reply(connection, UInt64(try handle.createIOReqServer()))
    case .destroy:
      try handle.destroyIOReqServer(server)
      reply(connection)
    case .enable:
      try handle.setIOReqServer(server, enabled: packet.first == 1)
      reply(connection)
    case .claimMemory, .claimPorts, .claimFunction:
      try handle.claim(try Self.range(packet), for: server)
      reply(connection)
    case .releaseMemory, .releasePorts, .releaseFunction:
      try handle.release(try Self.range(packet), from: server)
      reply(connection)
    case .mapPage:
      _ = try handle.mapIOReqPage(server)
      reply(connection, UInt64(server))
    case .bind: reply(connection, UInt64(try handle.bind(remotePort: port)))
    case .errors:
      guard domain.isRunning else { return reply(connection, errno: ESRCH) }
      reply(connection, domain.memory.errors(first: packet.first, count: Int(min(packet.second, 32768))))
    case .unmapPage: handle.unmapIOReqPage()
    case .unbind: handle.unbind(port)
    case .notify: handle.notify(port)
    case .unmask: handle.unmask(port)
    case .interrupt: domain.setLevel(port, packet.second == 1)
    case .message:
      domain.deliver(MSIMessage(address: packet.first, data: UInt32(truncatingIfNeeded: packet.second)))
    case .mapped, .unmapped:
      let change = kind == .mapped ? 1 : -1
      connection.mappings += change
      domain.state.withLock { $0.usage.mappings += change }
    case .open, .reply, .event: break
    }
  }

  private static func range(_ packet: RemotePacket) throws(XenError) -> AccessRange {
    switch packet.kind {
    case .claimFunction, .releaseFunction:
      return .configuration(
        PCIAddress(
          device: UInt8(truncatingIfNeeded: packet.first >> 3), function: UInt8(truncatingIfNeeded: packet.first)))
    case let kind:
      guard packet.first <= packet.second else { throw XenError("io_range", Errno(EINVAL)) }
      let range = packet.first...packet.second
      return kind == .claimMemory || kind == .releaseMemory ? .memory(range) : .ports(range)
    }
  }

  private func reply(_ connection: Connection, _ payload: [UInt8]) { reply(connection, 0, errno: 0, payload) }
  private func reply(_ connection: Connection, _ value: UInt64, _ payload: [UInt8]) {
    reply(connection, value, errno: 0, payload)
  }
}
