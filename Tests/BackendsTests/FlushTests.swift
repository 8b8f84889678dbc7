import DeviceHost
import Devices
import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Virtqueue

/// What a flush is worth: never more than what is on the store.
@Suite struct FlushTests {
  private let folder = TemporaryFolder()

  private func settings(direct: Bool = false, queues: Int = 1) -> BlockSettings {
    var settings = BlockSettings(
      path: folder.file("disk.img", bytes: 16 << 20), readOnly: false, discard: false, serial: "xvde")
    settings.direct = direct
    settings.queues = queues
    settings.threads = queues
    settings.errors.retryPause = 1
    return settings
  }

  private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

  /// The page cache says once that it lost something. Trying again would find it clean.
  @Test(arguments: [BlockErrorPolicy.Action.report, .retry(milliseconds: 10_000), .hold])
  func flushThatFailedIsNeverASuccessLater(policy: BlockErrorPolicy.Action) throws {
    let plan = FaultPlan()
    var settings = settings()
    settings.errors.onError = policy
    settings.errors.onNoSpace = policy
    let fixture = try BlockFixture(settings, decorate: { engine, _ in FaultyEngine(engine, plan) })
    defer { fixture.stop() }
    #expect(try fixture.guest.write(block(1), sector: 0) == 0)
    plan.add(.init([.flush], result: -5, count: 1))
    #expect(try fixture.guest.flush() == 1)
    #expect(try fixture.guest.flush() == 1)
    #expect(try fixture.guest.write(block(2), sector: 0) == 0)
    #expect(try fixture.guest.flush() == 1)
    #expect(plan.injected == 1)
    // Another driver, which has written nothing yet, begins with a clean page cache.
    fixture.driver.reset()
    try fixture.driver.start(wanted: [.blockFlush, .indirectDescriptors], queueSize: 64)
    let guest = SimulatedBlockGuest(domain: fixture.domain, driver: fixture.driver, indirect: true)
    #expect(try guest.flush() == 0)
  }

  /// One of two queues asks first and is told; the other one's flush covers the same writes.
  @Test func everyQueueHearsOfALostWrite() throws {
    let plan = FaultPlan()
    let fixture = try BlockFixture(
      settings(queues: 2), queueCount: 2,
      decorate: { engine, queue in queue == 0 ? FaultyEngine(engine, plan) : engine })
    defer { fixture.stop() }
    plan.add(.init([.flush], result: -28, count: 1))
    #expect(try fixture.guest.flush() == 1)
    let place = fixture.guest.dataAddress + 0x200000
    fixture.guest.putHeader(at: place, type: 4, sector: 0)
    _ = fixture.driver.add([.init(place, 16, writable: false), .init(place + 32, 1, writable: true)], queue: 1)
    fixture.driver.notify(queue: 1)
    #expect(eventually { fixture.driver.takeUsed(queue: 1) != nil })
    #expect(fixture.driver.memory.pointer(place + 32).load(as: UInt8.self) == 1)
  }

  /// A write that was to be durable takes the word of a loss with it too.
  @Test func flushBehindADurableWriteThatFailedFails() throws {
    let plan = FaultPlan()
    let fixture = try BlockFixture(settings(), decorate: { engine, _ in FaultyEngine(engine, plan) })
    defer { fixture.stop() }
    #expect(try fixture.guest.write(block(1), sector: 0) == 0)
    fixture.driver.registers.write(0x120, width: 1, 0)
    plan.add(.init([.write], result: -5, count: 1))
    #expect(try fixture.guest.write(block(1), sector: 0) == 1)
    fixture.driver.registers.write(0x120, width: 1, 1)
    #expect(try fixture.guest.flush() == 1)
  }

  /// Where nothing is between the device and its store, a flush that fails is a request like others.
  @Test func flushOfADirectImageIsRetried() throws {
    let plan = FaultPlan()
    var settings = settings(direct: true)
    settings.errors.onError = .retry(milliseconds: 10_000)
    let fixture = try BlockFixture(settings, decorate: { engine, _ in FaultyEngine(engine, plan) })
    defer { fixture.stop() }
    guard fixture.backend.isDirect else { return }
    plan.add(.init([.flush], result: -5, count: 3))
    #expect(try fixture.guest.flush() == 0)
    #expect(plan.injected == 3)
  }

  // MARK: Another backend

  private final class Notes: Sendable {
    let durable = Mutex<[Bool]>([])
    let flushFault = Atomic<Int>(0)
  }

  private final class Witness: EngineDecorator {
    let engine: any BlockEngine
    private let notes: Notes
    init(_ engine: any BlockEngine, _ notes: Notes) {
      self.engine = engine
      self.notes = notes
    }
    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      for index in 0..<count where requests[index].operation == .write {
        notes.durable.withLock { $0.append(requests[index].isDurable) }
      }
      engine.submit(requests, count: count)
    }
  }

  private func fixture(_ notes: Notes, _ plan: FaultPlan) throws -> DeviceFixture {
    var settings = settings()
    settings.errors.onError = .hold
    let final = settings
    return try DeviceFixture(deviceID: 2, queueCount: 1) { context, completion in
      BlockBackend.start(final, context, decorate: { engine, _ in Witness(FaultyEngine(engine, plan), notes) }) {
        completion($0.map { $0 })
      }
    }
  }

  private func write(_ fixture: DeviceFixture, type: UInt32 = 1) -> UInt64 {
    let place = fixture.buffers
    fixture.put([UInt8(type), 0, 0, 0] + [UInt8](repeating: 0, count: 12), at: place)
    fixture.put([0xee], at: place + 8192)
    var chain: [SimulatedDriver.Buffer] = [.init(place, 16, writable: false)]
    if type == 1 { chain.append(.init(place + 4096, 4096, writable: false)) }
    _ = fixture.driver.add(chain + [.init(place + 8192, 1, writable: true)])
    fixture.driver.notify()
    return place + 8192
  }

  /// The driver chose write-through, and its requests are in flight when the backend goes: the next one's first writes are durable.
  @Test func choiceOfTheDriverHoldsForWhatAnotherBackendAdopts() throws {
    let (notes, plan) = (Notes(), FaultPlan())
    let fixture = try fixture(notes, plan)
    defer { fixture.stop() }
    fixture.driver.registers.write(0x120, width: 1, 0)
    plan.add(.init([.write], result: -5))
    let status = write(fixture)
    #expect(eventually { notes.durable.withLock { $0 } == [true] })
    // It ends with the request in its journal, unanswered.
    for _ in 0..<10 { try fixture.exchange() }
    try fixture.exchange { plan.clear() }
    #expect(fixture.waitForUsed(0)?.length == 1)
    #expect(fixture.bytes(at: status, count: 1) == [0])
    #expect(notes.durable.withLock { $0 }.allSatisfy { $0 })
  }

  /// A backend that adopts the queue has an open file that was never told of the loss.
  @Test func flushFaultOutlivesTheBackend() throws {
    let (notes, plan) = (Notes(), FaultPlan())
    let fixture = try fixture(notes, plan)
    defer { fixture.stop() }
    plan.add(.init([.flush], result: -5, count: 1))
    var status = write(fixture, type: 4)
    #expect(fixture.waitForUsed(0) != nil)
    #expect(fixture.bytes(at: status, count: 1) == [1])
    try fixture.exchange()
    status = write(fixture, type: 4)
    #expect(fixture.waitForUsed(0) != nil)
    #expect(fixture.bytes(at: status, count: 1) == [1])
  }
}
