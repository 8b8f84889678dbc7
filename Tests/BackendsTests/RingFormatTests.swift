import DeviceHost
import Devices
import EventLoop
import SimulatedXen
import TestSupport
import Testing
import Virtqueue

/// The same disk through every form of virtqueue that a driver may choose.
@Suite struct RingFormatTests {
  struct Form: CustomTestStringConvertible {
    var features: FeatureBits
    var indirect: Bool
    var size: UInt16

    var testDescription: String {
      "features \(String(features.rawValue, radix: 16)), indirect \(indirect), size \(size)"
    }

    static let all: [Form] = {
      var forms: [Form] = []
      for format in [[], FeatureBits.ringPacked, .inOrder, [.ringPacked, .inOrder]] as [FeatureBits] {
        for event in [[], FeatureBits.eventIndex] as [FeatureBits] {
          for indirect in [false, true] {
            forms.append(Form(features: format.union(event).union(.indirectDescriptors), indirect: indirect, size: 64))
          }
        }
      }
      return forms
    }()
  }

  private let folder = TemporaryFolder()

  private func settings(queueSize: UInt16 = 256, queues: Int = 1) -> BlockSettings {
    var settings = BlockSettings(
      path: folder.file("disk.img", bytes: 16 << 20), readOnly: false, discard: true, serial: "xvde")
    settings.packed = true
    settings.inOrder = true
    settings.queueSize = queueSize
    settings.queues = queues
    settings.threads = queues
    return settings
  }

