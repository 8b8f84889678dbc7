import CLinux
import EventLoop
import Glibc
import Synchronization
package import Xen

/// A simulated Xen in another process (`SimulatorServer`).
package final class RemoteHypervisor: Hypervisor {
  private let path: String

  package init(path: String) { self.path = path }

  package var summary: String { "simulated Xen of another process" }

  package func openGrants(_ domain: DomainID) throws(XenError) -> any GrantHandle {
    throw XenError("grants of a simulated Xen in another process", Errno(38 /* ENOSYS */))
  }

  /// The other process has no word for it.
  package func hasXenDrivers(_ domain: DomainID) -> Bool? { nil }

  package func open(_ domain: DomainID) throws(XenError) -> any GuestHandle {
    do throws(Errno) {
      return try RemoteGuestHandle(path, domain)
    } catch {
      throw XenError("open", error)
    }
  }
}

/// A guest of a simulated Xen in another process. Its memory and ioreq pages are shared; everything else is a packet.
final class RemoteGuestHandle: GuestHandle, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: packets are atomic; replies and events are taken under a lock; `page` belongs to the ioreq
  // thread.

  private let socket: OwnedDescriptor
  private let memory: OwnedDescriptor
  private let pageCount: Int
  /// Events that came while a reply was waited for.
  private let pending = Mutex<[UInt32]>([])
  private let more: EventDescriptor
  /// Readable when the socket is, or when events are pending.
  private let readiness: OwnedDescriptor
  private var page: UnsafeMutableRawPointer?

  init(_ path: String, _ domain: DomainID) throws(Errno) {
    let raw = RemotePacket.makeSocket()
    guard raw >= 0 else { throw Errno.last }
    socket = OwnedDescriptor(adopting: raw)
    try UnixSocket.withAddress(path) { connect(raw, $0, $1) }
    guard RemotePacket(.open, first: UInt64(domain)).send(raw) else { throw Errno(EPIPE) }
    var isOver = false
    guard let (reply, payload) = RemotePacket.receive(raw, wait: true, isOver: &isOver) else { throw Errno(EPIPE) }
    guard reply.errno == 0 else { throw Errno(Int32(reply.errno)) }
    pageCount = Int(reply.first)
    memory = OwnedDescriptor(adopting: Glibc.open(String(decoding: payload, as: UTF8.self), O_RDWR | O_CLOEXEC))
    guard memory.raw >= 0 else { throw Errno.last }
    more = try EventDescriptor()
    readiness = OwnedDescriptor(adopting: epoll_create1(Int32(EPOLL_CLOEXEC)))
    for descriptor in [raw, more.raw] {
      var event = epoll_event()
      event.events = EPOLLIN.rawValue
      epoll_ctl(readiness.raw, EPOLL_CTL_ADD, descriptor, &event)
    }
  }

  deinit {
    if let page { munmap(page, 4096) }
  }

  private func send(_ packet: RemotePacket) { _ = packet.send(socket.raw) }

  private func call(_ operation: String, _ packet: RemotePacket) throws(XenError) -> (UInt64, [UInt8]) {
    let result: Result<(UInt64, [UInt8]), Errno> = pending.withLock { pending in
      guard packet.send(socket.raw) else { return .failure(Errno(EPIPE)) }
      var isOver = false
      while let (reply, payload) = RemotePacket.receive(socket.raw, wait: true, isOver: &isOver) {
        if reply.kind == .event {
          pending.append(UInt32(truncatingIfNeeded: reply.first))
          more.signal()
          continue
        }
        return reply.errno == 0 ? .success((reply.first, payload)) : .failure(Errno(Int32(reply.errno)))
      }
      return .failure(Errno(EPIPE))
    }
    switch result {
    case .success(let value): return value
    case .failure(let errno): throw XenError(operation, errno)
    }
  }

  func createIOReqServer() throws(XenError) -> UInt16 {
    UInt16(truncatingIfNeeded: try call("create_ioreq_server", RemotePacket(.create)).0)
  }

  func destroyIOReqServer(_ server: UInt16) throws(XenError) {
    _ = try call("destroy_ioreq_server", RemotePacket(.destroy, server: server))
  }

  func setIOReqServer(_ server: UInt16, enabled: Bool) throws(XenError) {
    _ = try call("set_ioreq_server_state", RemotePacket(.enable, server: server, first: enabled ? 1 : 0))
  }

  func claim(_ range: AccessRange, for server: UInt16) throws(XenError) {
    switch range {
    case .memory(let range): try change(.claimMemory, server, range)
    case .ports(let range): try change(.claimPorts, server, range)
    case .configuration(let address): try change(.claimFunction, server, UInt64(address.number)...UInt64.max)
    }
  }

  func release(_ range: AccessRange, from server: UInt16) throws(XenError) {
    switch range {
    case .memory(let range): try change(.releaseMemory, server, range)
    case .ports(let range): try change(.releasePorts, server, range)
    case .configuration(let address): try change(.releaseFunction, server, UInt64(address.number)...UInt64.max)
    }
  }

  private func change(
    _ operation: RemoteOperation, _ server: UInt16, _ range: ClosedRange<UInt64>
  ) throws(XenError) {
    _ = try call(
      "io_range", RemotePacket(operation, server: server, first: range.lowerBound, second: range.upperBound))
  }

  func mapIOReqPage(_ server: UInt16) throws(XenError) -> UnsafeMutableRawPointer {
    _ = try call("map_resource", RemotePacket(.mapPage, server: server))
    let offset = off_t((pageCount + Int(server)) * 4096)
    guard let start = mmap(nil, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory.raw, offset), start != MAP_FAILED
    else { throw XenError("map_resource", Errno.last) }
    page = start
    return start
  }

  func unmapIOReqPage() {
    guard let page else { return }
    munmap(page, 4096)
    self.page = nil
    send(RemotePacket(.unmapPage))
  }

  // MARK: Event channels

  var eventDescriptor: Int32 { readiness.raw }

  func bind(remotePort: UInt32) throws(XenError) -> UInt32 {
    UInt32(truncatingIfNeeded: try call("bind_interdomain", RemotePacket(.bind, first: UInt64(remotePort))).0)
  }

  func unbind(_ port: UInt32) { send(RemotePacket(.unbind, first: UInt64(port))) }

  func notify(_ port: UInt32) { send(RemotePacket(.notify, first: UInt64(port))) }

  func nextEvent() -> UInt32? {
    pending.withLock { pending in
      if pending.isEmpty {
        more.drain()
        var isOver = false
        let received = RemotePacket.receive(socket.raw, wait: false, isOver: &isOver)
        // A simulator that is gone would leave the socket readable for ever.
        if isOver { epoll_ctl(readiness.raw, EPOLL_CTL_DEL, socket.raw, nil) }
        guard let (packet, _) = received, packet.kind == .event else { return nil }
        return UInt32(truncatingIfNeeded: packet.first)
      }
      return pending.removeFirst()
    }
  }

  func unmask(_ port: UInt32) { send(RemotePacket(.unmask, first: UInt64(port))) }

  // MARK: Interrupts and memory

  func setPCIIntx(device: UInt8, pin: UInt8, high: Bool) {
    send(RemotePacket(.interrupt, first: UInt64(device) * 4 + UInt64(pin), second: high ? 1 : 0))
  }

  func setIRQ(_ irq: UInt32, high: Bool) {
    send(RemotePacket(.interrupt, first: 1000 + UInt64(irq), second: high ? 1 : 0))
  }

  func injectMSI(address: UInt64, data: UInt32) -> Bool {
    send(RemotePacket(.message, first: address, second: UInt64(data)))
    return true
  }

  func map(
    frames: UnsafePointer<UInt64>, count: Int, errors: UnsafeMutablePointer<Int32>
  ) -> UnsafeMutableRawPointer? {
    // The pools ask for runs of frames.
    guard let (_, states) = try? call("map", RemotePacket(.errors, first: frames[0], second: UInt64(count))),
      states.count == count, states.contains(0),
      let start = mmap(nil, count * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
      start != MAP_FAILED
    else { return nil }
    for index in 0..<count {
      errors[index] = Int32(states[index])
      guard states[index] == 0 else { continue }
      _ = mmap(
        start + index * 4096, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory.raw,
        off_t(frames[index] * 4096))
    }
    send(RemotePacket(.mapped))
    return start
  }

  func unmap(_ start: UnsafeMutableRawPointer, count: Int) {
    munmap(start, count * 4096)
    send(RemotePacket(.unmapped))
  }
}
