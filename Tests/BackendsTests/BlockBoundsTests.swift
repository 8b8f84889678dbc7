import Devices
import Lifecycle
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue

/// What one block request may take of its thread, its store and its limits at a time, whatever it asks for.
@Suite struct BlockBoundsTests {
  /// Keeps what it is given until it is told to complete it; or completes it at once, as buffered I/O does.
  private final class KeepingEngine: BlockEngine {
    var kept: [EngineRequest] = []
    /// Of everything that was submitted.
    var submitted: [EngineRequest] = []
    private var done: [EngineCompletion] = []
    let movesDataInSubmit: Bool

    init(movesDataInSubmit: Bool) {
      self.movesDataInSubmit = movesDataInSubmit
      geometry.canUnmapZeroes = true
    }

    var geometry = BlockGeometry(capacity: 1 << 40, canDiscard: true, canWriteZeroes: true)
    let reachesGuestMemory = true
    let memoryAlignment = 512
    let now: UInt64 = 1
    let readiness: Int32 = -1
    func acknowledgeReadiness() {}
    func waitForCompletion() { complete() }
    func abandon() {}
    func close() {}

    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      for index in 0..<count {
        kept.append(requests[index])
        submitted.append(requests[index])
      }
      if movesDataInSubmit { complete() }
    }

    func complete() {
      done += kept.map { EngineCompletion(tag: $0.tag, result: Int($0.length)) }
      kept = []
    }

