import Transport
import Virtqueue

/// From the engine's answers to the guest's, and what happens in between when the storage fails.
extension BlockPump {
  private static var shortTransfer: Int { -5 }  // EIO
  private static var noSpace: Int { -28 }  // ENOSPC
  private static var notSupported: Int { -95 }  // EOPNOTSUPP
  private static var again: Int { -11 }  // EAGAIN
  /// A page of zeros. Unsafe: never written after this, never freed.
  nonisolated(unsafe) private static let zeros: UnsafeRawPointer = {
    let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
    page.initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
    return UnsafeRawPointer(page)
  }()

  mutating func finishStep(_ slot: Int, _ result: Int) {
    inFlight &-= 1
    let record = slab.records + slot
    switch record.pointee.kind {
    case .flush:
      guard result >= 0 else { return failStep(slot, result) }
      // It was another queue, or an earlier flush, that was told of the loss.
      complete(slot, flushFault.result == 0 ? .ok : .ioError)
    case .discard, .writeZeroes, .secureErase:
      if result == Self.notSupported { return complete(slot, .unsupported) }
      guard result >= 0 else { return failStep(slot, result) }
      record.pointee.failedSince = 0
      advanceRange(slot)
      if record.pointee.nextRange < record.pointee.rangeCount { unfinished.append(slot) } else { complete(slot, .ok) }
    case .read, .write:
      guard result >= 0, UInt64(result) == record.pointee.stepBytes else {
        // A store that takes a part of a write is full; one that gives a part of a read has shrunk.
        let reason = result < 0 ? result : record.pointee.kind == .write ? Self.noSpace : Self.shortTransfer
        return failStep(slot, reason)
      }
      if record.pointee.kind == .read {
        if record.pointee.bufferCount > 0 {
          guard copyToGuest(slot) else { return complete(slot, .ioError) }
        }
        record.pointee.written &+= UInt32(truncatingIfNeeded: record.pointee.stepBytes)
      }
      record.pointee.failedSince = 0
      record.pointee.doneBytes &+= record.pointee.stepBytes
      if record.pointee.doneBytes == record.pointee.dataBytes {
        complete(slot, .ok)
      } else if budget.allowsStep() {
        stageStep(slot)
      } else {
        unfinished.append(slot)
      }
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
  mutating func complete(_ slot: Int, _ status: BlockStatus) {
    // By a pointer: the record is large.
    let record = slab.records + slot
    if status == .ioError { tally.failed &+= 1 }
    if status == .unsupported { tally.unsupported &+= 1 }
    var written = record.pointee.written
    do throws(GuestMemoryFault) {
      // A read that went well has filled its buffers.
      if status != .ok || record.pointee.kind != .read { written = fill(slot, from: status == .ok ? written &- 1 : 0) }
      if let place = try memory.piece(record.pointee.statusAddress, 1) {
        place.storeBytes(of: status.rawValue, as: UInt8.self)
      } else {
        var byte = status.rawValue
        try memory.copyOut(from: &byte, to: record.pointee.statusAddress, count: 1)
      }
    } catch {
      written = 0  // nowhere to say it; the used element alone tells the driver that the request is over
    }
    queue.pushUsed(record.pointee.ticket, length: written)
    releaseMeans(slot)
    if record.pointee.submittedAt != 0 { recordLatency(slot) }
  }

  /// Zeros in what is left of the memory that the device may write, up to the status: a driver that has its buffers copied shows its user
  /// what is there, whatever the status says (`fills` in PROTOCOL.md). Chains beyond the promised size stay as they are, so that the
  /// work is bounded.
  ///
  /// - Parameter done: bytes of the data that are written already.
  /// - Returns: bytes from the first on that are written then, with the status if there is no gap before it.
  private mutating func fill(_ slot: Int, from done: UInt32) -> UInt32 {
    let record = slab.records + slot
    let buffers = slab.buffers(slot) + record.pointee.readableCount
    // Of writes and flushes there is the status alone.
    if record.pointee.writableCount == 1, buffers.pointee.length == 1 { return 1 }
    var data: UInt64 = 0
    for index in 0..<record.pointee.writableCount { data &+= UInt64(buffers[index].length) }
    data &-= 1
    guard UInt64(done) < data else { return done &+ 1 }
    guard data < XenbusOffer.filledBytes else { return done }
    var cursor = ChainCursor(buffers, count: record.pointee.writableCount)
    cursor.skip(UInt64(done))
    var rest = Int(truncatingIfNeeded: data &- UInt64(done))
    do throws(GuestMemoryFault) {
      while rest > 0, let run = cursor.take(min(rest, 4096)) {
        try memory.copyOut(from: Self.zeros, to: run.address, count: Int(run.length))
        rest &-= Int(run.length)
      }
    } catch {
      return done  // no memory of the guest's that could show anything
    }
    return UInt32(truncatingIfNeeded: data &+ 1)
  }

  private mutating func recordLatency(_ slot: Int) {
    let record = slab.records + slot
    let operation: QueueLatencies.Operation =
      switch record.pointee.kind {
      case .read: .read
      case .write: .write
      case .flush: .flush
      case .discard, .writeZeroes, .secureErase: .other
      }
    let taken = slab.since(slot)
    let submitted = record.pointee.submittedAt
    var admitted = taken
    if record.pointee.admittedAt != 0 {
      admitted = record.pointee.admittedAt
      latencies.record(operation, .throttle, admitted &- taken)
    }
    // Most requests go to the engine at once: only those that had to wait are counted here.
    if submitted != admitted { latencies.record(operation, .queue, submitted &- admitted) }
    latencies.record(operation, engine: now &- submitted, total: now &- taken)
  }

  // MARK: Failures

  /// The store failed a step: its request is answered, or waits for another try, as the policy says.
  private mutating func failStep(_ slot: Int, _ result: Int) {
    if settings.stopsWhenStorageIsGone, BlockErrorPolicy.meansGone(result) {
      goneResult = result
      return
    }
    // EAGAIN is the engine's own: nothing was flushed.
    let isLost = slab.records[slot].flushes && !engine.canRetryFlush && result != Self.again
    if isLost { flushFault.note(result) }
    if isLost, slab.records[slot].kind == .flush { return complete(slot, .ioError) }
    switch settings.errors.action(for: result) {
    case .report: return complete(slot, .ioError)
    case .retry(let milliseconds):
      if slab.records[slot].failedSince == 0 { slab.records[slot].failedSince = now }
      guard now &- slab.records[slot].failedSince < milliseconds &* 1_000_000 else { return complete(slot, .ioError) }
      if retryAt == 0 { retryAt = now &+ settings.errors.retryPause &* 1_000_000 }
    case .hold:
      if heldResult == 0 { heldResult = result }
    }
    waiting[waitingCount] = UInt32(truncatingIfNeeded: slot)
    waitingCount &+= 1
  }

  /// Ends a hold: what waits is tried again by the next `run`, and the queue goes on.
  package mutating func resume() {
    heldResult = 0
    retryAt = 0
  }

  /// Stages the steps that failed once more.
  mutating func tryAgain() {
    retryAt = 0
    let count = waitingCount
    waitingCount = 0
    tally.retries &+= UInt64(count)
    for index in 0..<count { stageAgain(Int(waiting[index])) }
    goOn()
    submit()
  }

  private mutating func stageAgain(_ slot: Int) {
    let record = slab.records + slot
    switch record.pointee.kind {
    case .flush: stage(slot, offset: 0, length: 0, vectorCount: 0)
    case .discard, .writeZeroes, .secureErase: unfinished.append(slot)
    case .read, .write:
      if record.pointee.bufferCount > 0 {
        // The data of a write is still in its bounce buffers.
        return stage(
          slot, offset: record.pointee.offset &+ record.pointee.doneBytes, length: record.pointee.stepBytes,
          vectorCount: record.pointee.vectorCount)
      }
      // The guest's memory may be mapped elsewhere by now.
      stageStep(slot)
    }
  }
}
