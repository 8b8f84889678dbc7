import DeviceHost
import Devices
import Engines
import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Virtqueue

@Suite struct BlockBackendTests {
  private let folder = TemporaryFolder()

  private func settings(_ bytes: Int = 16 << 20, readOnly: Bool = false) -> BlockSettings {
    BlockSettings(
      path: folder.file("disk.img", bytes: bytes), readOnly: readOnly, discard: true, serial: "xvde")
  }

  private func pattern(_ count: Int, seed: UInt64) -> [UInt8] {
    var random = SeededGenerator(seed: seed)
    return (0..<count).map { _ in UInt8(truncatingIfNeeded: random.next()) }
  }

  @Test(arguments: [true, false], [true, false]) func writtenBlocksAreReadBack(direct: Bool, indirect: Bool) throws {
    var settings = settings()
    settings.direct = direct
    let fixture = try BlockFixture(settings, indirect: indirect)
    defer { fixture.stop() }
    for (round, count) in [512, 4096, 65536, 1 << 20].enumerated() {
      let bytes = pattern(count, seed: UInt64(round + 1))
      #expect(try fixture.guest.write(bytes, sector: UInt64(round) * 4096) == 0)
      #expect(try fixture.guest.flush() == 0)
      let answer = try fixture.guest.read(sector: UInt64(round) * 4096, count: count)
      #expect(answer.status == 0)
      #expect(answer.bytes == bytes)
    }
    #expect(eventually { fixture.backend.counters[0].flushes.value == 4 })
  }

  @Test func requestBeyondTheBounceBuffersIsServedInSteps() throws {
    var settings = settings()
    settings.bounceBytes = 1 << 20
    let fixture = try BlockFixture(settings)
    defer { fixture.stop() }
    let bytes = pattern(5 << 20, seed: 3)
    #expect(try fixture.guest.write(bytes, sector: 8) == 0)
    let answer = try fixture.guest.read(sector: 8, count: bytes.count)
    #expect(answer.status == 0)
    #expect(answer.bytes == bytes)
  }

