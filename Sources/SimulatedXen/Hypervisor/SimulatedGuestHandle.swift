import EventLoop
import Glibc
import Synchronization
import Transport
import Xen

/// An event channel between a vCPU and an ioreq server, as one of the server's ports.
final class SimulatedChannel: Sendable {
  private let owner: SimulatedEvents
  private let port: UInt32

  init(owner: SimulatedEvents, port: UInt32) {
    self.owner = owner
    self.port = port
  }

  func raise() { owner.raise(port) }

  func isOwned(by events: SimulatedEvents) -> Bool { owner === events }
}

/// A backend's handle on event channels: a ring of pending ports with a descriptor, as /dev/xen/evtchn has.
final class SimulatedEvents: Sendable {
  private struct State {
    var pending: [UInt32] = []
    var masked: Set<UInt32> = []
    /// Raised while masked: delivered at unmask.
    var latched: Set<UInt32> = []
  }

  private let state = Mutex(State())
  private let descriptor: EventDescriptor

  init() throws(Errno) { descriptor = try EventDescriptor() }

  var raw: Int32 { descriptor.raw }

  func raise(_ port: UInt32) {
    let signals = state.withLock { state in
      guard !state.masked.contains(port) else {
        state.latched.insert(port)
        return false
      }
      state.masked.insert(port)
      state.pending.append(port)
      return true
    }
    if signals { descriptor.signal() }
  }

  func next() -> UInt32? {
    state.withLock { state in
      guard !state.pending.isEmpty else {
        descriptor.drain()
        return nil
      }
      return state.pending.removeFirst()
    }
  }

  func unmask(_ port: UInt32) {
    let again = state.withLock { state in
      state.masked.remove(port)
      return state.latched.remove(port) != nil
    }
    if again { raise(port) }
  }

  func forget(_ port: UInt32) {
    state.withLock { state in
      state.pending.removeAll { $0 == port }
      state.masked.remove(port)
      state.latched.remove(port)
    }
  }
}

