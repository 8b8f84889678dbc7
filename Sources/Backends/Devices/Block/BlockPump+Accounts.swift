/// What a pump counts: in a batch for itself, and once at its end for others.
extension BlockPump {
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
    var throttled: UInt64 = 0
    var interrupts: UInt64 = 0
    var suppressed: UInt64 = 0
    var adopted: UInt64 = 0
  }

  mutating func settle() {
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
    counters.throttled.add(tally.throttled)
    counters.adopted.add(tally.adopted)
    counters.shortages.set(slab.refusals)
    counters.interrupts.add(tally.interrupts)
    counters.interruptsSuppressed.add(tally.suppressed)
    counters.batches.add(1)
    counters.translationHits.set(memory.hits)
    counters.translationMisses.set(memory.misses)
    publishLoad()
    tally = Tally()
  }

  /// What the watchdog and the operator see of the requests under way.
  mutating func publishLoad() {
    counters.inFlight.store(UInt64(slab.busyCount), ordering: .relaxed)
    counters.waiting.store(UInt64(waitingCount), ordering: .relaxed)
    counters.oldestSince.store(slab.oldestSince, ordering: .relaxed)
  }
}
