import DeviceHost
import Devices
import Engines
import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Virtqueue

/// Features of the block device beyond reads and writes (virtio 1.2, 5.2).
@Suite struct BlockFeatureTests {
  private let folder = TemporaryFolder()

  private func settings(_ change: (inout BlockSettings) -> Void = { _ in }) -> BlockSettings {
    var settings = BlockSettings(
      path: folder.file("disk.img", bytes: 16 << 20), readOnly: false, discard: true, serial: "xvde")
    change(&settings)
    return settings
  }

  /// Notes what an engine is asked to do.
  private final class Witness: EngineDecorator {
    final class Notes: Sendable {
      let all = Mutex<[(BlockOperation, isDurable: Bool, mayUnmap: Bool)]>([])
      var list: [(BlockOperation, isDurable: Bool, mayUnmap: Bool)] { all.withLock { $0 } }
      func clear() { all.withLock { $0 = [] } }
    }

    let engine: any BlockEngine
    private let notes: Notes
    private let change: @Sendable (inout BlockGeometry) -> Void
    private var answered: [EngineCompletion] = []

    init(_ engine: any BlockEngine, _ notes: Notes, _ change: @escaping @Sendable (inout BlockGeometry) -> Void) {
      self.engine = engine
      self.notes = notes
      self.change = change
    }

