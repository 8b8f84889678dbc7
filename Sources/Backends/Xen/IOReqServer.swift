package import EventLoop
package import Transport
import Virtqueue

/// A guest's ioreq server: one per guest, however many devices. Answers every access to its slots' windows.
///
/// Confined to the guest's ioreq thread, whose loop calls `ready` for event channels. A notification of a queue is handed to
/// the device's thread before the slot is answered, so the vCPU goes on at once.
package final class IOReqServer: EventSource {
  /// What the server did, readable from any thread: gauges alone, which outlive the server.
  package final class Counters: Sendable {
    package let accesses = Gauge()
    package let invalidations = Gauge()
    package let strays = Gauge()
  }

  /// The server's number in Xen.
  package let identifier: UInt16
  package let counters = Counters()
  private let guest: any GuestHandle
  private let pool: ForeignMappingPool
  private let page: IOReqPage
  private let loop: EventLoop
  /// For a test that shows what they are for.
  private let ignoresInvalidations: Bool
  private var memory: GuestMemoryView
  private var token: EventLoop.Token?
  /// Our port of each vCPU.
  private var ports: [UInt32] = []
  /// Windows that are answered, by slot; nil where a slot is empty.
  private var windows: [(slot: DeviceSlot, transport: MMIOTransport?)] = []
  private var mapped: [ClosedRange<UInt64>] = []
  private let functions: PCIRoutes
  /// What is called with the first access to a configuration space that is left waiting; nil where none is.
  private var onScan: (() -> Void)?
  private var holdsConfiguration = false
  private var isClosed = false
  /// Whether an earlier process made it.
  package let isAdopted: Bool

  /// - Parameter ignoresInvalidations: corrupts data as soon as a guest balloons: for a test that shows it.
  ///   - earlier: the server of a process that is gone. It outlived it: its ranges are claimed, and vCPUs may be waiting in its slots, to
  ///     be answered by `serveAll` as soon as the devices are in their slots again.
  ///   - onCreated: gets a new server's number before the guest can notice it.
  ///
  /// Creates, maps, enables and binds: in the order in which Xen fills in the ports.
  package init(
    guest: any GuestHandle, pool: ForeignMappingPool, loop: EventLoop, adopting earlier: UInt16? = nil,
    ignoresInvalidations: Bool = false, onCreated: (UInt16) -> Void = { _ in }
  ) throws(XenError) {
    isAdopted = earlier != nil
    self.guest = guest
    self.pool = pool
    self.loop = loop
    self.ignoresInvalidations = ignoresInvalidations
    memory = GuestMemoryView(source: pool)
    if let earlier {
      identifier = earlier
    } else {
      identifier = try guest.createIOReqServer()
      onCreated(identifier)
    }
    functions = PCIRoutes(guest: guest, server: identifier, isAdopted: isAdopted)
    do throws(XenError) {
      page = IOReqPage(try guest.mapIOReqPage(identifier))
      try guest.setIOReqServer(identifier, enabled: true)
      for vcpu in 0..<IOReqPage.slotCount {
        let remote = page.port(vcpu)
        guard remote != 0 else { break }
        let port = try guest.bind(remotePort: remote)
        ports.append(port)
      }
      do throws(Errno) {
        token = try loop.add(guest.eventDescriptor, events: 1 /* EPOLLIN */, source: self)
      } catch {
        throw XenError("epoll of the event channels", error)
      }
    } catch {
      for port in ports { guest.unbind(port) }
      guest.unmapIOReqPage()
      if !isAdopted { try? guest.destroyIOReqServer(identifier) }
      throw error
    }
  }

  /// Whether the failure of an adoption says that there is no such server of ours any more (Xen 4.17, xen/common/ioreq.c: ENOENT for a number
  /// that nobody has, EPERM for another domain's), rather than that it cannot be reached now.
  package static func isGone(_ error: XenError) -> Bool { [2, 1].contains(error.errno.code) }

  /// vCPUs of the guest.
  package var vcpuCount: Int { ports.count }

  // MARK: Windows

  /// Claims a run of addresses of the guest for this server. Ends are inclusive.
  package func claim(first: UInt64, last: UInt64) throws(XenError) {
    do throws(XenError) {
      try guest.claim(.memory(first...last), for: identifier)
    } catch {
      // An adopted server has its ranges already.
      guard isAdopted, error.errno.code == 17 /* EEXIST */ else { throw error }
    }
    mapped.append(first...last)
  }

  /// Claims a device's window where it is not claimed yet. It reads as an empty slot while there is no device.
  package func claim(window base: UInt64) throws(XenError) {
    let last = base &+ (MMIOTransport.windowSize - 1)
    guard !mapped.contains(where: { $0.lowerBound <= base && last <= $0.upperBound }) else { return }
    try claim(first: base, last: last)
  }

  /// Puts a device into a slot, whose window is claimed for it where it is not yet.
  package func attach(_ transport: MMIOTransport, to slot: DeviceSlot) throws(XenError) {
    try claim(window: slot.base)
    windows.removeAll { $0.slot.base == slot.base }
    windows.append((slot, transport))
  }

  /// Empties a slot. The window stays claimed and reads as a slot without a device.
  package func detach(_ slot: DeviceSlot) {
    for index in windows.indices where windows[index].slot.base == slot.base {
      windows[index].transport?.remove()
      windows[index].transport = nil
    }
  }

  /// Puts a function on the guest's PCI bus.
  package func attach(_ transport: PCITransport, at address: PCIAddress) throws(XenError) {
    try functions.attach(transport, at: address)
  }

  /// Takes a function off the guest's PCI bus.
  package func detach(_ address: PCIAddress) { functions.detach(address) }

  /// Leaves accesses to configuration spaces waiting until `answerConfiguration`: a guest that looks through its bus finds there what is there
  /// by then. Whoever calls it sees to an end. All other accesses are answered.
  ///
  /// - Parameter onFirst: called once, on the guest's thread, when there is one.
  package func holdConfiguration(onFirst: @escaping () -> Void) {
    holdsConfiguration = true
    onScan = onFirst
  }

  /// Answers the accesses to configuration spaces that wait, and all later ones at once. Does nothing while none waits.
  package func answerWaitingConfiguration() { if onScan == nil { answerConfiguration() } }

  /// Answers accesses to configuration spaces from now on, those first that have waited.
  ///
  /// - Parameter absent: functions that are taken off the bus before, also where accesses were answered already; not those that a driver has found.
  /// - Returns: those.
  @discardableResult
  package func answerConfiguration(without absent: [PCIAddress] = []) -> [PCIAddress] {
    let inUse = absent.filter { !functions.detachUnused($0) }
    guard holdsConfiguration else { return inUse }
    holdsConfiguration = false
    onScan = nil
    for vcpu in ports.indices { serve(vcpu, begun: true) }
    return inUse
  }

  // MARK: Events

  package func ready(events: UInt32) {
    while let port = guest.nextEvent() { guest.unmask(port) }
    // The slots say who waits, a byte each: an event that was lost then leaves no vCPU waiting for ever.
    for vcpu in ports.indices { serve(vcpu) }
  }

  /// Answers every vCPU that waits, also those whose access an earlier process had begun with (register accesses may be repeated), and
  /// those that it had answered without notifying them: a vCPU looks at its slot only when an event comes.
  package func serveAll() {
    for vcpu in ports.indices {
      serve(vcpu, begun: true)
      if page.isAnswered(vcpu) { guest.notify(ports[vcpu]) }
    }
  }

  private func serve(_ vcpu: Int, begun: Bool = false) {
    if holdsConfiguration, page.isOfConfiguration(vcpu) {
      onScan?()
      onScan = nil
      return
    }
    guard let request = page.take(vcpu, begun: begun) else { return }
    page.answer(vcpu, data: perform(request))
    guest.notify(ports[vcpu])
  }

  /// - Returns: what goes into the slot's data field.
  private func perform(_ request: IOReq) -> UInt64 {
    counters.accesses.add(1)
    switch request.kind {
    case .invalidate:
      counters.invalidations.add(1)
      if !ignoresInvalidations { pool.invalidate() }
      return request.data
    case .memory, .pciConfiguration:
      let space = request.kind == .memory ? Space.memory : .pciConfiguration
      if request.dataIsPointer {
        repeatAccess(request, space)
        return request.data
      }
      let width = Int(clamping: min(request.size, 8))
      if request.isRead { return read(space, request.address, width) }
      write(space, request.address, width, request.data)
      return request.data
    case .portIO, .timeOffset, nil:
      counters.strays.add(1)
      return request.isRead ? .max : request.data
    }
  }

  /// What an address is in.
  private enum Space {
    case memory
    case pciConfiguration
  }

  private func transport(at address: UInt64) -> (transport: MMIOTransport?, offset: UInt64)? {
    for window in windows
    where address >= window.slot.base && address &- window.slot.base < MMIOTransport.windowSize {
      return (window.transport, address &- window.slot.base)
    }
    return nil
  }

  private func read(_ space: Space, _ address: UInt64, _ width: Int) -> UInt64 {
    if space == .pciConfiguration { return functions.readConfiguration(address, width) }
    if let (function, offset) = functions.target(at: address) { return function.read(offset: offset, width: width) }
    guard let (transport, offset) = transport(at: address), let transport else {
      // A BAR may have moved between the access and its answer.
      guard let range = mapped.first(where: { $0.contains(address) }) else { return .max }
      return Self.emptySlot((address &- range.lowerBound) & (SlotTable.windowStride - 1), width)
    }
    return transport.read(offset: offset, width: width)
  }

  /// A slot without a device: magic and version are there, the device's number is 0 (virtio 1.2, 4.2.3.1.1), the rest is 0.
  private static func emptySlot(_ offset: UInt64, _ width: Int) -> UInt64 {
    guard width == 4 else { return 0 }
    switch offset {
    case 0x000: return 0x7472_6976
    case 0x004: return 2
    default: return 0
    }
  }

  private func write(_ space: Space, _ address: UInt64, _ width: Int, _ value: UInt64) {
    if space == .pciConfiguration { return functions.writeConfiguration(address, width, value) }
    if let (function, offset) = functions.target(at: address) {
      return function.write(offset: offset, width: width, value: value)
    }
    guard let (transport, offset) = transport(at: address) else { return }
    transport?.write(offset: offset, width: width, value: value)
  }

  /// REP MOVS and the like on the window: the data is in guest memory, `count` elements of `size` bytes. Xen keeps one request
  /// within a page; a count beyond that is cut. Accesses to the configuration space (REP INS and OUTS on its port) stay at one register.
  private func repeatAccess(_ request: IOReq, _ space: Space) {
    let size = UInt64(min(max(request.size, 1), 8))
    let count = min(UInt64(request.count), 4096 / size)
    _ = memory.enter()
    defer { memory.leave() }
    for step in 0..<count {
      let distance = size &* step
      let address =
        space == .pciConfiguration
        ? request.address : request.stepsDown ? request.address &- distance : request.address &+ distance
      let buffer = request.stepsDown ? request.data &- distance : request.data &+ distance
      var value: UInt64 = 0
      do throws(GuestMemoryFault) {
        if request.isRead {
          value = read(space, address, Int(size))
          try memory.copyOut(from: &value, to: buffer, count: Int(size))
        } else {
          try memory.copyIn(from: buffer, to: &value, count: Int(size))
          write(space, address, Int(size), value)
        }
      } catch {
        return
      }
    }
  }

  // MARK: End

  /// Lets go of the server without ending it, for a later process: accesses wait for that one.
  package func leave() {
    guard !isClosed else { return }
    isClosed = true
    windows = []
    if let token { loop.remove(token) }
    for port in ports { guest.unbind(port) }
    guest.unmapIOReqPage()
  }

  /// Ends the server: no new access is taken, those under way are answered, then everything is given back to Xen.
  ///
  /// Errors are expected when the guest is being destroyed: Xen has taken the server down by itself then.
  package func close() {
    destroy()
    pool.close()
  }

  /// Ends the server alone: the next one of the guest reaches its memory through the same pool.
  package func destroy() {
    guard !isClosed else { return }
    isClosed = true
    for window in windows { window.transport?.remove() }
    windows = []
    functions.removeAll()
    try? guest.setIOReqServer(identifier, enabled: false)
    // Whoever got in before the server was disabled waits for an answer; destroying the server would not wake it.
    holdsConfiguration = false
    for vcpu in ports.indices { serve(vcpu, begun: true) }
    for range in mapped { try? guest.release(.memory(range), from: identifier) }
    functions.close()
    if let token { loop.remove(token) }
    for port in ports { guest.unbind(port) }
    guest.unmapIOReqPage()
    try? guest.destroyIOReqServer(identifier)
  }
}
