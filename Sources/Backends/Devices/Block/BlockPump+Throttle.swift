import Virtqueue

/// Requests and their rates (`RateNode`): who has to wait does so in a slot, without memory for its data, and reads do not wait for
/// writes.
extension BlockPump {
  /// Asks for a read or write.
  ///
  /// - Returns: false when it waits for its rate now.
  mutating func admit(_ slot: Int) -> Bool {
    let isWrite = slab.records[slot].kind != .read
    // Behind those that wait already.
    let isFirst = isWrite ? throttledWrites.isEmpty : throttledReads.isEmpty
    let time =
      isFirst ? rate.admit(isWrite: isWrite, bytes: slab.records[slot].dataBytes, at: now) : max(throttledUntil, 1)
    guard time != 0 else {
      slab.records[slot].isCharged = true
      slab.records[slot].admittedAt = now
      return true
    }
    throttle(slot)
    if isFirst { throttledUntil = throttledUntil == 0 ? time : min(throttledUntil, time) }
    tally.throttled &+= 1
    return false
  }

  /// Asks for a request that is answered at once, as a read of a few bytes.
  ///
  /// - Returns: false when its chain has to wait.
  mutating func admitSmall() -> Bool {
    guard isLimited else { return true }
    let time = rate.admit(isWrite: false, bytes: 20, at: now)
    guard time == 0 else {
      throttledUntil = throttledUntil == 0 ? time : min(throttledUntil, time)
      return false
    }
    rate.release()
    return true
  }

  /// Puts a request behind the others of its kind.
  mutating func throttle(_ slot: Int) {
    if slab.records[slot].kind != .read { throttledWrites.append(slot) } else { throttledReads.append(slot) }
  }

  /// Starts what waits as far as the rates allow by now.
  mutating func serveThrottled() {
    guard !(throttledReads.isEmpty && throttledWrites.isEmpty), heldResult == 0 else {
      if throttledUntil <= now { throttledUntil = 0 }
      return
    }
    throttledUntil = 0
    let reads = serveThrottled(isWrite: false)
    let writes = serveThrottled(isWrite: true)
    throttledUntil = reads == 0 ? writes : writes == 0 ? reads : min(reads, writes)
    submit()
  }

  /// - Returns: when the next one may go; 0 when none waits, or waits for a completion.
  private mutating func serveThrottled(isWrite: Bool) -> UInt64 {
    while let slot = isWrite ? throttledWrites.first : throttledReads.first {
      // Admitted before, when there was no memory for its data.
      if !slab.records[slot].isCharged {
        let time = rate.admit(isWrite: isWrite, bytes: slab.records[slot].dataBytes, at: now)
        guard time == 0 else { return time }
        slab.records[slot].isCharged = true
        slab.records[slot].admittedAt = now
      }
      // Memory comes back with completions only.
      guard startAdmitted(slot) else { return 0 }
      if isWrite { throttledWrites.removeFirst() } else { throttledReads.removeFirst() }
    }
    return 0
  }
}

/// Slots in a row, first in first out; no more than the slab has.
package struct SlotList: ~Copyable {
  private let slots: UnsafeMutablePointer<UInt32>
  private let capacity: Int
  private var start = 0
  private var count = 0

  init(capacity: Int) {
    self.capacity = capacity
    slots = .allocate(capacity: capacity)
  }

  deinit { slots.deallocate() }

  var isEmpty: Bool { count == 0 }
  var length: Int { count }
  var first: Int? { count == 0 ? nil : Int(slots[start]) }

  mutating func append(_ slot: Int) {
    var place = start &+ count
    if place >= capacity { place &-= capacity }
    slots[place] = UInt32(truncatingIfNeeded: slot)
    count &+= 1
  }

  mutating func removeFirst() {
    start &+= 1
    if start == capacity { start = 0 }
    count &-= 1
  }

  mutating func clear() {
    start = 0
    count = 0
  }
}
