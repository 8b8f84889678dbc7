import CLinux
import Glibc
package import Transport
package import Virtqueue

/// The data path of one queue pair of a network device, with a queue of a tap of its own: packets move by one system call each, straight
/// between the guest's memory and the kernel; nothing is kept between batches but one packet that waits for buffers.
///
/// Queue 0 of the pump is the pair's receive queue, 1 its transmit queue; the first pair's pump has the control queue as 2. What the
/// driver chooses there comes to all pumps by `set`. Sending is in `NetPump+Transmit.swift`, receiving in `NetPump+Receive.swift`,
/// the control queue in `NetPump+Control.swift`.
package struct NetPump: WatchingPump, ~Copyable {
  /// Packets in each direction before other sources of the thread have their turn.
  static var batchLimit: Int { 64 }
  /// Packets between two looks at whether the driver wants an interrupt.
  static var groupLimit: Int { 16 }
  static var chainLimit: Int { 256 }
  static var vectorLimit: Int { 1022 }
  /// Bytes of the smallest packet and buffer: the two headers.
  static var leastBytes: Int { NetConfiguration.headerBytes + 14 }
  /// Bytes of a received packet that are looked at: headers with a VLAN's tag.
  static var lookedAtBytes: Int { NetConfiguration.headerBytes + 18 }

  enum Place {
    static let receive = 0
    static let transmit = 1
    static let control = 2
  }

  package let descriptors: [Int32]
  /// A tap stays readable while the driver has no buffers.
  package static var listensForEdges: Bool { true }
  let tap: Int32
  let settings: NetPumpSettings
  let rate: RateNode
  var memory: GuestMemoryView
  var receiveQueue: SerialQueue
  var transmitQueue: SerialQueue
  var controlQueue: SerialQueue
  let lock: SourceLock
  var filter: ReceiveFilter
  /// What the driver chose; the control queue's pump changes it.
  var choices: NetChoices
  var features: FeatureBits = []
  var rules = HeaderRules([])
  var guestRules = GuestHeaderRules([])
  /// Whether packets are spread over several of the driver's buffers.
  var merges = false
  /// What a packet is expected to have: as much as a large one at once, and with small ones less and less.
  var expectedBytes = 0
  /// Whether anything limits the device at present.
  var isLimited = false
  var isLinkUp: Bool
  /// The driver's memory cannot be mapped now: it is copied.
  var copies = false
  var budget = RunBudget()
  /// A driver's choice for every pump of the device, and for the tap; false when the host cannot do that.
  let onChoices: @Sendable (NetChoices) -> Bool
  /// The driver has announced itself after an interruption.
  let onAnnounced: @Sendable () -> Void

  let vectors: UnsafeMutablePointer<iovec>
  let head: UnsafeMutableRawPointer
  /// Chains that the next packets may be received into, oldest first.
  let window: UnsafeMutablePointer<ReceiveChain>
  /// Takes what of a packet is larger than expected.
  let spill: UnsafeMutableRawPointer
  let spillBytes: Int
  /// A packet that waits for buffers, of as many bytes at most.
  let parking: UnsafeMutableRawPointer
  var parkedBytes = 0
  var parkedUntil: UInt64 = 0
  /// When the control queue's commands of before are paid for.
  var commandsPaid: UInt64 = 0
  /// Chains that were there when the driver's buffers did not suffice.
  var insufficient = 0
  package internal(set) var nextTime: UInt64 = 0
  var goneResult = 0
  /// Notifications that the driver wants to be kept back (`NetPump+Coalescing.swift`), the timer that ends that, and what it is set to.
  var receiveDelay = NotificationDelay()
  var transmitDelay = NotificationDelay()
  let timer: Int32
  var timerTime: UInt64 = 0
  var idle = IdlePoll()
  private(set) var runStart: UInt64 = 0
  var now: UInt64 = 0

  /// A chain of the receive queue that is ready for a packet.
  struct ReceiveChain {
    var ticket = ChainTicket(head: 0, slots: 0)
    var bytes = 0
    var vectorCount = 0
  }

  /// - Parameters:
  ///   - tap: a non-blocking descriptor that gives and takes a packet with its header by each call; outlives the pump.
  ///   - counters: of the queues, in their order.
  package init(
    tap: Int32, source: any GuestMemorySource, counters: [QueueCounters], settings: NetPumpSettings, rate: RateNode,
    choices: NetChoices, isLinkUp: Bool, onChoices: @escaping @Sendable (NetChoices) -> Bool,
    onAnnounced: @escaping @Sendable () -> Void
  ) {
    self.tap = tap
    timer = clinux_timer_create()
    // Without one, what is kept back goes by the loop's timers, which are later by up to a millisecond.
    descriptors = timer >= 0 ? [tap, timer] : [tap]
    self.settings = settings
    self.rate = rate
    self.choices = choices
    self.isLinkUp = isLinkUp
    self.onChoices = onChoices
    self.onAnnounced = onAnnounced
    memory = GuestMemoryView(source: source)
    receiveQueue = SerialQueue(chainLimit: Self.chainLimit, counters: counters[0])
    transmitQueue = SerialQueue(chainLimit: Self.chainLimit, counters: counters[1])
    controlQueue = SerialQueue(chainLimit: 16, counters: counters.count > 2 ? counters[2] : QueueCounters())
    lock = SourceLock(settings.source)
    filter = ReceiveFilter(choices)
    // One more for the spill: IOV_MAX is 1024.
    vectors = .allocate(capacity: Self.vectorLimit + 1)
    head = .allocate(byteCount: NetConfiguration.headerBytes + SourceLock.headBytes, alignment: 16)
    head.initializeMemory(as: UInt8.self, repeating: 0, count: NetConfiguration.headerBytes + SourceLock.headBytes)
    window = .allocate(capacity: Self.chainLimit)
    window.initialize(repeating: ReceiveChain(), count: Self.chainLimit)
    spillBytes = NetConfiguration.receiveBytes(mtu: settings.mtu, isLarge: true)
    spill = .allocate(byteCount: spillBytes, alignment: 16)
    parking = .allocate(byteCount: spillBytes, alignment: 16)
  }

  deinit {
    if timer >= 0 { Glibc.close(timer) }
    vectors.deallocate()
    head.deallocate()
    window.deallocate()
    spill.deallocate()
    parking.deallocate()
  }

  // MARK: Life

  package mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault) {
    features = activation.features
    rules = HeaderRules(features)
    merges = features.contains(.netMergeable)
    copies = false
    set(choices)
    switch queue {
    case Place.receive:
      receiveDelay.reset()
      if !activation.adopts { emptyTap() }
      try receiveQueue.activate(activation)
    case Place.transmit:
      transmitDelay.reset()
      try transmitQueue.activate(activation)
    default: try controlQueue.activate(activation)
    }
  }

  package mutating func deactivate(_ queue: Int) {
    switch queue {
    case Place.receive:
      receiveQueue.deactivate()
      receiveDelay.reset()
    case Place.transmit:
      transmitQueue.deactivate()
      transmitDelay.reset()
    default: controlQueue.deactivate()
    }
    nextTime = 0
    parkedBytes = 0
  }

  /// Takes the driver's choices, its own or those that another pump's control queue brought.
  package mutating func set(_ choices: NetChoices) {
    self.choices = choices
    let offloads = FeatureBits(rawValue: choices.offloads)
    guestRules = GuestHeaderRules(offloads)
    expectedBytes = NetConfiguration.receiveBytes(
      mtu: settings.mtu, isLarge: !offloads.isDisjoint(with: .netGuestLarge))
    filter.set(choices, filtersVLANs: features.contains(.netControlVLAN))
    receiveDelay.set(choices.receiveLimits)
    transmitDelay.set(choices.transmitLimits)
    if isOwing { timerTime = 0 }
  }

  package mutating func set(isLinkUp: Bool) { self.isLinkUp = isLinkUp }

  package mutating func takeReport() -> PumpReport? {
    guard goneResult != 0 else { return nil }
    defer { goneResult = 0 }
    return .gone(goneResult)
  }

  // MARK: A batch

  package mutating func run(
    _ signals: borrowing [any TransportSignals], _ budget: inout RunBudget
  ) throws(DeviceFault) -> PumpOutcome {
    self.budget = budget
    defer { budget = self.budget }
    guard receiveQueue.isActive || transmitQueue.isActive || controlQueue.isActive else { return .idle }
    now = MonotonicClock.now
    runStart = now
    receiveQueue.counters.batchSince.store(now, ordering: .relaxed)
    nextTime = 0
    isLimited = rate.isLimited
    let invalidations = memory.enter()
    defer {
      receiveQueue.counters.settle(&memory)
      memory.leave()
      receiveQueue.counters.batchSince.store(0, ordering: .relaxed)
    }
    do throws(VirtqueueFault) {
      try receiveQueue.prepare(invalidations)
      try transmitQueue.prepare(invalidations)
      try controlQueue.prepare(invalidations)
      if settings.pollsWhenIdle, transmitQueue.hasPending { idle.arrives(at: now) }
      while true {
        let commanded = controlQueue.isActive ? try serveControl(signals[Place.control]) : .empty
        let sent = try transmit(signals[Place.transmit])
        let received = try receive(signals[Place.receive])
        guard goneResult == 0 else { return .idle }
        if isOwing { notifyDue(signals, isShort: received == .noRoom) }
        // The next round is another run: jobs and other descriptors of the thread come in between.
        if sent == .more || received == .more || self.budget.isSpent { return .more }
        if pollForMore() { continue }
        // A notification for the receive queue is wanted only by who waits for its buffers.
        var hasMore = sent == .empty && transmitQueue.enableNotifications()
        if received == .noRoom { hasMore = receiveQueue.enableNotifications(behind: insufficient) || hasMore }
        if commanded != .limited { hasMore = controlQueue.enableNotifications() || hasMore }
        guard hasMore else { break }
        if settings.pollsWhenIdle, transmitQueue.hasPending { idle.arrives(at: MonotonicClock.now) }
      }
    } catch {
      throw .virtqueue(error)
    }
    return .idle
  }

  /// How a direction's turn ended.
  enum Turn {
    /// Nothing is left to do.
    case empty
    /// The batch is full.
    case more
    /// The driver has no buffers for what waits.
    case noRoom
    /// The rate is used up until `nextTime`.
    case limited
  }

  /// Whether there is something to do; the transmit queue is watched for it for a moment, where that is worth it.
  private mutating func pollForMore() -> Bool {
    guard nextTime == 0, !isOwing else { return false }
    return hasPending || settings.pollsWhenIdle && watch()
  }

  var clock: UInt64 { MonotonicClock.now }
  var hasPending: Bool { mutating get { transmitQueue.hasPending } }

  /// Notes that a direction has to wait for its rate.
  mutating func wait(until time: UInt64) { nextTime = nextTime == 0 ? time : min(nextTime, time) }
}

/// What a pump needs to know of its device.
package struct NetPumpSettings: Sendable {
  package var mac: MACAddress
  /// What the guest may send; by default, from its hardware address only.
  package var source = SourceRules()
  package var mtu = 1500
  /// Queue pairs that the device has.
  package var pairs = 1
  /// See `IdlePoll`; off where driver and device share a thread.
  package var pollsWhenIdle = true

  package init(mac: MACAddress) {
    self.mac = mac
    source.mac = mac
  }
}
