package import Transport
package import Virtqueue

/// The data path of one block queue: descriptor chains in, engine operations out, completions back.
///
/// Confined to the queue's data thread. A batch is one call of `run`; within it nothing is allocated, locked or reference
/// counted per request. The stages of a request: `take` (chain -> request -> operation) here, `begin` and `stage` (one step of
/// it becomes an engine request) in `BlockPump+Requests.swift`, `finishStep` (the engine's answer) and `complete` (status byte and
/// used element) in `BlockPump+Completion.swift`.
package struct BlockPump: ~Copyable {
  /// What `run` asks of its caller.
  package enum Outcome {
    /// Nothing to do until the next notification or completion.
    case idle
    /// The batch's budget is used up: run again soon.
    case more
  }

  /// Requests taken in one batch at most; then the loop sees to its other sources.
  private static var batchLimit: Int { 256 }
  /// Requests handed to the engine at a time. Where data moves within `submit`, small groups let the driver work on the first
  /// answers while the next ones are made; else one call for all is cheaper.
  private let groupLimit: Int

  private let engine: any BlockEngine
  let settings: BlockPumpSettings
  let serial: [UInt8]
  private let counters: BlockCounters
  var geometry: BlockGeometry
  /// Data moves straight between guest memory and the store.
  let direct: Bool
  let alignmentMask: UInt64

  var memory: GuestMemoryView
  var queue: Virtqueue
  var slab: OperationSlab
  var bounce: BouncePool
  private let staged: UnsafeMutablePointer<EngineRequest>
  private var stagedCount = 0
  private let completions: UnsafeMutablePointer<EngineCompletion>
  private static var completionCapacity: Int { 64 }

  /// Whether the queue is live.
  package private(set) var isActive = false
  var life: UInt32 = 0
  /// Operations of the present life, and those that an earlier one left behind.
  var inFlight = 0
  private var orphans = 0
  var tally = Tally()
  private var idle = IdlePoll()
  /// Time of the batch, in nanoseconds.
  var now: UInt64 = 0
  /// Whether writes of the present life must be durable when they complete, or whether the driver decides by `writeback`.
  private var isWriteThrough = false
  private var followsDriver = false
  private let writeback: WritebackSwitch

  /// Slots whose step failed and is to be tried again: after a while, or at an operator's word.
  let waiting: UnsafeMutablePointer<UInt32>
  var waitingCount = 0
  /// When the waiting slots are tried again, in nanoseconds; 0 when none is or the queue is held.
  package var retryAt: UInt64 = 0
  /// Why the queue is held (a negated errno); 0 when it is not.
  package var heldResult = 0

  /// Counts of a batch, added to the shared counters once at its end.
  struct Tally {
    var reads: UInt64 = 0
    var writes: UInt64 = 0
    var flushes: UInt64 = 0
    var discards: UInt64 = 0
    var writeZeroes: UInt64 = 0
    var others: UInt64 = 0
    var readBytes: UInt64 = 0
    var writtenBytes: UInt64 = 0
    var failed: UInt64 = 0
    var unsupported: UInt64 = 0
    var retries: UInt64 = 0
  }

  /// - Parameter chainLimit: buffers in a chain at most, see `chainLimit(queueSize:)`.
  package init(
    engine: any BlockEngine, source: any GuestMemorySource, counters: BlockCounters, settings: BlockPumpSettings,
    writeback: WritebackSwitch = WritebackSwitch(), chainLimit: Int
  ) throws(VirtqueueFault) {
    self.engine = engine
    self.counters = counters
    self.writeback = writeback
    self.settings = settings
    geometry = engine.geometry
    serial = Array(settings.serial.prefix(20))
    direct = !settings.copiesAlways && engine.reachesGuestMemory && (source.isStable || engine.movesDataInSubmit)
    groupLimit = engine.movesDataInSubmit ? 16 : Self.batchLimit
    alignmentMask = UInt64(max(1, engine.memoryAlignment) - 1)
    memory = GuestMemoryView(source: source)
    var unused = QueueLayout()
    unused.size = 1
    queue = try Virtqueue(layout: unused, maximumSize: 1, chainLimit: 1, features: [], source: source)
    slab = OperationSlab(count: settings.slots, chainLimit: chainLimit)
    bounce = BouncePool(
      smallCount: settings.slots,
      largeCount: max(OperationSlab.buffersPerStep, settings.bounceBytes / BouncePool.largeBytes))
    staged = .allocate(capacity: settings.slots)
    waiting = .allocate(capacity: settings.slots)
    completions = .allocate(capacity: Self.completionCapacity)
  }

  deinit {
    staged.deallocate()
    waiting.deallocate()
    completions.deallocate()
  }

  /// Buffers that a chain may have: SEG_MAX with header and status, and as long as a driver that does not look at SEG_MAX may
  /// think of, within reason.
  package static func chainLimit(queueSize: UInt16) -> Int {
    max(BlockConfiguration.segmentsMaximum + 2, min(Int(queueSize), 1024))
  }

  // MARK: Life

  /// The driver's queue goes live.
  package mutating func activate(
    layout: QueueLayout, maximumSize: UInt16, features: FeatureBits, source: any GuestMemorySource
  ) throws(DeviceFault) {
    do throws(VirtqueueFault) {
      queue = try Virtqueue(
        layout: layout, maximumSize: maximumSize, chainLimit: slab.chainLimit, features: features, source: source)
    } catch {
      throw .virtqueue(error)
    }
    // virtio 1.2, 5.2.6.2: a driver that cannot flush gets write-through.
    isWriteThrough =
      settings.cache == .writethrough || settings.cache == .writeback && !features.contains(.blockFlush)
    followsDriver = features.contains(.blockConfigureWriteback)
    isActive = true
  }

  /// The store has another size: requests that are taken from now on are checked against it.
  package mutating func set(capacity: UInt64) { geometry.capacity = capacity }

  /// Ends the present life: from now on no guest memory is touched. What the engine still works on is completed into our own
  /// buffers and dropped; where it still reaches guest memory itself, it is waited for.
  package mutating func deactivate() {
    isActive = false
    submit()
    life &+= 1
    orphans &+= inFlight
    inFlight = 0
    // What waits for another try is in nobody's hands.
    for index in 0..<waitingCount { release(Int(waiting[index])) }
    waitingCount = 0
    retryAt = 0
    heldResult = 0
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

  /// Operations that the engine works on, those of an earlier life included.
  package var busyCount: Int { slab.busyCount }

  /// Where the queue stands: for whoever adopts it later. Meaningful when nothing is in flight.
  package var position: QueueLayout { queue.layout }

  /// Takes completions while no queue is live.
  private mutating func memoryFreeReap() {
    while true {
      let count = engine.reap(into: completions, capacity: Self.completionCapacity)
      for index in 0..<count { dropOrphan(Int(completions[index].tag)) }
      if count == 0 { break }
    }
    publishLoad()
  }

  private mutating func dropOrphan(_ slot: Int) {
    guard slot < slab.count else { return }
    release(slot)
    orphans &-= 1
  }

  mutating func release(_ slot: Int) {
    let numbers = slab.bounce(slot)
    for index in 0..<slab.records[slot].bufferCount { bounce.give(numbers[index]) }
    slab.records[slot].bufferCount = 0
    slab.give(slot)
  }

  // MARK: A batch

  /// Serves the queue: after a notification, a completion, an outcome of `more`, or when `retryAt` has come.
  package mutating func run(signals: any TransportSignals) throws(DeviceFault) -> Outcome {
    now = engine.now
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
    idle.wakes(at: now)
    do throws(VirtqueueFault) {
      try queue.prepare(invalidations: invalidations)
      if waitingCount > 0, heldResult == 0, now >= retryAt { tryAgain() }
      var budget = Self.batchLimit
      while true {
        queue.disableNotifications()
        // Without room the queue waits for completions, and notifications stay off.
        guard try serve(&budget, signals) else { return .idle }
        guard budget > 0 else { return .more }
        if pollForMore() { continue }
        guard queue.enableNotifications() else {
          idle.sleeps(at: engine.now)
          return .idle
        }
      }
    } catch {
      if case .badLayout = error { throw .memory }
      throw .virtqueue(error)
    }
  }

  /// Takes what is there, group by group, and publishes what is done.
  ///
  /// - Returns: false when a chain had to stay because a slot or a buffer is missing, or the queue is held.
  private mutating func serve(_ budget: inout Int, _ signals: any TransportSignals) throws(VirtqueueFault) -> Bool {
    reap()
    while true {
      let limit = min(budget, groupLimit)
      var left = limit
      let hasRoom = try take(&left)
      budget &-= limit &- left
      submit()
      reap()
      if queue.publish() { signals.interruptForUsedBuffers() }
      if !hasRoom || left > 0 || budget == 0 { return hasRoom }
    }
  }

  /// Watches the queue for the length of the poll window.
  ///
  /// - Returns: whether there is something to do.
  private mutating func pollForMore() -> Bool {
    guard settings.pollsWhenIdle, idle.window > 0 else { return queue.hasPending() }
    let end = engine.now &+ idle.window
    repeat {
      for _ in 0..<16 where queue.hasPending() { return true }
      // Completions are worth waking up for too, and are in reach here.
      if inFlight > 0 { return false }
    } while engine.now < end
    return false
  }

  private mutating func settle() {
    counters.reads.add(tally.reads)
    counters.writes.add(tally.writes)
    counters.flushes.add(tally.flushes)
    counters.discards.add(tally.discards)
    counters.writeZeroes.add(tally.writeZeroes)
    counters.others.add(tally.others)
    counters.readBytes.add(tally.readBytes)
    counters.writtenBytes.add(tally.writtenBytes)
    counters.failed.add(tally.failed)
    counters.unsupported.add(tally.unsupported)
    counters.retries.add(tally.retries)
    counters.batches.add(1)
    counters.translationHits.set(memory.hits)
    counters.translationMisses.set(memory.misses)
    publishLoad()
    tally = Tally()
  }

  /// What the watchdog and the operator see of the requests under way.
  private mutating func publishLoad() {
    counters.inFlight.store(UInt64(slab.busyCount), ordering: .relaxed)
    counters.waiting.store(UInt64(waitingCount), ordering: .relaxed)
    counters.oldestSince.store(slab.oldestSince, ordering: .relaxed)
  }

  /// Takes chains until the queue is empty or the budget is used up.
  ///
  /// - Returns: false when a chain had to stay because a slot or a buffer is missing, or the queue is held.
  private mutating func take(_ budget: inout Int) throws(VirtqueueFault) -> Bool {
    // What an earlier life left on its way to the disk must land before anything new is started on the same sectors.
    guard orphans == 0, heldResult == 0 else { return false }
    while budget > 0 {
      guard let slot = slab.take(at: now) else { return !queue.hasPending() }
      do throws(VirtqueueFault) {
        var chain = DescriptorChain(buffers: slab.buffers(slot))
        guard try queue.next(memory: &memory, into: &chain) else {
          slab.give(slot)
          return true
        }
        guard try begin(slot, chain) else {
          slab.give(slot)
          queue.putBack(chain.ticket)
          return false
        }
      } catch {
        slab.give(slot)
        throw error
      }
      budget &-= 1
    }
    return true
  }

  // MARK: Engine

  mutating func stage(_ slot: Int, offset: UInt64, length: UInt64, vectorCount: Int, mayUnmap: Bool = false) {
    slab.records[slot].vectorCount = vectorCount
    staged[stagedCount] = EngineRequest(
      operation: slab.records[slot].kind, tag: UInt32(truncatingIfNeeded: slot), offset: offset, length: length,
      vectors: slab.vectors(slot), vectorCount: vectorCount)
    // Read behind the chain's arrival: what the driver wrote before it made the chain available counts.
    staged[stagedCount].isDurable = isWriteThrough || followsDriver && !writeback.isOn
    staged[stagedCount].mayUnmap = mayUnmap
    stagedCount &+= 1
    inFlight &+= 1
  }

  mutating func submit() {
    guard stagedCount > 0 else { return }
    engine.submit(staged, count: stagedCount)
    stagedCount = 0
  }

  private mutating func reap() {
    while true {
      let count = engine.reap(into: completions, capacity: Self.completionCapacity)
      for index in 0..<count {
        let slot = Int(completions[index].tag)
        guard slot < slab.count else { continue }
        if slab.records[slot].life == life { finishStep(slot, completions[index].result) } else { dropOrphan(slot) }
      }
      // A full harvest may not be all; a step that goes on must be submitted.
      submit()
      if count < Self.completionCapacity { return }
    }
  }
}
