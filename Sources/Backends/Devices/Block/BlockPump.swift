import HostMemory
package import Transport
package import Virtqueue

/// The data path of one block queue: descriptor chains in, engine operations out, completions back.
///
/// Confined to the queue's data thread. A batch is one call of `run`; within it nothing is allocated, locked or reference
/// counted per request. The stages of a request: `take` (chain -> request -> operation) here, `begin` and `stage` (one step of
/// it becomes an engine request) in `BlockPump+Requests.swift`, `finishStep` (the engine's answer) and `complete` (status byte and
/// used element) in `BlockPump+Completion.swift`.
package struct BlockPump: ~Copyable {
  /// Bytes of one step that goes straight between the guest's memory and the store. A request is worked on in such steps, and between
  /// them the pump can be stopped.
  static var stepBytes: UInt64 { 4 << 20 }
  /// Bytes that the engine works on at a time at most, where they go straight: what a reset has to wait for.
  static var bytesInFlightLimit: UInt64 { 32 << 20 }
  /// Ranges to discard or to zero that the engine has at a time, and bytes of a piece of one: the store may take long for each.
  static var rangesInFlightLimit: Int { 4 }
  static var discardBytes: UInt64 { 64 << 20 }
  static var zeroBytes: UInt64 { 8 << 20 }
  /// Requests handed to the engine at a time. Where data moves within `submit`, small groups let the driver work on the first
  /// answers while the next ones are made; else one call for all is cheaper.
  private let groupLimit: Int

  let engine: any BlockEngine
  let settings: BlockPumpSettings
  let serial: [UInt8]
  let counters: QueueCounters
  let latencies: QueueLatencies
  let storage: JournalStorage
  /// The device's node of the budget tree, and whether it or one above it has a limit, as of this batch.
  let rate: RateNode
  var isLimited = false
  var geometry: BlockGeometry
  /// Data moves straight between guest memory and the store: as the queue's source allows when it goes live.
  var direct = false
  /// Of transfers that are larger than this, in bytes; the others are cheaper by bounce buffers.
  var directFrom: UInt64 = 0
  let alignmentMask: UInt64

  var memory: GuestMemoryView
  var queue: Virtqueue
  var slab: OperationSlab
  var bounce: BouncePool
  private let tables: UntouchedMemory
  let staged: UnsafeMutablePointer<EngineRequest>
  var stagedCount = 0
  /// Bytes of transfers that were staged for the present group.
  var stagedBytes: UInt64 = 0
  let engineMovesData: Bool
  let completions: UnsafeMutablePointer<EngineCompletion>
  static var completionCapacity: Int { 64 }

  /// Whether the queue is live.
  package private(set) var isActive = false
  var life: UInt32 = 0
  /// Operations of the present life, and those that an earlier one left behind.
  var inFlight = 0
  var orphans = 0
  /// Bytes and ranges of either that the engine has.
  var bytesInFlight: UInt64 = 0
  var rangesInFlight = 0
  var budget = RunBudget()
  var tally = Tally()
  var idle: IdlePoll
  private(set) var runStart: UInt64 = 0
  /// Time of the batch, in nanoseconds.
  var now: UInt64 = 0
  /// Whether writes of the present life must be durable when they complete, or whether the driver decides by `writeback`.
  var isWriteThrough = false
  var followsDriver = false
  let writeback: WritebackSwitch
  /// Of all queues of the device.
  let flushFault: FlushFault

  /// Slots whose step failed and is to be tried again: after a while, or at an operator's word.
  let waiting: UnsafeMutablePointer<UInt32>
  var waitingCount = 0
  /// When the waiting slots are tried again, in nanoseconds; 0 when none is or the queue is held.
  var retryAt: UInt64 = 0
  /// Slots whose requests wait for their rates: reads and writes apart, each first in first out.
  var throttledReads: SlotList
  var throttledWrites: SlotList
  /// When the first of them may go, in nanoseconds; 0 when none waits.
  var throttledUntil: UInt64 = 0
  /// Slots of an earlier owner's chains that are still to be started.
  var adopted: SlotList
  /// Slots of requests that have a step behind them and wait for the next.
  var unfinished: SlotList
  /// Why the queue is held (a negated errno); 0 when it is not.
  package var heldResult = 0
  /// The store is gone for good (a negated errno), and only a new engine helps; 0 while it is there.
  package var goneResult = 0
  /// The last hold that was reported.
  var reportedHold = 0

  /// - Parameter storage: the journal of the queue: its slots are the requests that are worked on at a time, its limit for chains
  ///   comes from `chainLimit(queueSize:)`.
  package init(
    engine: any BlockEngine, source: any GuestMemorySource, counters: QueueCounters, settings: BlockPumpSettings,
    writeback: WritebackSwitch = WritebackSwitch(), flushFault: FlushFault = FlushFault(), storage: JournalStorage,
    rate: RateNode = RateNode(),
    latencies: QueueLatencies = QueueLatencies()
  ) throws(VirtqueueFault) {
    self.engine = engine
    self.storage = storage
    self.rate = rate
    self.latencies = latencies
    let slots = storage.journal.slotCount
    throttledReads = SlotList(capacity: slots)
    throttledWrites = SlotList(capacity: slots)
    adopted = SlotList(capacity: slots)
    unfinished = SlotList(capacity: slots)
    self.counters = counters
    self.writeback = writeback
    self.flushFault = flushFault
    self.settings = settings
    idle = IdlePoll(sharers: settings.queuesOnThread)
    geometry = engine.geometry
    serial = Array(settings.serial.prefix(20))
    groupLimit = engine.movesDataInSubmit ? 16 : RunBudget.chains
    engineMovesData = engine.movesDataInSubmit
    alignmentMask = UInt64(max(1, engine.memoryAlignment) - 1)
    memory = GuestMemoryView(source: source)
    var unused = QueueLayout()
    unused.size = 1
    queue = try Virtqueue(layout: unused, maximumSize: 1, chainLimit: 1, features: [], source: source)
    slab = OperationSlab(journal: storage.journal)
    bounce = BouncePool(
      smallCount: slots,
      largeCount: max(OperationSlab.buffersPerStep, settings.bounceBytes / BouncePool.largeBytes))
    var tables = UntouchedMemory(
      bytes: UntouchedMemory.bytes(EngineRequest.self, slots) + UntouchedMemory.bytes(UInt32.self, slots))
    staged = tables.take(EngineRequest.self, slots)
    waiting = tables.take(UInt32.self, slots)
    self.tables = tables
    completions = .allocate(capacity: Self.completionCapacity)
  }

  deinit {
    completions.deallocate()
  }

  /// Buffers that a chain may have: SEG_MAX with header and status, and as long as a driver that does not look at SEG_MAX may
  /// think of, within reason.
  package static func chainLimit(queueSize: UInt16) -> Int {
    max(BlockConfiguration.segmentsMaximum + 2, min(Int(queueSize), 1024))
  }

  // MARK: Life

  /// The driver's queue goes live.
  ///
  /// - Parameter adopts: go on where the last owner of the journal was stopped, if the queue was live then.
  package mutating func activate(
    layout: QueueLayout, maximumSize: UInt16, features: FeatureBits, source: any GuestMemorySource, adopts: Bool = false
  ) throws(DeviceFault) {
    let journal = storage.journal
    do throws(VirtqueueFault) {
      if adopts && (journal.condition == .broken || journal.condition == .live && !journal.isFitting) {
        throw VirtqueueFault.badLayout
      }
      queue = try Virtqueue(
        layout: layout, maximumSize: maximumSize, chainLimit: slab.chainLimit, features: features, source: source,
        journal: journal, adopts: adopts && journal.condition == .live)
    } catch {
      throw .virtqueue(error)
    }
    // Not before a queue is live: what is registered is pinned.
    engine.register(bounce.hottest.start, bytes: bounce.hottest.bytes)
    directFrom = engine.bouncesUpTo
    direct = !settings.copiesAlways && engine.reachesGuestMemory && (source.isStable || engine.movesDataInSubmit)
    // virtio 1.2, 5.2.6.2: a driver that cannot flush gets write-through.
    isWriteThrough =
      settings.cache == .writethrough || settings.cache == .writeback && !features.contains(.blockFlush)
    followsDriver = features.contains(.blockConfigureWriteback)
    isActive = true
  }

  /// The store has another size: requests that are taken from now on are checked against it.
  package mutating func set(capacity: UInt64) { geometry.capacity = capacity }

  /// Ends the present life, outside of a batch, so nothing is staged: from now on no guest memory is touched. What the engine still works on is completed into our own
  /// buffers and dropped; where it still reaches guest memory itself, it is waited for.
  ///
  /// The journal stays as it is: whoever goes on with the queue finds all chains in it that have no published answer.
  package mutating func deactivate() {
    isActive = false
    life &+= 1
    orphans &+= inFlight
    inFlight = 0
    // What waits for something, or for its answer to be published, is in nobody's hands.
    for slot in 0..<slab.count where slab.isBusy(slot) && !slab.records[slot].isWithEngine { release(slot) }
    waitingCount = 0
    retryAt = 0
    heldResult = 0
    throttledReads.clear()
    throttledWrites.clear()
    throttledUntil = 0
    adopted.clear()
    unfinished.clear()
    if direct && !engine.movesDataInSubmit { drain() }
    queue.forgetRings()
    publishLoad()
  }

  /// Waits until the engine works on nothing any more.
  package mutating func drain() {
    while slab.busyCount > 0 {
      engine.waitForCompletion()
      memoryFreeReap()
    }
  }

  /// When `run` has something to do without being woken, in nanoseconds; 0 for never.
  package var nextTime: UInt64 {
    retryAt == 0 ? throttledUntil : throttledUntil == 0 ? retryAt : min(retryAt, throttledUntil)
  }

  /// Operations that the engine works on, those of an earlier life included.
  package var busyCount: Int { slab.busyCount }

  /// Takes completions while no queue is live.
  private mutating func memoryFreeReap() {
    while true {
      let count = engine.reap(into: completions, capacity: Self.completionCapacity)
      for index in 0..<count { dropOrphan(Int(completions[index].tag)) }
      if count == 0 { break }
    }
    publishLoad()
  }

  mutating func dropOrphan(_ slot: Int) {
    guard slot < slab.count else { return }
    noteReturn(slot)
    release(slot)
    orphans &-= 1
  }

  /// Gives back what a slot has, and the slot.
  private mutating func release(_ slot: Int) {
    releaseMeans(slot)
    slab.give(slot)
  }

  /// Gives back what a slot has; itself it stays in use until its answer is published.
  mutating func releaseMeans(_ slot: Int) {
    slab.records[slot].isWithEngine = false
    if slab.records[slot].isCharged {
      slab.records[slot].isCharged = false
      rate.release()
    }
    let numbers = slab.bounce(slot)
    for index in 0..<slab.records[slot].bufferCount { bounce.give(numbers[index]) }
    slab.records[slot].bufferCount = 0
  }

  // MARK: A batch

  /// Serves the queue: after a notification, a completion, an outcome of `more`, or when `retryAt` has come.
  package mutating func run(
    signals: any TransportSignals, budget: inout RunBudget
  ) throws(DeviceFault) -> PumpOutcome {
    self.budget = budget
    defer { budget = self.budget }
    now = engine.now
    runStart = now
    // For the watchdog: a thread that does not come back from here is stuck in the store's or the hypervisor's hands.
    counters.batchSince.store(now, ordering: .relaxed)
    defer { counters.batchSince.store(0, ordering: .relaxed) }
    guard isActive else {
      memoryFreeReap()
      return .idle
    }
    let invalidations = memory.enter()
    defer {
      memory.leave()
      settle()
    }
    isLimited = rate.isLimited
    do throws(VirtqueueFault) {
      try queue.prepare(invalidations: invalidations)
      if settings.pollsWhenIdle, queue.hasPending() { idle.arrives(at: now) }
      try adopt()
      if waitingCount > 0, heldResult == 0, now >= retryAt { tryAgain() }
      while true {
        queue.disableNotifications()
        let hasRoom = try serve(signals)
        if self.budget.isSpent || isStalled(hasRoom: hasRoom) { return .more }
        // Without room the queue waits for completions, and notifications stay off.
        guard hasRoom else { return .idle }
        if pollForMore() { continue }
        guard queue.enableNotifications() else { return .idle }
        if settings.pollsWhenIdle { idle.arrives(at: engine.now) }
      }
    } catch {
      // What was taken before the fault: its vectors are good for this batch only.
      submit()
      if case .badLayout = error { throw .memory }
      throw .virtqueue(error)
    }
  }

  /// Requests wait for their next step, or chains for room, and nothing is under way that would bring the pump back to them: what they waited
  /// for has come since they were looked at.
  private mutating func isStalled(hasRoom: Bool) -> Bool {
    guard inFlight == 0, waitingCount == 0, heldResult == 0, orphans == 0 else { return false }
    return !unfinished.isEmpty || !hasRoom && throttledUntil == 0
  }

  /// Takes what is there, group by group, and publishes what is done.
  ///
  /// - Returns: false when a chain had to stay because a slot or a buffer is missing, or the queue is held.
  private mutating func serve(_ signals: any TransportSignals) throws(VirtqueueFault) -> Bool {
    reap()
    goOn()
    startAdopted()
    serveThrottled()
    // Before chains are taken: slots are free only behind their published answers.
    publish(signals)
    while true {
      var left = groupLimit
      let hasRoom = try take(&left)
      submit()
      reap()
      let hasFreed = publish(signals)
      if budget.isSpent { return hasRoom }
      if !hasRoom && hasFreed { continue }
      if !hasRoom || left > 0 { return hasRoom }
    }
  }

  /// - Returns: whether slots are free that were not before.
  @discardableResult
  private mutating func publish(_ signals: any TransportSignals) -> Bool {
    // Slots may be free in either case: chains that were answered are published by then.
    if queue.hasUnpublished {
      idle.works()
      if queue.publish() {
        tally.interrupts &+= 1
        signals.interruptForUsedBuffers()
      } else {
        tally.suppressed &+= 1
      }
    }
    var hasFreed = false
    while let slot = queue.takePublishedSlot() {
      slab.give(slot)
      hasFreed = true
    }
    return hasFreed
  }

  /// Whether there is something to do; the queue is watched for it for a moment, where that is worth it.
  private mutating func pollForMore() -> Bool {
    if hasPending { return true }
    // What the engine works on is worth waking up for too, and says nothing of the driver.
    return settings.pollsWhenIdle && inFlight == 0 && watch()
  }

  /// Takes chains until the queue is empty, the group full, or the budget spent.
  ///
  /// - Returns: false when a chain had to stay because a slot or a buffer is missing, or the queue is held.
  private mutating func take(_ left: inout Int) throws(VirtqueueFault) -> Bool {
    // What an earlier life left on its way to the disk must land before anything new is started on the same sectors.
    guard orphans == 0, heldResult == 0, adopted.isEmpty else { return false }
    // What moves its data within `submit` is submitted in pieces, for the same reason.
    stagedBytes = 0
    while left > 0, !engineMovesData || stagedBytes < Self.stepBytes {
      guard queue.hasPending() else { return true }
      if memory.missesInBatch >= RunBudget.misses { budget.spend() }
      guard budget.takeChain() else { return true }
      guard let slot = slab.take(at: now) else { return false }
      do throws(VirtqueueFault) {
        var chain = DescriptorChain(buffers: slab.buffers(slot))
        guard try queue.next(memory: &memory, into: &chain) else {
          slab.give(slot)
          return true
        }
        chain.ticket.slot = UInt32(truncatingIfNeeded: slot)
        queue.note(chain)
        guard try begin(slot, chain) else {
          slab.give(slot)
          queue.putBack(chain.ticket)
          return false
        }
      } catch {
        slab.give(slot)
        throw error
      }
      left &-= 1
    }
    // The group ends by its bytes: there may be more.
    left = 0
    return true
  }
}
