package import EventLoop
import Glibc
package import Synchronization
package import Transport
package import Xen

/// A simulated guest as the hypervisor sees it: memory, vCPUs, ioreq servers, interrupt lines, and what backends have mapped.
package final class SimulatedDomain: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `state` is under a lock; the ioreq page is shared memory, accessed as Xen and an
  // ioreq server access theirs.

  /// What backends hold of the domain. All of it must be 0 when they are done with it.
  package struct Usage: Equatable, Sendable {
    package init(ioreqServers: Int = 0, mappings: Int = 0, ports: Int = 0, handles: Int = 0, ioreqPages: Int = 0) {
      self.ioreqServers = ioreqServers
      self.mappings = mappings
      self.ports = ports
      self.handles = handles
      self.ioreqPages = ioreqPages
    }

    package var ioreqServers = 0
    package var mappings = 0
    package var ports = 0
    package var handles = 0
    package var ioreqPages = 0
  }

  struct Server {
    var isEnabled = false
    var ranges: [AccessRange] = []
    let page: UnsafeMutableRawPointer
    /// Our end's channel of each vCPU, once bound.
    var channels: [Int: SimulatedChannel] = [:]
  }

  struct State {
    var servers: [UInt16: Server] = [:]
    /// Claims of functions of the PCI bus so far.
    var functionClaims = 0
    var levels: [UInt32: Bool] = [:]
    /// How often each message was sent, and those that nobody has waited for yet.
    var messages: [MSIMessage: UInt64] = [:]
    var usage = Usage()
    var isDestroyed = false
  }

  package let identifier: DomainID
  package let memory: SimulatedMemory
  package let grants: SimulatedGrants
  package let vcpuCount: Int
  /// How often an interrupt line rose, and how often backends sent mapping calls.
  package let interrupts = Atomic<UInt64>(0)
  package let mapCalls = Atomic<UInt64>(0)
  /// Faults to inject, each a number of times: the guest cannot be opened, a mapping call fails for want of memory, a range of addresses
  /// cannot be claimed, an ioreq page cannot be mapped, and an event of a vCPU is lost.
  package let openFailures = Atomic<Int>(0)
  package let mapFailures = Atomic<Int>(0)
  package let rangeFailures = Atomic<Int>(0)
  /// Memory that no server may claim, each time.
  package let refusedMemory = Mutex<ClosedRange<UInt64>?>(nil)
  package let pageFailures = Atomic<Int>(0)
  package let lostEvents = Atomic<Int>(0)
  /// Whether its kernel has Xen's drivers.
  package let hasXenDrivers = Atomic<Bool>(true)
  /// Accesses to memory that nobody has claimed: a kernel on Arm dies of the first.
  package let aborts = Atomic<UInt64>(0)
  /// Runs when a vCPU has selected its server and not yet written to its slot: where a test lets something happen in between.
  package let beforeSending = Mutex<(@Sendable () -> Void)?>(nil)
  /// Runs when memory is about to be mapped, on the thread that needs it.
  package let beforeMapping = Mutex<(@Sendable () -> Void)?>(nil)
  /// Runs when a mapping is about to be taken away.
  package let beforeUnmapping = Mutex<(@Sendable () -> Void)?>(nil)
  let state = Mutex(State())
  /// Opened whenever a line rises.
  private let interruptGate = Latch()
  /// What each vCPU waits at for its answer.
  let answers: [Latch]

  package init(identifier: DomainID, memoryBytes: Int, vcpuCount: Int = 1) throws(Errno) {
    self.identifier = identifier
    self.vcpuCount = vcpuCount
    memory = try SimulatedMemory(bytes: memoryBytes)
    grants = SimulatedGrants(gate: interruptGate)
    answers = (0..<vcpuCount).map { _ in Latch() }
  }

  package var usage: Usage { state.withLock { $0.usage } }

  /// The level of an interrupt line: slot * 4 + pin of a PCI pin.
  package func level(_ line: UInt32) -> Bool { state.withLock { $0.levels[line] ?? false } }

  func setLevel(_ line: UInt32, _ high: Bool) {
    let rose = state.withLock { state in
      let old = state.levels.updateValue(high, forKey: line) ?? false
      return high && !old
    }
    guard rose else { return }
    interrupts.wrappingAdd(1, ordering: .relaxed)
    interruptGate.open()
  }

  /// Waits until a line is high or has risen since the last wait; false when the time is over. A level interrupts for as long as
  /// it is high, so whoever waits may be woken for another device's.
  package func waitForInterrupt(seconds: Int) -> Bool {
    if state.withLock({ $0.levels.values.contains(true) }) {
      yieldThread()
      return true
    }
    return interruptGate.wait(seconds: seconds)
  }

  /// Whether one of so many faults hits now.
  static func strikes(_ faults: borrowing Atomic<Int>) -> Bool {
    guard faults.load(ordering: .relaxed) > 0 else { return false }
    return faults.wrappingSubtract(1, ordering: .relaxed).oldValue > 0
  }

  var isRunning: Bool { state.withLock { !$0.isDestroyed } }

  func destroy() {
    state.withLock { $0.isDestroyed = true }
    grants.destroy()
    for answer in answers { answer.open() }
  }

  // MARK: The guest's side

  /// An access of a vCPU to an address that is no memory. Blocks that vCPU until a server has answered; addresses that nobody
  /// claims read as ones and drop writes, as on x86; on Arm they abort (`aborts`).
  package func access(
    vcpu: Int, address: UInt64, size: Int, write value: UInt64? = nil, count: UInt32 = 1, buffer: UInt64? = nil,
    stepsDown: Bool = false
  ) -> UInt64 {
    let last = address &+ UInt64(size - 1)
    guard let found = server(where: { $0.covers(address, last) }) else {
      if isRunning { aborts.wrappingAdd(1, ordering: .relaxed) }
      return .max
    }
    return exchange(
      found, vcpu, kind: .memory, address: address, data: buffer ?? value ?? 0, size: UInt32(size), count: count,
      isRead: value == nil, isPointer: buffer != nil, stepsDown: stepsDown)
  }

  /// The server that an access goes to.
  private func server(where isMeant: (AccessRange) -> Bool) -> UInt16? {
    let servers = state.withLock { state in
      state.servers.filter(\.value.isEnabled).map { (number: $0.key, ranges: $0.value.ranges) }
    }
    // From the highest number down, as Xen selects. A server whose process is gone is waited for all the same.
    return servers.sorted { $0.number > $1.number }.first { $0.ranges.contains(where: isMeant) }?.number
  }

  /// An access of a vCPU to a PCI function's configuration space, by the ports 0xcf8 and 0xcfc. What nobody claims reads as ones.
  package func configurationAccess(
    vcpu: Int, _ function: PCIAddress, register: Int, size: Int, write value: UInt64? = nil
  ) -> UInt64 {
    guard let found = server(where: { $0 == .configuration(function) }) else { return .max }
    return exchange(
      found, vcpu, kind: .pciConfiguration,
      address: UInt64(function.number) << 32 | UInt64(truncatingIfNeeded: register & 0xff), data: value ?? 0,
      size: UInt32(size), count: 1, isRead: value == nil, isPointer: false, stepsDown: false)
  }

  /// Addresses of the guest's that servers have claimed, in order.
  package var claimedMemory: [ClosedRange<UInt64>] {
    state.withLock { state in
      state.servers.values.flatMap(\.ranges).compactMap { if case .memory(let range) = $0 { range } else { nil } }
        .sorted { $0.lowerBound < $1.lowerBound }
    }
  }

  /// Functions of the guest's PCI bus that servers have claimed, in order.
  package var claimedFunctions: [PCIAddress] {
    state.withLock { state in
      state.servers.values.flatMap(\.ranges)
        .compactMap { if case .configuration(let function) = $0 { function } else { nil } }.sorted()
    }
  }

  /// How often a function has been claimed so far.
  package var functionClaims: Int { state.withLock { $0.functionClaims } }

  // MARK: Messages

  func deliver(_ message: MSIMessage) {
    state.withLock { $0.messages[message, default: 0] += 1 }
    interrupts.wrappingAdd(1, ordering: .relaxed)
    interruptGate.open()
  }

  /// How often each message was sent.
  package var messages: [MSIMessage: UInt64] { state.withLock { $0.messages } }

  /// What Xen sends after a guest gave pages back; returns when every server has answered.
  package func sendInvalidate(vcpu: Int = 0) {
    let targets = state.withLock { state in state.servers.filter(\.value.isEnabled).keys.sorted() }
    for server in targets {
      _ = exchange(
        server, vcpu, kind: .invalidate, address: 0, data: .max, size: 4, count: 1, isRead: false, isPointer: false,
        stepsDown: false)
    }
  }

  private func exchange(
    _ server: UInt16, _ vcpu: Int, kind: IOReq.Kind, address: UInt64, data: UInt64, size: UInt32, count: UInt32,
    isRead: Bool, isPointer: Bool, stepsDown: Bool
  ) -> UInt64 {
    beforeSending.withLock { $0 }?()
    let flags: UInt8 = (isPointer ? 0x10 : 0) | (isRead ? 0x20 : 0) | (stepsDown ? 0x40 : 0)
    // In one piece, as Xen pauses a domain before it changes its servers: a server that is disabled by now gets nothing any more. The event
    // goes to whoever is bound once the slot is filled, and whoever binds later finds it so: a channel that was looked up before that
    // could be that of a process that has died meanwhile.
    let page: UnsafeMutableRawPointer? = state.withLock { state in
      guard let target = state.servers[server], target.isEnabled, !state.isDestroyed else { return nil }
      let slot = target.page + vcpu * IOReqPage.slotBytes
      slot.storeBytes(of: address, as: UInt64.self)
      slot.storeBytes(of: data, toByteOffset: 8, as: UInt64.self)
      slot.storeBytes(of: count, toByteOffset: 16, as: UInt32.self)
      slot.storeBytes(of: size, toByteOffset: 20, as: UInt32.self)
      slot.storeBytes(of: kind.rawValue, toByteOffset: 31, as: UInt8.self)
      IOReqPage(target.page).stateByte(vcpu).pointee.store(flags | IOReqPage.State.ready, ordering: .releasing)
      if !Self.strikes(lostEvents) { target.channels[vcpu]?.raise() }
      return target.page
    }
    guard let page else { return .max }
    let stateByte = IOReqPage(page).stateByte(vcpu)
    while stateByte.pointee.load(ordering: .acquiring) & IOReqPage.State.mask != IOReqPage.State.responseReady {
      let isInTime = answers[vcpu].wait(seconds: 30)
      // A domain that is destroyed has no vCPU that could go on.
      guard isRunning else { return .max }
      // Who hangs, and why: 1 is an access that nobody took, 2 one whose server stopped in it, 3 one whose answer nobody announced.
      let byte = stateByte.pointee.load(ordering: .acquiring) & IOReqPage.State.mask
      guard isInTime else {
        fatalError("no ioreq server answered vCPU \(vcpu) within 30 s: its slot is in state \(byte)")
      }
    }
    let answer = (page + vcpu * IOReqPage.slotBytes).load(fromByteOffset: 8, as: UInt64.self)
    stateByte.pointee.store(flags | IOReqPage.State.none, ordering: .releasing)
    return answer
  }
}

extension AccessRange {
  /// Whether a memory access is in the range.
  func covers(_ first: UInt64, _ last: UInt64) -> Bool {
    if case .memory(let range) = self { range.lowerBound <= first && last <= range.upperBound } else { false }
  }

  func overlaps(_ other: AccessRange) -> Bool {
    switch (self, other) {
    case (.memory(let left), .memory(let right)), (.ports(let left), .ports(let right)): left.overlaps(right)
    case (.configuration(let left), .configuration(let right)): left == right
    default: false
    }
  }
}