  /// Writes in bursts that lap the ring many times, then reads everything back.
  private func exercise(_ fixture: BlockFixture, queue: Int, indirect: Bool, seed: UInt64, rounds: Int = 30) throws {
    var random = SeededGenerator(seed: seed)
    let base = ((fixture.guest.dataAddress + 0xffff) & ~0xffff) + UInt64(queue) << 20
    var expected: [UInt64: UInt8] = [:]
    func request(_ slot: Int, type: UInt32, sector: UInt64, fill: UInt8) -> UInt64 {
      let place = base + UInt64(slot) * 0x2000
      fixture.guest.putHeader(at: place, type: type, sector: sector)
      fixture.driver.memory.pointer(place + 0x1000).initializeMemory(as: UInt8.self, repeating: fill, count: 1024)
      let chain: [SimulatedDriver.Buffer] = [
        .init(place, 16, writable: false), .init(place + 0x1000, 512, writable: type == 0),
        .init(place + 0x1200, 512, writable: type == 0), .init(place + 32, 1, writable: true),
      ]
      return fixture.driver.add(chain, indirect: indirect, queue: queue) == nil ? 0 : place
    }
    for round in 0..<rounds {
      let burst = Int.random(in: 1...12, using: &random)
      var added = 0
      for slot in 0..<burst {
        let sector = UInt64(queue * 4096 + (round * 16 + slot) * 2)
        let fill = UInt8.random(in: 1...255, using: &random)
        guard request(slot, type: 1, sector: sector, fill: fill) != 0 else { break }
        expected[sector] = fill
        added += 1
      }
      fixture.driver.notifyIfWanted(queue: queue)
      for _ in 0..<added { _ = try fixture.guest.waitForUsed(queue: queue) }
    }
    for (sector, fill) in expected {
      let place = request(0, type: 0, sector: sector, fill: 0)
      fixture.driver.notifyIfWanted(queue: queue)
      #expect(try fixture.guest.waitForUsed(queue: queue).length == 1025, "seed \(seed)")
      let data = fixture.driver.memory.pointer(place + 0x1000)
      #expect(
        (0..<1024).allSatisfy { data.load(fromByteOffset: $0, as: UInt8.self) == fill },
        "seed \(seed), sector \(sector)")
      #expect(fixture.driver.memory.pointer(place + 32).load(as: UInt8.self) == 0)
    }
  }

  @Test(arguments: Form.all) func dataIsEqualThrough(form: Form) throws {
    let fixture = try BlockFixture(
      settings(), queueSize: form.size, indirect: form.indirect, wanted: form.features, onlyWanted: true)
    defer { fixture.stop() }
    #expect(fixture.driver.features.contains(.ringPacked) == form.features.contains(.ringPacked))
    try exercise(fixture, queue: 0, indirect: form.indirect, seed: 11)
  }

  @Test(arguments: [UInt16(1), 2, 4, 1024, 32768], [FeatureBits([]), .ringPacked])
  func queueOfAnySizeServes(size: UInt16, format: FeatureBits) throws {
    let fixture = try BlockFixture(
      settings(queueSize: 32768), memoryBytes: 64 << 20, queueSize: size,
      wanted: format.union([.indirectDescriptors, .eventIndex]), onlyWanted: true)
    defer { fixture.stop() }
    #expect(fixture.driver.rings[0].size == size)
    try exercise(fixture, queue: 0, indirect: true, seed: UInt64(size), rounds: 20)
  }

  @Test(arguments: [UInt16(3), 5, 100]) func packedRingNeedsNoPowerOfTwo(size: UInt16) throws {
    let fixture = try BlockFixture(settings(), queueSize: size, wanted: [.ringPacked, .eventIndex], onlyWanted: true)
    defer { fixture.stop() }
    try exercise(fixture, queue: 0, indirect: false, seed: UInt64(size))
  }

  @Test(arguments: [FeatureBits([]), .ringPacked]) func queuesWorkAtOnceOnThreadsOfTheirOwn(format: FeatureBits) throws
  {
    let fixture = try BlockFixture(
      settings(queues: 4), memoryBytes: 64 << 20,
      wanted: format.union([.indirectDescriptors, .eventIndex, .blockQueues]), onlyWanted: true, queueCount: 4)
    defer { fixture.stop() }
    #expect(fixture.driver.features.contains(.blockQueues))
    #expect(fixture.backend.configuration.read(offset: 34, width: 2) == 4)
    #expect(fixture.backend.threadCount == 4)
    for round in 0..<4 {
      for queue in 0..<4 {
        try exercise(fixture, queue: queue, indirect: true, seed: UInt64(round * 4 + queue + 1), rounds: 5)
      }
    }
    for counters in fixture.backend.counters { #expect(eventually { counters.writes.value > 0 }) }
  }

  /// virtio 1.2, 2.6.1: one queue is taken down with requests in flight, comes back, and the other never notices.
  @Test(arguments: [FeatureBits([]), .ringPacked]) func resetOfOneQueueLeavesTheOtherAlone(format: FeatureBits) throws {
    let fixture = try BlockFixture(
      settings(queues: 2), memoryBytes: 64 << 20,
      wanted: format.union([.indirectDescriptors, .eventIndex, .blockQueues, .ringReset]), onlyWanted: true,
      queueCount: 2)
    defer { fixture.stop() }
    for round in 0..<10 {
      let base = fixture.guest.dataAddress + 0x200000
      for index in 0..<16 {
        let place = base + UInt64(index) * 8192
        fixture.guest.putHeader(at: place, type: 1, sector: 8000 + UInt64(index))
        _ = fixture.driver.add(
          [
            .init(place, 16, writable: false), .init(place + 4096, 512, writable: false),
            .init(place + 32, 1, writable: true),
          ], queue: 0)
      }
      fixture.driver.notify(queue: 0)
      try fixture.driver.resetQueue(0)
      try exercise(fixture, queue: 1, indirect: true, seed: UInt64(round + 1), rounds: 3)
      try exercise(fixture, queue: 0, indirect: false, seed: UInt64(round + 100), rounds: 3)
      #expect(fixture.driver.status & 0x40 == 0)
    }
  }

  /// With a store that answers out of order, the used ring keeps the order of the available one.
  @Test(arguments: [FeatureBits([]), .ringPacked]) func inOrderDeviceKeepsTheOrder(format: FeatureBits) throws {
    let plan = FaultPlan()
    // Half of the requests fail at once, before those that were submitted earlier are done.
    let fixture = try BlockFixture(
      settings(), wanted: format.union([.eventIndex, .inOrder]), onlyWanted: true,
      decorate: { engine, _ in ShufflingEngine(FaultyEngine(engine, plan)) })
    defer { fixture.stop() }
    let base = fixture.guest.dataAddress + 0x100000
    for _ in 0..<8 {
      var heads: [UInt16] = []
      for index in 0..<12 {
        let place = base + UInt64(index) * 8192
        fixture.guest.putHeader(at: place, type: 0, sector: UInt64(index) * 8)
        let head = fixture.driver.add([
          .init(place, 16, writable: false), .init(place + 4096, 512, writable: true),
          .init(place + 32, 1, writable: true),
        ])
        heads.append(try #require(head))
      }
      fixture.driver.notifyIfWanted()
      var used: [UInt16] = []
      for _ in 0..<12 { used.append(try fixture.guest.waitForUsed().head) }
      #expect(used == heads)
    }
  }
}

/// Turns the order of each harvest around.
private final class ShufflingEngine: EngineDecorator {
  let engine: any BlockEngine
  private var waiting: [EngineCompletion] = []
  private var submitted = 0

  init(_ engine: any BlockEngine) { self.engine = engine }

  func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    submitted += count
    engine.submit(requests, count: count)
  }
  func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    let count = engine.reap(into: completions, capacity: capacity)
    for index in 0..<count { waiting.append(completions[index]) }
    // All that are under way, the youngest first.
    guard !waiting.isEmpty, waiting.count == submitted else { return 0 }
    let given = min(capacity, waiting.count)
    for index in 0..<given { completions[index] = waiting[waiting.count - 1 - index] }
    waiting.removeLast(given)
    submitted -= given
    return given
  }
}