  @Test func headerDataAndStatusMayBeCutAnywhere() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    let bytes = pattern(1024, seed: 5)
    let header: UInt64 = 20 << 20
    let data: UInt64 = header + 4096
    fixture.guest.putHeader(at: header, type: 1, sector: 3)
    fixture.driver.memory.pointer(data).copyMemory(from: bytes, byteCount: bytes.count)
    // Header in two pieces, the second of them together with nothing else; data in three; a zero-length descriptor between.
    let chain: [SimulatedDriver.Buffer] = [
      .init(header, 5, writable: false), .init(header + 5, 11, writable: false), .init(data, 1, writable: false),
      .init(data, 0, writable: false), .init(data + 1, 700, writable: false), .init(data + 701, 323, writable: false),
      .init(header + 64, 1, writable: true),
    ]
    #expect(fixture.driver.add(chain) != nil)
    fixture.driver.notify()
    #expect(try fixture.guest.waitForUsed().length == 1)
    #expect(fixture.driver.memory.pointer(header + 64).load(as: UInt8.self) == 0)
    #expect(try fixture.guest.read(sector: 3, count: 1024).bytes == bytes)
  }

  @Test func unknownTypeIsUnsupportedAndTheQueueGoesOn() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    #expect(try fixture.guest.request(type: 99, sector: 0, data: []).status == 2)
    #expect(try fixture.guest.write(pattern(512, seed: 1), sector: 0) == 0)
  }

  @Test(arguments: [UInt64(32768), 32767 + 1, .max, 1 << 55]) func requestBehindTheEndFails(sector: UInt64) throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    #expect(try fixture.guest.read(sector: sector, count: 512).status == 1)
    #expect(try fixture.guest.write(pattern(512, seed: 1), sector: sector) == 1)
    #expect(eventually { fixture.backend.counters[0].failed.value == 2 })
  }

  /// `fills` in the guest module's PROTOCOL.md.
  @Test(arguments: [(UInt32(0), UInt64(32768), UInt32(4096)), (0, 0, 513), (99, 0, 64), (8, 0, 100), (10, 0, 24)])
  func whatAnAnswerDoesNotFillBecomesZeros(type: UInt32, sector: UInt64, count: UInt32) throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    let place = fixture.driver.memory.pointer(fixture.guest.dataAddress)
    place.initializeMemory(as: UInt8.self, repeating: 0xee, count: Int(count))
    let halves: [SimulatedDriver.Buffer] = [
      .init(fixture.guest.dataAddress, 3, writable: true),
      .init(fixture.guest.dataAddress + 3, count - 3, writable: true),
    ]
    let answer = try fixture.guest.request(type: type, sector: sector, data: halves)
    #expect(answer.status == (type == 8 ? 0 : type == 0 ? 1 : 2))
    #expect(answer.length == count + 1)
    let bytes = UnsafeRawBufferPointer(start: UnsafeRawPointer(place), count: Int(count))
    #expect(bytes.dropFirst(type == 8 ? 4 : 0).allSatisfy { $0 == 0 })
  }

  @Test func aChainBeyondThePromisedSizeIsAnsweredAsItIs() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    let place = fixture.driver.memory.pointer(fixture.guest.dataAddress)
    place.storeBytes(of: 0xee, as: UInt8.self)
    let answer = try fixture.guest.request(
      type: 0, sector: 1 << 40, data: [.init(fixture.guest.dataAddress, 2 << 20, writable: true)])
    #expect(answer.status == 1)
    #expect(answer.length == 0)
    #expect(place.load(as: UInt8.self) == 0xee)
  }

  @Test func dataThatIsNoWholeNumberOfSectorsFails() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    #expect(try fixture.guest.read(sector: 0, count: 513).status == 1)
    #expect(try fixture.guest.read(sector: 0, count: 512).status == 0)
  }

  @Test func readOnlyDiskRefusesWrites() throws {
    let fixture = try BlockFixture(settings(readOnly: true))
    defer { fixture.stop() }
    #expect(fixture.driver.features.contains(.blockReadOnly))
    #expect(try fixture.guest.write(pattern(512, seed: 1), sector: 0) == 1)
    #expect(try fixture.guest.read(sector: 0, count: 512).status == 0)
  }

  @Test func getIDAnswersTheSerial() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    let address = fixture.guest.dataAddress
    let answer = try fixture.guest.request(type: 8, sector: 0, data: [.init(address, 20, writable: true)])
    #expect(answer.status == 0)
    #expect(answer.length == 21)
    let start = UnsafeRawPointer(fixture.driver.memory.pointer(address))
    #expect(
      Array(UnsafeRawBufferPointer(start: start, count: 20)) == Array("xvde".utf8) + [UInt8](repeating: 0, count: 16))
  }

  private func range(_ fixture: BlockFixture, sector: UInt64, count: UInt32, flags: UInt32 = 0)
    -> SimulatedDriver.Buffer
  {
    let address = fixture.guest.dataAddress
    let place = fixture.driver.memory.pointer(address)
    place.storeBytes(of: sector, as: UInt64.self)
    place.storeBytes(of: count, toByteOffset: 8, as: UInt32.self)
    place.storeBytes(of: flags, toByteOffset: 12, as: UInt32.self)
    return .init(address, 16, writable: false)
  }

  @Test(arguments: [UInt32(11), 13]) func discardedAndZeroedBlocksReadAsZeros(type: UInt32) throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    #expect(try fixture.guest.write(pattern(16384, seed: 1), sector: 0) == 0)
    let data = range(fixture, sector: 8, count: 16)
    #expect(try fixture.guest.request(type: type, sector: 0, data: [data]).status == 0)
    let answer = try fixture.guest.read(sector: 0, count: 16384)
    #expect(answer.bytes[4096..<12288].allSatisfy { $0 == 0 })
    #expect(Array(answer.bytes[..<4096]) == Array(pattern(16384, seed: 1)[..<4096]))
  }

  @Test func badRangesAreRefused() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    #expect(
      try fixture.guest.request(type: 11, sector: 0, data: [range(fixture, sector: 0, count: 8, flags: 1)]).status == 2)
    #expect(try fixture.guest.request(type: 11, sector: 0, data: [range(fixture, sector: .max, count: 8)]).status == 1)
    #expect(try fixture.guest.request(type: 13, sector: 0, data: [range(fixture, sector: 0, count: .max)]).status == 1)
    #expect(try fixture.guest.request(type: 11, sector: 0, data: []).status == 1)
    let half = fixture.guest.dataAddress
    #expect(try fixture.guest.request(type: 11, sector: 0, data: [.init(half, 8, writable: false)]).status == 1)
  }

  @Test func bufferInAHoleFailsThatRequestOnly() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    let hole: UInt64 = 0x7000_0000_0000
    #expect(try fixture.guest.request(type: 1, sector: 0, data: [.init(hole, 512, writable: false)]).status == 1)
    #expect(try fixture.guest.request(type: 0, sector: 0, data: [.init(hole, 512, writable: true)]).status == 1)
    #expect(try fixture.guest.write(pattern(512, seed: 1), sector: 0) == 0)
  }

  /// Many requests at once through a pool that can hold but a few buckets: nothing is lost, everything is equal.
  @Test(arguments: UInt64(1)...6) func manyRequestsUnderMappingPressureKeepTheirData(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let fixture = try BlockFixture(settings(64 << 20), mappingBudget: 4 << 16)
    defer { fixture.stop() }
    let base = (fixture.guest.dataAddress + 0xffff) & ~0xffff
    var expected: [UInt64: [UInt8]] = [:]
    for round in 0..<6 {
      var pending = 0
      for index in 0..<40 {
        // A request's own memory: header, status, data that may cross pages and buckets.
        let place = base + UInt64(index) * 0x20000
        let count = Int.random(in: 1...64, using: &random) * 512
        let sector = UInt64(round * 40 + index) * 128
        let bytes = pattern(count, seed: random.next())
        let data = place + 0x1000 + UInt64.random(in: 0...0x7fff, using: &random)
        fixture.guest.putHeader(at: place, type: 1, sector: sector)
        fixture.driver.memory.pointer(data).copyMemory(from: bytes, byteCount: count)
        let chain: [SimulatedDriver.Buffer] = [
          .init(place, 16, writable: false), .init(data, UInt32(count), writable: false),
          .init(place + 32, 1, writable: true),
        ]
        #expect(fixture.driver.add(chain, indirect: Bool.random(using: &random)) != nil, "seed \(seed)")
        expected[sector] = bytes
        pending += 1
        if Bool.random(using: &random) { fixture.driver.notifyIfWanted() }
      }
      fixture.driver.notifyIfWanted()
      for _ in 0..<pending { _ = try fixture.guest.waitForUsed() }
    }
    for (sector, bytes) in expected {
      let answer = try fixture.guest.read(sector: sector, count: bytes.count)
      #expect(answer.bytes == bytes, "seed \(seed), sector \(sector)")
    }
    #expect(fixture.pool.statistics.evictions > 0)
    #expect(fixture.pool.statistics.buckets <= 4)
  }

  @Test func resetWithRequestsInFlightLeavesADeviceThatWorks() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    for round in 0..<50 {
      let base = fixture.guest.dataAddress + 0x100000
      for index in 0..<32 {
        let place = base + UInt64(index) * 8192
        fixture.guest.putHeader(at: place, type: UInt32(index & 1), sector: UInt64(index) * 8)
        let chain: [SimulatedDriver.Buffer] = [
          .init(place, 16, writable: false), .init(place + 4096, 4096, writable: index & 1 == 0),
          .init(place + 32, 1, writable: true),
        ]
        _ = fixture.driver.add(chain)
      }
      fixture.driver.notify()
      fixture.driver.reset()
      #expect(fixture.driver.status == 0)
      try fixture.driver.start(wanted: [.indirectDescriptors, .eventIndex])
      let bytes = pattern(4096, seed: UInt64(round + 1))
      #expect(try fixture.guest.write(bytes, sector: 1000) == 0)
      #expect(try fixture.guest.read(sector: 1000, count: 4096).bytes == bytes)
    }
  }

  @Test func brokenRingNeedsAResetAndSaysWhy() throws {
    let faults = Mutex<[DeviceFault]>([])
    let fixture = try BlockFixture(
      settings(), report: { if case .fault(let fault) = $0 { faults.withLock { $0.append(fault) } } })
    defer { fixture.stop() }
    fixture.driver.jumpAvailable(to: 40000)
    fixture.driver.notify()
    #expect(eventually { fixture.driver.status & 0x40 != 0 })
    #expect(fixture.driver.acknowledgeInterrupt() & 2 != 0)
    fixture.settle()
    #expect(faults.withLock { $0 } == [.virtqueue(.availableIndexJumped(pending: 40000))])
    fixture.driver.notify()
    fixture.driver.reset()
    try fixture.driver.start(wanted: [.indirectDescriptors, .eventIndex])
    #expect(try fixture.guest.write(pattern(512, seed: 1), sector: 0) == 0)
  }

  @Test func chainWithoutRoomForAStatusIsAFault() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    fixture.guest.putHeader(at: fixture.guest.dataAddress, type: 0, sector: 0)
    _ = fixture.driver.add([.init(fixture.guest.dataAddress, 16, writable: false)])
    fixture.driver.notify()
    #expect(eventually { fixture.driver.status & 0x40 != 0 })
  }

  @Test func nothingStaysMappedAfterTheEnd() throws {
    let fixture = try BlockFixture(settings())
    #expect(try fixture.guest.write(pattern(4096, seed: 1), sector: 0) == 0)
    #expect(fixture.domain.usage.mappings > 0)
    fixture.stop()
    #expect(fixture.domain.usage.mappings == 0)
    #expect(fixture.pool.statistics.mappedPages == 0)
  }

  /// Pages that a guest gives back and gets again: without the invalidation the backend would go on with the old ones.
  @Test func invalidationMakesTheBackendSeeTheNewPages() throws {
    let fixture = try BlockFixture(settings())
    defer { fixture.stop() }
    let first = pattern(4096, seed: 1)
    #expect(try fixture.guest.write(first, sector: 0) == 0)
    let before = fixture.pool.statistics.mapCalls
    fixture.pool.invalidate()
    #expect(fixture.pool.statistics.mappedPages == 0)
    let second = pattern(4096, seed: 2)
    #expect(try fixture.guest.write(second, sector: 8) == 0)
    #expect(try fixture.guest.read(sector: 8, count: 4096).bytes == second)
    #expect(fixture.pool.statistics.mapCalls > before)
  }
}