    func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
      let count = min(capacity, done.count)
      for index in 0..<count { completions[index] = done[index] }
      done.removeFirst(count)
      return count
    }
  }

  private final class Silent: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  private static let header: UInt64 = 0x100000
  private static let ranges: UInt64 = 0x110000
  private static let status: UInt64 = 0x120000
  private static let data: UInt64 = 0x400000
  private let signals = Silent()
  private let domain: SimulatedDomain
  private let ring: SimulatedSplitRing
  private let source: FlatMemory

  init() throws {
    domain = try SimulatedDomain(identifier: 3, memoryBytes: 16 << 20)
    source = FlatMemory(domain.memory)
    ring = SimulatedSplitRing(memory: domain.memory, area: 0x1000, size: 256, features: [])
  }

  private func pump(
    _ engine: KeepingEngine, rate: RateNode = RateNode(), features: FeatureBits = [.blockFlush]
  ) throws -> BlockPump {
    var settings = BlockPumpSettings()
    settings.pollsWhenIdle = false
    var pump = try BlockPump(
      engine: engine, source: source, counters: QueueCounters(), settings: settings,
      storage: JournalStorage(slotCount: 64, chainLimit: 256), rate: rate)
    var layout = QueueLayout()
    layout.size = 256
    layout.descriptorArea = ring.descriptorArea
    layout.driverArea = ring.driverArea
    layout.deviceArea = ring.deviceArea
    try pump.activate(layout: layout, maximumSize: 256, features: features, source: source)
    return pump
  }

  private func putHeader(_ type: UInt32, sector: UInt64 = 0) {
    let header = domain.memory.pointer(Self.header)
    header.storeBytes(of: UInt64(type), as: UInt64.self)
    header.storeBytes(of: sector, toByteOffset: 8, as: UInt64.self)
  }

  /// A read of so many pieces of 8 MiB each, all of them the same guest memory.
  private func addRead(pieces: Int) {
    let data = (0..<pieces).map { _ in SimulatedDriver.Buffer(Self.data, 8 << 20, writable: true) }
    _ = ring.add(
      [.init(Self.header, 16, writable: false)] + data + [.init(Self.status, 1, writable: true)], indirect: false)
  }

  private func addRanges(_ count: Int, sectors: UInt32, flags: UInt32) {
    for index in 0..<count {
      let range = domain.memory.pointer(Self.ranges + UInt64(index) * 16)
      range.storeBytes(of: UInt64(index) * UInt64(sectors), as: UInt64.self)
      range.storeBytes(of: sectors, toByteOffset: 8, as: UInt32.self)
      range.storeBytes(of: flags, toByteOffset: 12, as: UInt32.self)
    }
    _ = ring.add(
      [
        .init(Self.header, 16, writable: false), .init(Self.ranges, UInt32(count * 16), writable: false),
        .init(Self.status, 1, writable: true),
      ], indirect: false)
  }

  @Test func directRequestsGoInStepsAndAreBoundedTogether() throws {
    let engine = KeepingEngine(movesDataInSubmit: false)
    var pump = try pump(engine)
    putHeader(0)
    for _ in 0..<8 { addRead(pieces: 5) }
    while case .more = try pump.run(signals: signals) {}
    #expect(engine.kept.allSatisfy { $0.length <= 4 << 20 })
    #expect(engine.kept.reduce(0) { $0 + $1.length } <= 36 << 20)
    #expect(engine.kept.count == 8)
    // To the end: every byte once, and in the order of its request.
    var answered = 0
    for _ in 0..<100 where answered < 8 {
      engine.complete()
      while case .more = try pump.run(signals: signals) {}
      while let used = ring.takeUsed() {
        #expect(used.length == 40 << 20 + 1)
        answered += 1
      }
    }
    #expect(answered == 8)
    for tag in Set(engine.submitted.map(\.tag)) {
      let steps = engine.submitted.filter { $0.tag == tag }
      #expect(steps.map(\.offset) == (0..<10).map { UInt64($0) * 4 << 20 })
    }
  }

  /// Buffered I/O moves its data within `submit`: a run is left in the middle of a request.
  @Test func runEndsInTheMiddleOfALargeRequest() throws {
    let engine = KeepingEngine(movesDataInSubmit: true)
    var pump = try pump(engine)
    putHeader(0)
    for _ in 0..<3 { addRead(pieces: 60) }
    #expect(ring.notificationIsWanted())
    var runs = 0
    var before: UInt64 = 0
    while case .more = try pump.run(signals: signals) {
      let moved = engine.submitted.reduce(UInt64(0)) { $0 + $1.length }
      #expect(moved - before <= UInt64(RunBudget.bytes) + 4 << 20, "run \(runs)")
      before = moved
      runs += 1
      guard runs < 1000 else { break }
    }
    #expect(runs > 3 * 480 / 20 - 10)
    #expect(engine.submitted.reduce(0) { $0 + $1.length } == UInt64(3 * 480 << 20))
    for _ in 0..<3 { #expect(ring.takeUsed()?.length == UInt32(480 << 20 + 1)) }
  }

  @Test func zeroingGoesInPiecesAndAFewOfThemAtATime() throws {
    let engine = KeepingEngine(movesDataInSubmit: false)
    var pump = try pump(engine)
    putHeader(13)
    // 20 requests for 16 GiB each.
    for _ in 0..<20 { addRanges(16, sectors: 1 << 21, flags: 0) }
    for _ in 0..<50 {
      while case .more = try pump.run(signals: signals) {}
      #expect(!engine.kept.isEmpty && engine.kept.count <= 4)
      #expect(engine.kept.allSatisfy { $0.length <= 8 << 20 && !$0.mayUnmap })
      engine.complete()
    }
    // The driver resets: nothing is behind what the store has now.
    while case .more = try pump.run(signals: signals) {}
    pump.deactivate()
    let busy = pump.busyCount
    #expect(busy <= 4)
    let submitted = engine.submitted.count
    pump.drain()
    #expect(engine.submitted.count == submitted)
  }

  @Test func piecesCoverTheirRangesExactlyAndTheLastOneIsDurable() throws {
    let engine = KeepingEngine(movesDataInSubmit: true)
    // A driver that cannot flush gets write-through.
    var pump = try pump(engine, features: [])
    putHeader(11)
    addRanges(3, sectors: 300_001, flags: 0)
    for _ in 0..<100 { while case .more = try pump.run(signals: signals) {} }
    #expect(ring.takeUsed()?.length == 1)
    var next: UInt64 = 0
    for request in engine.submitted {
      #expect(request.offset == next && request.length > 0)
      next += request.length
    }
    #expect(next == 3 * 300_001 * 512)
    #expect(engine.submitted.map(\.isDurable) == engine.submitted.indices.map { $0 == engine.submitted.count - 1 })
  }

  @Test(arguments: [UInt32(4), 11, 13, 8]) func limitsHoldForRequestsOfAllKinds(type: UInt32) throws {
    let engine = KeepingEngine(movesDataInSubmit: true)
    let rate = RateNode()
    var limits = RateLimits()
    limits.writeOperations = 1
    limits.readOperations = 1
    limits.burstMilliseconds = 2000
    rate.set(limits)
    var pump = try pump(engine, rate: rate)
    putHeader(type)
    for _ in 0..<20 {
      switch type {
      case 4:
        _ = ring.add([.init(Self.header, 16, writable: false), .init(Self.status, 1, writable: true)], indirect: false)
      case 8:
        _ = ring.add([.init(Self.header, 16, writable: false), .init(Self.data, 21, writable: true)], indirect: false)
      default: addRanges(1, sectors: 8, flags: 0)
      }
    }
    while case .more = try pump.run(signals: signals) {}
    while case .more = try pump.run(signals: signals) {}
    var answered = 0
    while ring.takeUsed() != nil { answered += 1 }
    // The engine's clock stands still.
    #expect(answered >= 1 && answered <= 3)
    let next = pump.nextTime
    #expect(next > 1)
  }

  @Test func requestWithoutDataIsAMultipleOfTheSectorToo() throws {
    let engine = KeepingEngine(movesDataInSubmit: true)
    var pump = try pump(engine)
    putHeader(0)
    _ = ring.add([.init(Self.header, 16, writable: false), .init(Self.status, 1, writable: true)], indirect: false)
    domain.memory.pointer(Self.status).storeBytes(of: 0xee, as: UInt8.self)
    _ = try pump.run(signals: signals)
    #expect(ring.takeUsed()?.length == 1)
    #expect(domain.memory.pointer(Self.status).load(as: UInt8.self) == 0)
  }
}
