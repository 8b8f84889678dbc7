import Devices
import TestSupport
import Testing
import Transport
import Virtqueue

/// How long a queue that ran empty is watched, and what that may cost.
@Suite struct IdlePollTests {
  // MARK: The value

  /// A driver whose next chain comes `gap` behind each answer; what the thread does with it, on a clock of its own.
  private struct Played {
    var idle: IdlePoll
    let sharers: UInt64
    var time: UInt64 = 1_000_000
    var watched: UInt64 = 0
    var futile: UInt64 = 0
    var found = 0
    var watches = 0

    init(sharers: Int = 1) {
      idle = IdlePoll(sharers: sharers)
      self.sharers = UInt64(sharers)
    }

    /// One chain: the watch if there is one, then its arrival, then `service` for it.
    mutating func chain(gap: UInt64, service: UInt64) {
      let start = time
      let window = idle.rests(at: start)
      if window > 0 {
        let isFound = gap <= window
        let length = min(gap, window)
        idle.watched(from: start, to: start + length, found: isFound)
        watches += 1
        watched += length
        if isFound { found += 1 } else { futile += length }
      }
      time = start + gap
      idle.arrives(at: time)
      time += service
    }
  }

  @Test(
    arguments: [
      // Time to the driver's next chain, whether it is watched for in the end, and for how long.
      (500, true), (20_000, true), (50_000, true), (90_000, true), (110_000, false), (1_000_000, false),
      (10_000_000_000, false),
    ] as [(UInt64, Bool)])
  func watchOpensForADriverThatComesSoon(gap: UInt64, isWatched: Bool) {
    var played = Played()
    // Its storage takes as long: so all of it can be paid for.
    for _ in 0..<40 { played.chain(gap: gap, service: max(gap, 10_000)) }
    let early = played.watches
    for _ in 0..<40 { played.chain(gap: gap, service: max(gap, 10_000)) }
    #expect((played.watches - early == 40) == isWatched)
    #expect((played.watches > 0) == isWatched)
    #expect(played.futile == 0)
  }

  @Test func nothingIsKnownOfADriverAtFirst() {
    var idle = IdlePoll()
    #expect(idle.rests(at: 1000) == 0)
  }

  /// What the thread does for one queue keeps it from the others.
  @Test(arguments: [1, 2, 4, 64]) func queuesOnOneThreadDivideTheLongestWatch(sharers: Int) {
    let limit = IdlePoll.maximum / UInt64(sharers)
    for (gap, isWatched) in [(limit / 2, true), (limit * 9 / 10, true), (limit * 11 / 10 + 1, false)] {
      var played = Played(sharers: sharers)
      for _ in 0..<60 { played.chain(gap: gap, service: 1_000_000) }
      #expect((played.watches > 0) == isWatched, "\(gap) of \(limit)")
      #expect(played.watched <= UInt64(played.watches) * limit)
    }
  }

  @Test func longPauseClosesTheWindowAtOnce() {
    var played = Played()
    for _ in 0..<40 { played.chain(gap: 10_000, service: 10_000) }
    let before = played.watches
    played.chain(gap: 1_000_000_000, service: 10_000)
    #expect(played.watches == before + 1)
    #expect(played.futile <= IdlePoll.maximum)
    for _ in 0..<3 { played.chain(gap: 1_000_000, service: 10_000) }
    #expect(played.watches == before + 1)
  }

  /// Completions, timers and packets wake the thread too, and say nothing of the driver.
  @Test func onlyChainsMakeARhythm() {
    var idle = IdlePoll()
    var time: UInt64 = 1_000_000
    for _ in 0..<100 {
      #expect(idle.rests(at: time) == 0)
      time += 2000  // the engine's own wake-up: no chain, and nothing done
      #expect(idle.rests(at: time) == 0)
      time += 1_000_000
      idle.arrives(at: time)
      time += 10_000
    }
    // An answer that comes later is the driver's from then on.
    #expect(idle.rests(at: time) == 0)
    let before = idle.expected
    time += 300_000
    idle.works()
    #expect(idle.rests(at: time) == 0)
    time += 8000
    idle.arrives(at: time)
    #expect(idle.expected < before)
  }

  @Test func thereIsOneWatchBetweenTwoChains() {
    var played = Played()
    for _ in 0..<40 { played.chain(gap: 10_000, service: 10_000) }
    var idle = played.idle
    let window = idle.rests(at: played.time)
    #expect(window > 0)
    idle.watched(from: played.time, to: played.time + window, found: false)
    #expect(idle.rests(at: played.time + window + 1000) == 0)
  }