    var geometry: BlockGeometry {
      var geometry = engine.geometry
      change(&geometry)
      return geometry
    }
    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      for index in 0..<count {
        notes.all.withLock {
          $0.append((requests[index].operation, requests[index].isDurable, requests[index].mayUnmap))
        }
        if requests[index].operation == .secureErase {
          answered.append(EngineCompletion(tag: requests[index].tag, result: 0))
        } else {
          engine.submit(requests + index, count: 1)
        }
      }
    }
    func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
      guard answered.isEmpty else {
        completions[0] = answered.removeFirst()
        return 1
      }
      return engine.reap(into: completions, capacity: capacity)
    }
  }

  private let notes = Witness.Notes()

  private func fixture(
    _ settings: BlockSettings, wanted: FeatureBits = [.indirectDescriptors, .eventIndex], onlyWanted: Bool = false,
    geometry: @escaping @Sendable (inout BlockGeometry) -> Void = { _ in }
  ) throws -> BlockFixture {
    let notes = notes
    return try BlockFixture(
      settings, wanted: wanted, onlyWanted: onlyWanted,
      decorate: { engine, _ in Witness(engine, notes, geometry) })
  }

  private func write(_ fixture: BlockFixture) throws -> Bool {
    notes.clear()
    #expect(try fixture.guest.write([UInt8](repeating: 3, count: 4096), sector: 0) == 0)
    return try #require(notes.list.first).isDurable
  }

  // MARK: Cache modes

  @Test func writebackIsDurableOnFlushOnly() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    #expect(try !write(fixture))
    #expect(fixture.backend.configuration.read(offset: 32, width: 1) == 1)
  }

  @Test func writethroughMakesEachWriteDurable() throws {
    let fixture = try fixture(settings { $0.cache = .writethrough })
    defer { fixture.stop() }
    #expect(try write(fixture))
    #expect(!fixture.driver.features.contains(.blockConfigureWriteback))
    #expect(fixture.backend.configuration.read(offset: 32, width: 1) == 0)
  }

  @Test func unsafeModeAnswersFlushesItself() throws {
    let fixture = try fixture(settings { $0.cache = .unsafe })
    defer { fixture.stop() }
    #expect(try fixture.guest.flush() == 0)
    fixture.settle()
    #expect(notes.list.isEmpty)
  }

  /// 5.2.6.2: the driver chooses by a write to the configuration space, with any width that covers the byte.
  @Test func driverSwitchesToWritethroughAndBack() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    fixture.driver.registers.write(0x100 + 32, width: 1, 0)
    #expect(fixture.driver.registers.read(0x100 + 32, width: 1) == 0)
    #expect(try write(fixture))
    fixture.driver.registers.write(0x100 + 32, width: 1, 1)
    #expect(try !write(fixture))
    fixture.driver.registers.write(0x100 + 32, width: 1, 0)
    fixture.driver.reset()
    #expect(fixture.backend.configuration.read(offset: 32, width: 1) == 1)
  }

  @Test func restOfTheConfigurationSpaceCannotBeWritten() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    let before = (0..<80).map { fixture.backend.configuration.read(offset: $0, width: 1) }
    for offset in 0..<80 where offset != 32 { fixture.driver.registers.write(0x100 + UInt64(offset), width: 1, 0x5a) }
    #expect((0..<80).map { fixture.backend.configuration.read(offset: $0, width: 1) } == before)
  }

  /// Without FLUSH a driver cannot ask for durability: each write has it (5.2.6.2).
  @Test func driverWithoutFlushGetsWritethrough() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    fixture.driver.reset()
    try fixture.driver.start(wanted: [.indirectDescriptors])
    #expect(!fixture.driver.features.contains(.blockFlush))
    #expect(try write(fixture))
  }

  @Test func writebackChoiceWithoutFlushIsRefused() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    fixture.driver.reset()
    #expect(throws: SimulatedDriver.Failure.featuresRefused) {
      try fixture.driver.start(wanted: [.blockConfigureWriteback])
    }
  }

  // MARK: Erase, lifetime

  private func range(_ fixture: BlockFixture, flags: UInt32 = 0) -> SimulatedDriver.Buffer {
    let place = fixture.driver.memory.pointer(fixture.guest.dataAddress)
    place.storeBytes(of: 8, as: UInt64.self)
    place.storeBytes(of: 8, toByteOffset: 8, as: UInt32.self)
    place.storeBytes(of: flags, toByteOffset: 12, as: UInt32.self)
    return .init(fixture.guest.dataAddress, 16, writable: false)
  }

  @Test func secureEraseReachesAStoreThatCan() throws {
    let fixture = try fixture(settings()) { $0.canSecureErase = true }
    defer { fixture.stop() }
    #expect(fixture.driver.features.contains(.blockSecureErase))
    #expect(try fixture.guest.request(type: 14, sector: 0, data: [range(fixture)]).status == 0)
    #expect(notes.list.map(\.0) == [.secureErase])
  }

  @Test func secureEraseIsNotOfferedForAFile() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    #expect(!fixture.driver.features.contains(.blockSecureErase))
    #expect(try fixture.guest.request(type: 14, sector: 0, data: [range(fixture)]).status == 2)
  }

  @Test func writeZeroesPassesTheUnmapFlagOn() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    #expect(try fixture.guest.request(type: 13, sector: 0, data: [range(fixture, flags: 1)]).status == 0)
    #expect(try fixture.guest.request(type: 13, sector: 0, data: [range(fixture)]).status == 0)
    #expect(notes.list.map(\.mayUnmap) == [true, false])
  }

  @Test func lifetimeIsToldWhereTheStoreTells() throws {
    let fixture = try fixture(settings()) { $0.lifetime = BlockLifetime(preEndOfLife: 1, typicalA: 2, typicalB: 11) }
    defer { fixture.stop() }
    #expect(fixture.driver.features.contains(.blockLifetime))
    let address = fixture.guest.dataAddress
    let answer = try fixture.guest.request(type: 10, sector: 0, data: [.init(address, 6, writable: true)])
    #expect((answer.status, answer.length) == (0, 7))
    let words = fixture.driver.memory.pointer(address)
    #expect((0..<3).map { words.load(fromByteOffset: $0 * 2, as: UInt16.self) } == [1, 2, 11])
  }

  @Test func lifetimeOfAFileIsUnsupported() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    #expect(!fixture.driver.features.contains(.blockLifetime))
    let data = SimulatedDriver.Buffer(fixture.guest.dataAddress, 6, writable: true)
    #expect(try fixture.guest.request(type: 10, sector: 0, data: [data]).status == 2)
  }

  // MARK: Size

  private func resize(_ fixture: BlockFixture, to bytes: UInt64?) throws -> UInt64 {
    let latch = Latch()
    let outcome = Mutex<Result<UInt64, ImageFault>?>(nil)
    fixture.backend.resize(to: bytes) { result in
      outcome.withLock { $0 = result }
      latch.open()
    }
    latch.wait()
    return try #require(outcome.withLock { $0 }).get()
  }

  @Test func growingIsToldByAConfigurationInterrupt() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    #expect(try fixture.guest.read(sector: 32768, count: 512).status == 1)
    let generation = fixture.driver.registers.read(0x0fc)
    #expect(try resize(fixture, to: 32 << 20) == 32 << 20)
    #expect(eventually { fixture.driver.registers.read(0x060) & 2 != 0 })
    #expect(fixture.driver.registers.read(0x0fc) != generation)
    #expect(fixture.driver.registers.read(0x100, width: 8) == 65536)
    #expect(try fixture.guest.write([UInt8](repeating: 1, count: 512), sector: 65535) == 0)
    #expect(try fixture.guest.read(sector: 65536, count: 512).status == 1)
  }

  @Test func sizeThatCutsDataOffIsRefused() throws {
    let fixture = try fixture(settings())
    defer { fixture.stop() }
    #expect(throws: ImageFault.self) { _ = try resize(fixture, to: 8 << 20) }
    #expect(fixture.backend.capacity == 16 << 20)
  }

  @Test func configurationSpaceSaysWhatIsOffered() throws {
    let fixture = try fixture(settings { $0.queues = 3 })
    defer { fixture.stop() }
    let space = fixture.backend.configuration
    #expect(space.read(offset: 8, width: 4) == 1 << 20)
    #expect(space.read(offset: 12, width: 4) == 254)
    #expect(space.read(offset: 34, width: 2) == 3)
    #expect(fixture.driver.features.isSuperset(of: [.blockSizeMaximum, .blockSegmentsMaximum, .blockQueues]))
  }
}