/// The simulator's side of `GuestHandle`. Keeps the rules that Xen has: a page before ports, ends inclusive, no calls on a
/// destroyed domain.
final class SimulatedGuestHandle: GuestHandle, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the domain guards its own state; the rest belongs to the ioreq thread.

  private let domain: SimulatedDomain
  private let events: SimulatedEvents
  private var mappedServer: UInt16?
  private var vcpuOfPort: [UInt32: Int] = [:]
  private static let maximumServers = 8

  init(_ domain: SimulatedDomain) throws(XenError) {
    self.domain = domain
    do throws(Errno) {
      events = try SimulatedEvents()
    } catch {
      throw XenError("event channels", error)
    }
    domain.state.withLock { $0.usage.handles += 1 }
  }

  deinit { domain.state.withLock { $0.usage.handles -= 1 } }

  private func fault(_ operation: String, _ code: Int32) -> XenError { XenError(operation, Errno(code)) }

  private func change(
    _ operation: String, _ body: (inout SimulatedDomain.State) -> Result<UInt, Errno>
  ) throws(XenError) -> UInt {
    let result: Result<UInt, Errno> = domain.state.withLock { state in
      guard !state.isDestroyed else { return .failure(Errno(ESRCH)) }
      return body(&state)
    }
    switch result {
    case .success(let value): return value
    case .failure(let errno): throw XenError(operation, errno)
    }
  }

  func createIOReqServer() throws(XenError) -> UInt16 {
    let memory = domain.memory
    let number = try change("create_ioreq_server") { state in
      guard let free = (0..<UInt16(Self.maximumServers)).first(where: { state.servers[$0] == nil }) else {
        return .failure(Errno(ENOSPC))
      }
      let page = memory.extraPage(Int(free))
      memset(page, 0, 4096)
      state.servers[free] = SimulatedDomain.Server(page: page)
      state.usage.ioreqServers += 1
      return .success(UInt(free))
    }
    return UInt16(number)
  }

  func destroyIOReqServer(_ server: UInt16) throws(XenError) {
    domain.state.withLock { state in
      guard state.servers.removeValue(forKey: server) != nil else { return }
      state.usage.ioreqServers -= 1
    }
  }

  func setIOReqServer(_ server: UInt16, enabled: Bool) throws(XenError) {
    let (vcpus, mapped) = (domain.vcpuCount, mappedServer == server)
    _ = try change("set_ioreq_server_state") { state in
      guard let found = state.servers[server] else { return .failure(Errno(ENOENT)) }
      state.servers[server]?.isEnabled = enabled
      // The ports are filled in when the server is enabled and its page exists; enabling first leaves zeros.
      if enabled && mapped {
        for vcpu in 0..<vcpus {
          (found.page + vcpu * IOReqPage.slotBytes).storeBytes(
            of: UInt32(100 + vcpu), toByteOffset: 24, as: UInt32.self)
        }
      }
      return .success(0)
    }
  }

  func claim(_ range: AccessRange, for server: UInt16) throws(XenError) {
    if SimulatedDomain.strikes(domain.rangeFailures) { throw XenError("map_io_range", Errno(ENOMEM)) }
    if case .memory(let wanted) = range, domain.refusedMemory.withLock({ $0?.overlaps(wanted) }) == true {
      throw XenError("map_io_range", Errno(ENOMEM))
    }
    _ = try change("map_io_range") { state in
      guard let found = state.servers[server] else { return .failure(Errno(EINVAL)) }
      guard !found.ranges.contains(where: { $0.overlaps(range) }) else { return .failure(Errno(EEXIST)) }
      state.servers[server]?.ranges.append(range)
      if case .configuration = range { state.functionClaims += 1 }
      return .success(0)
    }
  }

  func release(_ range: AccessRange, from server: UInt16) throws(XenError) {
    _ = try change("unmap_io_range") { state in
      guard state.servers[server]?.ranges.contains(range) == true else { return .failure(Errno(ENOENT)) }
      state.servers[server]?.ranges.removeAll { $0 == range }
      return .success(0)
    }
  }

  func mapIOReqPage(_ server: UInt16) throws(XenError) -> UnsafeMutableRawPointer {
    if SimulatedDomain.strikes(domain.pageFailures) { throw fault("map_resource", ENOMEM) }
    let page = try change("map_resource") { state in
      guard let found = state.servers[server] else { return .failure(Errno(ENOENT)) }
      state.usage.ioreqPages += 1
      return .success(UInt(bitPattern: found.page))
    }
    mappedServer = server
    guard let start = UnsafeMutableRawPointer(bitPattern: page) else { throw fault("map_resource", ENOMEM) }
    return start
  }

  func unmapIOReqPage() {
    guard mappedServer != nil else { return }
    mappedServer = nil
    domain.state.withLock { $0.usage.ioreqPages -= 1 }
  }

  /// What Xen does when the process is gone: its ports and pages go, its ioreq servers stay.
  func abandon() {
    for port in Array(vcpuOfPort.keys) { unbind(port) }
    unmapIOReqPage()
  }

  // MARK: Event channels

  var eventDescriptor: Int32 { events.raw }

  func bind(remotePort: UInt32) throws(XenError) -> UInt32 {
    let vcpu = Int(remotePort) - 100
    let port = remotePort + 1000
    guard (0..<domain.vcpuCount).contains(vcpu), let server = mappedServer else {
      throw fault("bind_interdomain", EINVAL)
    }
    let channel = SimulatedChannel(owner: events, port: port)
    _ = try change("bind_interdomain") { state in
      state.servers[server]?.channels[vcpu] = channel
      state.usage.ports += 1
      return .success(0)
    }
    vcpuOfPort[port] = vcpu
    // A successful bind sets the local port pending once: events may have been sent while nobody was there (xen: common/event_channel.c).
    events.raise(port)
    return port
  }

  func unbind(_ port: UInt32) {
    guard let vcpu = vcpuOfPort.removeValue(forKey: port) else { return }
    domain.state.withLock { state in
      state.usage.ports -= 1
      // Our own only: another process may have bound the vCPU's channel by now.
      for (number, server) in state.servers where server.channels[vcpu]?.isOwned(by: events) == true {
        state.servers[number]?.channels[vcpu] = nil
      }
    }
    // Behind that, when nobody can raise it any more.
    events.forget(port)
  }

  func notify(_ port: UInt32) {
    if let vcpu = vcpuOfPort[port] { domain.answers[vcpu].open() }
  }

  func nextEvent() -> UInt32? { events.next() }

  func unmask(_ port: UInt32) { events.unmask(port) }

  // MARK: Interrupts and memory

  func setPCIIntx(device: UInt8, pin: UInt8, high: Bool) { domain.setLevel(UInt32(device) * 4 + UInt32(pin), high) }

  func setIRQ(_ irq: UInt32, high: Bool) { domain.setLevel(1000 + irq, high) }

  func injectMSI(address: UInt64, data: UInt32) -> Bool {
    domain.deliver(MSIMessage(address: address, data: data))
    return true
  }

  func map(
    frames: UnsafePointer<UInt64>, count: Int, errors: UnsafeMutablePointer<Int32>
  ) -> UnsafeMutableRawPointer? {
    domain.beforeMapping.withLock { $0 }?()
    domain.mapCalls.wrappingAdd(1, ordering: .relaxed)
    guard !domain.state.withLock({ $0.isDestroyed }) else { return nil }
    if SimulatedDomain.strikes(domain.mapFailures) { return nil }
    guard let start = domain.memory.map(frames: frames, count: count, errors: errors) else { return nil }
    domain.state.withLock { $0.usage.mappings += 1 }
    return start
  }

  func unmap(_ start: UnsafeMutableRawPointer, count: Int) {
    domain.beforeUnmapping.withLock { $0 }?()
    munmap(start, count * 4096)
    domain.state.withLock { $0.usage.mappings -= 1 }
  }
}
