/// Between the pump and its engine: what is staged goes out together, what is done comes back.
extension BlockPump {
  mutating func stage(_ slot: Int, offset: UInt64, length: UInt64, vectorCount: Int, mayUnmap: Bool = false) {
    // By pointers: record and request are large.
    let record = slab.records + slot
    record.pointee.vectorCount = vectorCount
    record.pointee.isWithEngine = true
    switch record.pointee.kind {
    case .read, .write:
      bytesInFlight &+= length
      stagedBytes &+= length
      budget.pay(bytes: length)
    case .discard, .writeZeroes, .secureErase: rangesInFlight &+= 1
    case .flush: break
    }
    if record.pointee.submittedAt == 0 { record.pointee.submittedAt = now }
    // Read behind the chain's arrival: what the driver wrote before it made the chain available counts.
    let isDurable = isWriteThrough || followsDriver && !writeback.isOn
    record.pointee.flushes = isDurable || record.pointee.kind == .flush
    var request = EngineRequest(
      operation: record.pointee.kind, tag: UInt32(truncatingIfNeeded: slot), offset: offset, length: length,
      vectors: slab.vectors(slot), vectorCount: vectorCount)
    request.isDurable = isDurable
    request.mayUnmap = mayUnmap
    (staged + stagedCount).initialize(to: request)
    stagedCount &+= 1
    inFlight &+= 1
  }

  /// The engine has a slot's step behind it.
  mutating func noteReturn(_ slot: Int) {
    let record = slab.records + slot
    record.pointee.isWithEngine = false
    switch record.pointee.kind {
    case .read, .write: bytesInFlight &-= record.pointee.stepBytes
    case .discard, .writeZeroes, .secureErase: rangesInFlight &-= 1
    case .flush: break
    }
  }

  mutating func submit() {
    guard stagedCount > 0 else { return }
    engine.submit(staged, count: stagedCount)
    stagedCount = 0
  }

  mutating func reap() {
    while true {
      let count = engine.reap(into: completions, capacity: Self.completionCapacity)
      // For the histograms: the batch's time is that of its start.
      if count > 0 { now = engine.now }
      for index in 0..<count {
        let slot = Int(completions[index].tag)
        guard slot < slab.count else { continue }
        if slab.records[slot].life == life {
          noteReturn(slot)
          finishStep(slot, completions[index].result)
        } else {
          dropOrphan(slot)
        }
      }
      // A full harvest may not be all; a step that goes on must be submitted, and where that moves its data nobody tells of its end.
      let mayBeDone = stagedCount > 0 && engineMovesData
      submit()
      if count < Self.completionCapacity && !mayBeDone { return }
    }
  }
}