  /// Whatever a driver does, also one that tries to keep the thread watching in vain.
  @Test(arguments: 1...20) func watchingTakesNoMoreThanItsShareOfACore(seed: UInt64) {
    var random = SeededGenerator(seed: seed)
    // Some of them have their thread with other queues together.
    var played = Played(sharers: [2, 1, 7, 1][Int(seed % 4)])
    let begun = played.time
    for _ in 0..<20_000 {
      let window = min(max(2 * played.idle.expected, IdlePoll.smallest), played.idle.limit)
      let gap: UInt64
      switch UInt64.random(in: 0..<3, using: &random) {
      // Soon, as late as is still found, and just behind the end of the watch: the dearest for the thread.
      case 0: gap = UInt64.random(in: 0...5000, using: &random)
      case 1: gap = window
      default: gap = seed % 2 == 0 ? window + 1 : UInt64.random(in: 0...2 * IdlePoll.longest, using: &random)
      }
      played.chain(gap: gap, service: UInt64.random(in: 0...2000, using: &random))
      let passed = played.time - begun
      let allowed = passed * IdlePoll.share / 100 / played.sharers + IdlePoll.burst
      let paid = played.watched - played.futile + IdlePoll.futilePrice * played.futile
      guard paid <= allowed else {
        #expect(paid <= allowed, "seed \(seed): \(played.watched) ns watched, \(played.futile) in vain, of \(passed)")
        return
      }
    }
    #expect(played.watches > 100, "seed \(seed): nothing was tried")
  }

  // MARK: The pump

  /// Completes at once, on a clock that moves by a microsecond with each look at it.
  private final class ClockEngine: BlockEngine {
    var time: UInt64 = 1_000_000
    var looks = 0
    /// What the driver does, and when.
    var due: (time: UInt64, action: () -> Void)?
    var onSubmit: () -> Void = {}
    private var done: [EngineCompletion] = []

    let geometry = BlockGeometry(capacity: 1 << 20)
    let reachesGuestMemory = true
    let movesDataInSubmit = false
    let memoryAlignment = 1
    let readiness: Int32 = -1
    var now: UInt64 {
      looks += 1
      time += 1000
      if let due, time >= due.time {
        self.due = nil
        due.action()
      }
      return time
    }
    func acknowledgeReadiness() {}
    func waitForCompletion() {}
    func abandon() {}
    func close() {}

    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      for index in 0..<count {
        done.append(EngineCompletion(tag: requests[index].tag, result: Int(requests[index].length)))
      }
      onSubmit()
    }

    func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
      let count = min(capacity, done.count)
      for index in 0..<count { completions[index] = done[index] }
      done.removeFirst(count)
      return count
    }
  }

  private final class NoSignals: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  private let fixture = QueueFixture(size: 8)
  private let engine = ClockEngine()

  private func makePump() throws -> BlockPump {
    var pump = try BlockPump(
      engine: engine, source: fixture.pool, counters: QueueCounters(), settings: BlockPumpSettings(),
      storage: JournalStorage(slotCount: 8, chainLimit: 8))
    try pump.activate(layout: fixture.layout, maximumSize: 8, features: [], source: fixture.pool)
    fixture.domain.memory.pointer(0x20000).initializeMemory(as: UInt8.self, repeating: 0, count: 16)
    fixture.descriptor(0, 0x20000, 16, flags: 1, next: 1)
    fixture.descriptor(1, 0x21000, 512, flags: 3, next: 2)
    fixture.descriptor(2, 0x22000, 1, flags: 2)
    return pump
  }

  private static let heads = [UInt16](repeating: 0, count: 8)

  private final class Published { var count: UInt16 = 1 }

  /// The driver makes a chain available now, and another one some time after each.
  private func comeAgain(after gap: UInt64, _ published: Published) {
    fixture.publish(Self.heads, index: published.count)
    engine.onSubmit = { [engine, fixture] in
      engine.due = (
        engine.time + gap,
        {
          published.count += 1
          fixture.publish(Self.heads, index: published.count)
        }
      )
    }
  }

  @Test func enginesWakeUpsOpenNoWindow() throws {
    var pump = try makePump()
    for round in 1...200 as ClosedRange<UInt16> {
      fixture.publish(Self.heads, index: round)
      for _ in 0..<2 {
        // The second time the engine's eventfd has woken the thread, for what was taken within the first.
        engine.looks = 0
        _ = try pump.run(signals: NoSignals())
        #expect(engine.looks <= 6, "round \(round): the queue was watched")
        engine.time += 2000
      }
      engine.time += 1_000_000
    }
    pump.close()
  }

  @Test func driverThatComesSoonNeedsNoNotification() throws {
    var pump = try makePump()
    let published = Published()
    comeAgain(after: 15_000, published)
    var runs = 0
    while published.count < 100 {
      _ = try pump.run(signals: NoSignals())
      runs += 1
      // Asleep until the driver's notification.
      if let due = engine.due { engine.time = max(engine.time, due.time) }
    }
    #expect(runs < 30, "\(runs) notifications for \(published.count) chains")
    engine.onSubmit = {}
    pump.close()
  }

  /// Memory that the guest gives back waits for the end of a run.
  @Test func watchingDoesNotMakeARunLong() throws {
    var pump = try makePump()
    let published = Published()
    comeAgain(after: 60_000, published)
    var longest: UInt64 = 0
    while published.count < 1000 {
      let start = engine.time
      _ = try pump.run(signals: NoSignals())
      longest = max(longest, engine.time - start)
      if let due = engine.due { engine.time = max(engine.time, due.time) }
    }
    #expect(longest > IdlePoll.longestRun / 2, "\(longest) ns: nothing was watched")
    #expect(longest < IdlePoll.longestRun + 2 * IdlePoll.maximum, "\(longest) ns")
    engine.onSubmit = {}
    pump.close()
  }
}
