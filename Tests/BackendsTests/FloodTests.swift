import DeviceHost
import Devices
import EventLoop
import Glibc
import Lifecycle
import SimulatedXen
import Synchronization
import TestSupport
import Testing

/// Under a driver that never lets a queue run dry, whatever somebody wants of its device takes effect within so many chains
/// (`FloodStage.patience`), for every queue of every type. Chains are counted rather than time; the watchdog of `eventually` is the only limit
/// in seconds.
@Suite(.serialized) struct FloodTests {
  /// Of several tries the quickest counts: this thread may be away from the processor between its two looks, in which the flood goes on.
  private func expectPatience(_ tries: [Int], _ what: String) {
    #expect(tries.min() ?? 0 <= FloodStage.patience, "\(what) waited for so many chains: \(tries)")
  }

  private func underFlood(_ kind: FloodKind, _ body: (FloodStage) throws -> Void) throws {
    let stage = try FloodStage(kind)
    defer {
      stage.stopFlood()
      stage.fixture.stop()
    }
    #expect(stage.goesOn())
    try body(stage)
  }

  @Test(arguments: FloodKind.allCases) func jobsOfAFloodedDevicesThreadAreDoneInTime(kind: FloodKind) throws {
    try underFlood(kind) { stage in
      expectPatience((0..<20).map { _ in stage.chains { stage.fixture.perform {} } }, "jobs")
      // Nothing piles up in the thread's mailbox meanwhile.
      for _ in 0..<1000 { #expect(stage.fixture.jobsWaiting <= 4) }
      #expect(stage.goesOn())
    }
  }

  /// What the watchdog goes by, of every pump: since when its thread is in a batch, and that it has come back.
  @Test(arguments: FloodKind.allCases) func everyBatchSaysWhenItBeganAndThatItIsOver(kind: FloodKind) throws {
    try underFlood(kind) { stage in
      let counters = stage.fixture.backend.counters
      @Sendable func isInBatch() -> Bool { counters.contains { $0.batchSince.load(ordering: .relaxed) != 0 } }
      // In the middle of a batch: memory that it needs is mapped.
      let seen = Mutex<[Bool]>([])
      stage.fixture.domain.beforeMapping.withLock { $0 = { seen.withLock { $0.append(isInBatch()) } } }
      stage.fixture.pool.invalidate()
      #expect(eventually { seen.withLock { !$0.isEmpty } })
      stage.fixture.domain.beforeMapping.withLock { $0 = nil }
      #expect(seen.withLock { $0.allSatisfy { $0 } }, "its batches are seen by nobody")
      stage.stopFlood()
      #expect(eventually { !isInBatch() }, "its thread looks as if it hung")
    }
  }

  @Test(arguments: FloodKind.allCases) func ballooningGuestWaitsForABatchOfItsFloodAtMost(kind: FloodKind) throws {
    try underFlood(kind) { stage in
      expectPatience((0..<20).map { _ in stage.chains { stage.fixture.pool.invalidate() } }, "invalidations")
      #expect(stage.fixture.pool.statistics.mappedPages < 4096)
      // The mappings come back.
      #expect(stage.goesOn())
    }
  }

  @Test(arguments: FloodKind.allCases) func resetUnderAFloodReturnsInTimeAndNothingIsWrittenBehindIt(kind: FloodKind)
    throws
  {
    let tries = try (0..<3).map { _ in
      var count = 0
      try underFlood(kind) { stage in
        count = stage.chains { stage.onTheGuestsThread { stage.fixture.driver.reset() } }
        stage.stopFlood()
        let before = stage.rings
        stage.fixture.settle()
        #expect(stage.rings == before)
        #expect(stage.fixture.driver.status == 0)
      }
      return count
    }
    expectPatience(tries, "resets")
  }

  /// The link of a network device, the size of a disk; the others have nothing to change, and say so in time.
  @Test(arguments: FloodKind.allCases) func changesByTheOperatorTakeEffectUnderAFlood(kind: FloodKind) throws {
    try underFlood(kind) { stage in
      let backend = stage.fixture.backend
      var size = 1 << 20
      func change(_ isUp: Bool) -> Int {
        size += 1 << 20
        let answered = Latch()
        let outcome = Mutex<Adjustment.Outcome?>(nil)
        let count = stage.chains {
          backend.adjust(kind.isNetwork ? .link(isUp: isUp) : .resize(bytes: UInt64(size))) { result in
            outcome.withLock { $0 = result }
            answered.open()
          }
          answered.wait()
          // Behind it, what the device's thread was told.
          stage.fixture.perform {}
        }
        switch outcome.withLock({ $0 }) {
        case .done(let words): #expect(words == (kind.isNetwork ? (isUp ? "up" : "down") : "\(size) bytes"))
        case .failed: #expect(!kind.isNetwork && !kind.isDisk)
        case nil: Issue.record("no answer")
        }
        return count
      }
      expectPatience((0..<10).map { change($0 % 2 == 1) }, "changes")
      if kind.isDisk { #expect(backend.capacity == UInt64(size)) }
      #expect(stage.goesOn())
      guard kind == .packetsSent || kind == .packetsReceived else { return }
      // With the link down not one more packet passes.
      let dropped = stage.fixture.account.all.map { $0.counters.drops(.linkDown) }
      let before = dropped.reduce(0) { $0 + $1.value }
      _ = change(false)
      // The host goes on until one has come: it may be slower than the change.
      #expect(eventually { dropped.reduce(0) { $0 + $1.value } > before })
      stage.quietenHost()
      stage.fixture.settle()
    }
  }

  @Test(arguments: FloodKind.allCases.filter { $0 != .networkCommands && $0 != .consoleMessages })
  func rateLimitHoldsAFloodBackInTimeAndLetsItGo(kind: FloodKind) throws {
    try underFlood(kind) { stage in
      var limits = RateLimits()
      (limits.readOperations, limits.writeOperations) = (1, 1)
      let tries = (0..<5).map { _ in
        let count = stage.chains {
          stage.fixture.backend.set(limits: limits)
          // What waits for its time leaves the thread nothing to do, whatever more the driver wants.
          stage.fixture.perform {}
          if kind != .packetsReceived && kind != .consoleOutput { stage.fixture.settle() }
        }
        guard kind != .consoleOutput else {
          // A console never waits: what is too much is dropped and counted.
          let dropped = stage.fixture.account.queue(1).counters.drops(.rate)
          let before = dropped.value
          #expect(eventually { dropped.value > before })
          stage.fixture.backend.set(limits: RateLimits())
          return count
        }
        let held = stage.flood.answered
        for _ in 0..<200 { stage.fixture.perform {} }
        // What had begun, and one a second.
        #expect(stage.flood.answered - held <= 2 * Int(FloodStage.queueSize))
        stage.fixture.backend.set(limits: RateLimits())
        #expect(stage.goesOn())
        return count
      }
      expectPatience(tries, "limits")
    }
  }

  @Test(arguments: FloodKind.allCases) func detachUnderAFloodEndsInTimeAndLeavesNothingMapped(kind: FloodKind) throws {
    let tries = try (0..<3).map { _ in
      let stage = try FloodStage(kind)
      #expect(stage.goesOn())
      let count = stage.chains { stage.onTheGuestsThread { stage.fixture.stop() } }
      stage.stopFlood()
      #expect(stage.fixture.domain.usage.mappings == 0)
      return count
    }
    expectPatience(tries, "detaching")
  }

  /// The end of a daemon, or of a backend that is exchanged: the driver is not asked, and the next backend goes on with its flood.
  @Test(arguments: FloodKind.allCases) func shutdownUnderAFloodEndsInTimeAndTheNextBackendGoesOn(kind: FloodKind) throws
  {
    try underFlood(kind) { stage in
      let tries = try (0..<3).map { _ in
        let before = stage.flood.answered
        var count = 0
        try stage.onTheGuestsThread {
          try stage.fixture.exchange { count = stage.flood.answered - before }
        }
        #expect(stage.goesOn())
        return count
      }
      expectPatience(tries, "shutdowns")
      #expect(stage.fixture.faults.all.isEmpty)
    }
  }
}
