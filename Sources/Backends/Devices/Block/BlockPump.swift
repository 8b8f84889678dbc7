package import Transport
package import Virtqueue

/// The data path of one block queue: descriptor chains in, engine operations out, completions back.
///
/// Confined to the device's data thread. A batch is one call of `run`; within it nothing is allocated, locked or reference
/// counted per request. The stages of a request: `take` (chain -> request -> operation), `stage` (one step of it becomes an
/// engine request), `finishStep` (the engine's answer), `complete` (status byte and used element).
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
  private let geometry: BlockGeometry
  private let counters: BlockCounters
  private let serial: [UInt8]
  /// Data moves straight between guest memory and the store.
  private let direct: Bool
  private let alignmentMask: UInt64

  private var memory: GuestMemoryView
  private var queue: SplitVirtqueue
  private var slab: OperationSlab
  private var bounce: BouncePool
  private let staged: UnsafeMutablePointer<EngineRequest>
  private var stagedCount = 0
  private let completions: UnsafeMutablePointer<EngineCompletion>
  private static var completionCapacity: Int { 64 }

  /// Whether the queue is live.
  package private(set) var isActive = false
  private var life: UInt32 = 0
  /// Operations of the present life, and those that an earlier one left behind.
  private var inFlight = 0
  private var orphans = 0
  private var tally = Tally()
  private var idle = IdlePoll()
  private let pollsWhenIdle: Bool

  /// Counts of a batch, added to the shared counters once at its end.
  private struct Tally {
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
  }

  /// - Parameters:
  ///   - serial: answer to GET_ID, at most 20 bytes.
  ///   - queueSize: entries of the queue at most.
  ///   - pollsWhenIdle: see `IdlePoll`; off where driver and device share a thread.
  ///   - bounceBytes: memory for data on its way, where the engine cannot reach guest memory itself.
  package init(
    engine: any BlockEngine, source: any GuestMemorySource, counters: BlockCounters, serial: [UInt8],
    queueSize: Int, bounceBytes: Int, copiesAlways: Bool = false, pollsWhenIdle: Bool = true
  ) throws(VirtqueueFault) {
    self.engine = engine
    self.counters = counters
    geometry = engine.geometry
    self.serial = Array(serial.prefix(20))
    self.pollsWhenIdle = pollsWhenIdle
    direct = !copiesAlways && engine.reachesGuestMemory && (source.isStable || engine.movesDataInSubmit)
    groupLimit = engine.movesDataInSubmit ? 16 : Self.batchLimit
    alignmentMask = UInt64(max(1, engine.memoryAlignment) - 1)
    memory = GuestMemoryView(source: source)
    var unused = QueueLayout()
    unused.size = 1
    queue = try SplitVirtqueue(layout: unused, maximumSize: 1, chainLimit: 1, features: [], source: source)
    let chainLimit = max(queueSize, BlockConfiguration.segmentsMaximum + 2)
    slab = OperationSlab(count: queueSize, chainLimit: chainLimit)
    bounce = BouncePool(
      smallCount: queueSize, largeCount: max(OperationSlab.buffersPerStep, bounceBytes / BouncePool.largeBytes))
    staged = .allocate(capacity: queueSize)
    completions = .allocate(capacity: Self.completionCapacity)
  }

  deinit {
    staged.deallocate()
    completions.deallocate()
  }

  // MARK: Life

  /// The driver's queue goes live.
  package mutating func activate(
    layout: QueueLayout, maximumSize: UInt16, features: FeatureBits, source: any GuestMemorySource
  ) throws(DeviceFault) {
    do throws(VirtqueueFault) {
      queue = try SplitVirtqueue(
        layout: layout, maximumSize: maximumSize, chainLimit: slab.chainLimit, features: features, source: source)
    } catch {
      throw .virtqueue(error)
    }
    isActive = true
  }

  /// Ends the present life: from now on no guest memory is touched. What the engine still works on is completed into our own
  /// buffers and dropped; where it still reaches guest memory itself, it is waited for.
  package mutating func deactivate() {
    isActive = false
    submit()
    life &+= 1
    orphans &+= inFlight
    inFlight = 0
    if direct && !engine.movesDataInSubmit { drain() }
    queue.forgetRings()
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
  package var position: (available: UInt16, used: UInt16) { (queue.layout.nextAvailable, queue.layout.nextUsed) }

  /// Takes completions while no queue is live.
  private mutating func memoryFreeReap() {
    while true {
      let count = engine.reap(into: completions, capacity: Self.completionCapacity)
      for index in 0..<count { dropOrphan(Int(completions[index].tag)) }
      if count == 0 { return }
    }
  }

  private mutating func dropOrphan(_ slot: Int) {
    guard slot < slab.count else { return }
    release(slot)
    orphans &-= 1
  }

  private mutating func release(_ slot: Int) {
    let numbers = slab.bounce(slot)
    for index in 0..<slab.records[slot].bufferCount { bounce.give(numbers[index]) }
    slab.records[slot].bufferCount = 0
    slab.give(slot)
  }

  // MARK: A batch

  /// Serves the queue: after a notification, a completion, or an outcome of `more`.
  package mutating func run(signals: any TransportSignals) throws(DeviceFault) -> Outcome {
    guard isActive else {
      memoryFreeReap()
      return .idle
    }
    let invalidations = memory.enter()
    defer {
      memory.leave()
      settle()
    }
    idle.wakes(at: engine.now)
    do throws(VirtqueueFault) {
      try queue.prepare(invalidations: invalidations)
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
  /// - Returns: false when a chain had to stay because a slot or a buffer is missing.
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
    guard pollsWhenIdle, idle.window > 0 else { return queue.hasPending() }
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
    counters.batches.add(1)
    counters.translationHits.set(memory.hits)
    counters.translationMisses.set(memory.misses)
    counters.inFlight.store(UInt64(slab.busyCount), ordering: .relaxed)
    tally = Tally()
  }

  /// Takes chains until the queue is empty or the budget is used up.
  ///
  /// - Returns: false when a chain had to stay because a slot or a buffer is missing.
  private mutating func take(_ budget: inout Int) throws(VirtqueueFault) -> Bool {
    // What an earlier life left on its way to the disk must land before anything new is started on the same sectors.
    guard orphans == 0 else { return false }
    while budget > 0 {
      guard slab.freeCount > 0 else { return !queue.hasPending() }
      guard let head = try queue.popHead() else { return true }
      guard let slot = slab.take() else { return false }
      do throws(VirtqueueFault) {
        var chain = DescriptorChain(buffers: slab.buffers(slot))
        try queue.read(head: head, memory: &memory, into: &chain)
        guard try begin(slot, chain) else {
          slab.give(slot)
          queue.unpop(head)
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

  /// Starts the request in a slot.
  ///
  /// - Returns: false when no bounce buffer is left.
  private mutating func begin(_ slot: Int, _ chain: DescriptorChain) throws(VirtqueueFault) -> Bool {
    guard let statusAddress = BlockRequest.statusAddress(chain) else { throw .requestTooShort }
    slab.records[slot] = BlockOperationRecord(
      life: life, head: chain.head, statusAddress: statusAddress, readableCount: chain.readableCount,
      writableCount: chain.writableCount, written: 1)
    let request: BlockRequest
    do throws(GuestMemoryFault) {
      request = try BlockRequest.parse(chain, memory: &memory)
    } catch {
      complete(slot, .ioError)
      return true
    }
    slab.records[slot].dataBytes = request.dataBytes
    switch request.kind {
    case .read: return transfer(slot, .read, request)
    case .write: return transfer(slot, .write, request)
    case .flush:
      tally.flushes &+= 1
      slab.records[slot].kind = .flush
      stage(slot, offset: 0, length: 0, vectorCount: 0)
    case .discard, .writeZeroes: beginRanges(slot, request)
    case .getID: answerID(slot)
    case .unknown:
      tally.others &+= 1
      complete(slot, .unsupported)
    }
    return true
  }

  // MARK: Reads and writes

  private mutating func transfer(_ slot: Int, _ operation: BlockOperation, _ request: BlockRequest) -> Bool {
    let block = UInt64(geometry.logicalBlock)
    guard BlockRequest.isOnDisk(sector: request.sector, bytes: request.dataBytes, capacity: geometry.capacity),
      request.dataBytes % block == 0,
      (request.sector &* BlockConfiguration.sectorSize) % block == 0, request.dataBytes > 0,
      request.dataBytes < 1 << 31, operation == .read || !geometry.readOnly
    else {
      complete(slot, .ioError)
      return true
    }
    slab.records[slot].kind = operation
    slab.records[slot].offset = request.sector &* BlockConfiguration.sectorSize
    if direct, let vectors = directVectors(slot) {
      slab.records[slot].stepBytes = request.dataBytes
      count(operation, request.dataBytes)
      stage(slot, offset: slab.records[slot].offset, length: request.dataBytes, vectorCount: vectors)
      return true
    }
    guard takeBuffers(slot, request.dataBytes) else { return false }
    count(operation, request.dataBytes)
    stageTransfer(slot)
    return true
  }

  private mutating func count(_ operation: BlockOperation, _ bytes: UInt64) {
    if operation == .read {
      tally.reads &+= 1
      tally.readBytes &+= bytes
    } else {
      tally.writes &+= 1
      tally.writtenBytes &+= bytes
    }
  }

  /// Bounce buffers for the first step: as many as the data needs, or as many as there are.
  private mutating func takeBuffers(_ slot: Int, _ bytes: UInt64) -> Bool {
    let numbers = slab.bounce(slot)
    var taken = 0
    var rest = bytes
    while rest > 0, taken < OperationSlab.buffersPerStep, let buffer = bounce.take(bytes: rest) {
      numbers[taken] = buffer
      taken &+= 1
      rest &-= min(rest, UInt64(bounce.bytes(buffer)))
    }
    slab.records[slot].bufferCount = taken
    return taken > 0
  }

  /// The guest's data buffers as vectors, when the engine can use all of them.
  private mutating func directVectors(_ slot: Int) -> Int? {
    var cursor = dataCursor(slot)
    let vectors = slab.vectors(slot)
    var count = 0
    var rest = slab.records[slot].dataBytes
    while rest > 0, let run = cursor.take(Int(truncatingIfNeeded: rest)) {
      var done: UInt32 = 0
      while done < run.length {
        guard count < slab.chainLimit else { return nil }
        guard
          let (pointer, length) = try? memory.translate(
            run.address &+ UInt64(done), Int(run.length &- done)),
          (UInt64(UInt(bitPattern: pointer)) | UInt64(length)) & alignmentMask == 0
        else { return nil }
        vectors[count] = DataVector(start: pointer, length: length)
        count &+= 1
        done &+= UInt32(truncatingIfNeeded: length)
      }
      rest &-= UInt64(run.length)
    }
    return count
  }

  /// A cursor over the data of a request: behind the header of a write, before the status byte of a read.
  private func dataCursor(_ slot: Int) -> ChainCursor {
    let record = slab.records + slot
    let buffers = slab.buffers(slot)
    if record.pointee.kind == .read {
      return ChainCursor(buffers + record.pointee.readableCount, count: record.pointee.writableCount)
    }
    var cursor = ChainCursor(buffers, count: record.pointee.readableCount)
    cursor.skip(UInt64(BlockRequest.headerBytes))
    return cursor
  }

  /// One step of a transfer through the bounce buffers of its slot.
  private mutating func stageTransfer(_ slot: Int) {
    let record = slab.records + slot
    let numbers = slab.bounce(slot)
    let vectors = slab.vectors(slot)
    var rest = record.pointee.dataBytes &- record.pointee.doneBytes
    var count = 0
    var cursor = dataCursor(slot)
    let copies = record.pointee.kind == .write
    if copies { cursor.skip(record.pointee.doneBytes) }
    record.pointee.stepBytes = 0
    while count < record.pointee.bufferCount, rest > 0 {
      let start = bounce.start(numbers[count])
      let length = Int(truncatingIfNeeded: min(rest, UInt64(bounce.bytes(numbers[count]))))
      if copies {
        do throws(GuestMemoryFault) {
          _ = try cursor.read(&memory, to: start, count: length)
        } catch {
          return complete(slot, .ioError)
        }
      }
      vectors[count] = DataVector(start: start, length: length)
      rest &-= UInt64(length)
      record.pointee.stepBytes &+= UInt64(length)
      count &+= 1
    }
    stage(
      slot, offset: record.pointee.offset &+ record.pointee.doneBytes, length: record.pointee.stepBytes,
      vectorCount: count)
  }

  // MARK: Discard, write zeroes, identification

  private mutating func beginRanges(_ slot: Int, _ request: BlockRequest) {
    let isDiscard = request.kind == .discard
    if isDiscard { tally.discards &+= 1 } else { tally.writeZeroes &+= 1 }
    let count = Int(truncatingIfNeeded: min(request.dataBytes / 16, UInt64(BlockConfiguration.rangesMaximum) + 1))
    guard request.dataBytes % 16 == 0, count > 0, count <= BlockConfiguration.rangesMaximum, !geometry.readOnly else {
      return complete(slot, .ioError)
    }
    guard !isDiscard || geometry.canDiscard else { return complete(slot, .unsupported) }
    slab.records[slot].kind = isDiscard ? .discard : .writeZeroes
    var cursor = dataCursor(slot)
    for index in 0..<count {
      // struct virtio_blk_discard_write_zeroes: sector u64, num_sectors u32, flags u32
      var words: (UInt64, UInt64) = (0, 0)
      var fault = false
      withUnsafeMutableBytes(of: &words) { bytes in
        guard let start = bytes.baseAddress else { return }
        do throws(GuestMemoryFault) {
          fault = try cursor.read(&memory, to: start, count: 16) != 16
        } catch {
          fault = true
        }
      }
      let sector = UInt64(littleEndian: words.0)
      let second = UInt64(littleEndian: words.1)
      let sectors = UInt32(truncatingIfNeeded: second)
      let flags = UInt32(truncatingIfNeeded: second >> 32)
      // The flag UNMAP belongs to write zeroes alone; unknown ones are refused (virtio 1.2, 5.2.6.2).
      guard flags & ~(isDiscard ? 0 : 1) == 0 else { return complete(slot, .unsupported) }
      let bytes = UInt64(sectors) &* BlockConfiguration.sectorSize
      guard !fault, sectors <= BlockConfiguration.rangeSectorsMaximum,
        BlockRequest.isOnDisk(sector: sector, bytes: bytes, capacity: geometry.capacity)
      else { return complete(slot, .ioError) }
      slab.ranges(slot)[index] = (sector &* BlockConfiguration.sectorSize, bytes)
    }
    slab.records[slot].rangeCount = count
    stageRange(slot)
  }

  private mutating func stageRange(_ slot: Int) {
    let range = slab.ranges(slot)[slab.records[slot].nextRange]
    slab.records[slot].nextRange &+= 1
    stage(slot, offset: range.0, length: range.1, vectorCount: 0)
  }

  private mutating func answerID(_ slot: Int) {
    tally.others &+= 1
    let record = slab.records[slot]
    var cursor = ChainCursor(slab.buffers(slot) + record.readableCount, count: record.writableCount)
    let room = Int(truncatingIfNeeded: min(record.dataBytes, 20))
    var identifier: (UInt64, UInt64, UInt32) = (0, 0, 0)
    var fault = false
    withUnsafeMutableBytes(of: &identifier) { bytes in
      guard let start = bytes.baseAddress else { return }
      for index in 0..<serial.count { bytes[index] = serial[index] }
      do throws(GuestMemoryFault) {
        _ = try cursor.write(&memory, from: start, count: room)
      } catch {
        fault = true
      }
    }
    slab.records[slot].written = UInt32(truncatingIfNeeded: room &+ 1)
    complete(slot, fault ? .ioError : .ok)
  }

  // MARK: Engine

  private mutating func stage(_ slot: Int, offset: UInt64, length: UInt64, vectorCount: Int) {
    staged[stagedCount] = EngineRequest(
      operation: slab.records[slot].kind, tag: UInt32(truncatingIfNeeded: slot), offset: offset, length: length,
      vectors: slab.vectors(slot), vectorCount: vectorCount)
    stagedCount &+= 1
    inFlight &+= 1
  }

  private mutating func submit() {
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

  private mutating func finishStep(_ slot: Int, _ result: Int) {
    inFlight &-= 1
    let record = slab.records + slot
    switch record.pointee.kind {
    case .flush: complete(slot, result >= 0 ? .ok : .ioError)
    case .discard, .writeZeroes:
      if result == -95 { return complete(slot, .unsupported) }  // EOPNOTSUPP
      guard result >= 0 else { return complete(slot, .ioError) }
      guard record.pointee.nextRange < record.pointee.rangeCount else { return complete(slot, .ok) }
      stageRange(slot)
    case .read, .write:
      // A short transfer means that the store shrank under us.
      guard result >= 0, UInt64(result) == record.pointee.stepBytes else { return complete(slot, .ioError) }
      if record.pointee.kind == .read {
        if record.pointee.bufferCount > 0 {
          guard copyToGuest(slot) else { return complete(slot, .ioError) }
        }
        record.pointee.written &+= UInt32(truncatingIfNeeded: record.pointee.stepBytes)
      }
      record.pointee.doneBytes &+= record.pointee.stepBytes
      if record.pointee.doneBytes == record.pointee.dataBytes { complete(slot, .ok) } else { stageTransfer(slot) }
    }
  }

  private mutating func copyToGuest(_ slot: Int) -> Bool {
    let record = slab.records[slot]
    let numbers = slab.bounce(slot)
    var cursor = dataCursor(slot)
    cursor.skip(record.doneBytes)
    var rest = record.stepBytes
    var index = 0
    while rest > 0, index < record.bufferCount {
      let length = Int(truncatingIfNeeded: min(rest, UInt64(bounce.bytes(numbers[index]))))
      do throws(GuestMemoryFault) {
        guard try cursor.write(&memory, from: bounce.start(numbers[index]), count: length) == length else {
          return false
        }
      } catch {
        return false
      }
      rest &-= UInt64(length)
      index &+= 1
    }
    return true
  }

  /// Answers a request: status byte, used element.
  private mutating func complete(_ slot: Int, _ status: BlockStatus) {
    let record = slab.records[slot]
    if status == .ioError { tally.failed &+= 1 }
    if status == .unsupported { tally.unsupported &+= 1 }
    var byte = status.rawValue
    var written = status == .ok ? record.written : 1
    do throws(GuestMemoryFault) {
      try memory.copyOut(from: &byte, to: record.statusAddress, count: 1)
    } catch {
      written = 0  // nowhere to say it; the used element alone tells the driver that the request is over
    }
    queue.pushUsed(head: record.head, length: written)
    release(slot)
  }
}
