import DeviceHost
import Devices
import EventLoop
import SimulatedXen
import Supervisor
import Synchronization
import TestSupport
import Testing
import Virtqueue

/// What guest and operator see when the storage fails.
@Suite struct ErrorPolicyTests {
  private static let inputOutput = -5  // EIO
  private static let noSpace = -28  // ENOSPC
  private static let again = -11  // EAGAIN

  private let folder = TemporaryFolder()
  private let plan = FaultPlan()
  private let reports = Reports()

  private final class Reports: Sendable {
    let all = Mutex<[String]>([])
    func add(_ report: DeviceReport) {
      let text =
        switch report {
        case .fault(let fault): "fault \(fault.message)"
        case .held(let queue, let result): "held \(queue) \(result)"
        case .resumed(let queue): "resumed \(queue)"
        case .storageLost(let reason): "lost \(reason)"
        case .portsOpen(let mask): "ports \(mask)"
        case .storageBack: "back"
        case .storageGone(let result): "gone \(result)"
        }
      all.withLock { $0.append(text) }
    }
    var list: [String] { all.withLock { $0 } }
  }

  private func fixture(
    direct: Bool = true, _ change: (inout BlockErrorPolicy) -> Void = { _ in }
  ) throws -> BlockFixture {
    var settings = BlockSettings(
      path: folder.file("disk.img", bytes: 16 << 20), readOnly: false, discard: true, serial: "xvde")
    settings.direct = direct
    settings.stuckMilliseconds = 20
    settings.errors.retryPause = 5
    change(&settings.errors)
    let (plan, reports) = (plan, reports)
    return try BlockFixture(
      settings, decorate: { engine, _ in FaultyEngine(engine, plan) }, report: { reports.add($0) })
  }

  private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

  /// A request that is not waited for; its status byte is at the returned address.
  private func start(_ fixture: BlockFixture, type: UInt32, sector: UInt64, slot: Int) -> UInt64 {
    let place = fixture.guest.dataAddress + 0x100000 + UInt64(slot) * 0x3000
    fixture.guest.putHeader(at: place, type: type, sector: sector)
    fixture.driver.memory.pointer(place + 32).storeBytes(of: 0xee, as: UInt8.self)
    fixture.driver.memory.pointer(place + 0x1000).initializeMemory(
      as: UInt8.self, repeating: UInt8(slot + 1), count: 4096)
    var chain: [SimulatedDriver.Buffer] = [.init(place, 16, writable: false)]
    if type < 2 { chain.append(.init(place + 0x1000, 4096, writable: type == 0)) }
    chain.append(.init(place + 32, 1, writable: true))
    #expect(fixture.driver.add(chain) != nil)
    fixture.driver.notify()
    return place + 32
  }

  private func status(_ fixture: BlockFixture, _ address: UInt64) -> UInt8 {
    fixture.driver.memory.pointer(address).load(as: UInt8.self)
  }

  @Test(arguments: [inputOutput, noSpace]) func reportedErrorFailsThatRequestOnly(result: Int) throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    plan.add(.init([.write], result: result, count: 1))
    #expect(try fixture.guest.write(block(1), sector: 0) == 1)
    #expect(try fixture.guest.write(block(2), sector: 0) == 0)
    #expect(try fixture.guest.read(sector: 0, count: 4096).bytes == block(2))
    #expect(eventually { fixture.backend.counters[0].failed.value == 1 })
  }

  @Test(arguments: [BlockOperation.read, .write, .flush, .discard]) func everyOperationIsRetried(
    operation: BlockOperation
  )
    throws
  {
    let fixture = try fixture { $0.onError = .retry(milliseconds: 10_000) }
    defer { fixture.stop() }
    #expect(try fixture.guest.write(block(7), sector: 0) == 0)
    plan.add(.init([operation], result: Self.inputOutput, count: 3))
    switch operation {
    case .read: #expect(try fixture.guest.read(sector: 0, count: 4096).bytes == block(7))
    case .write: #expect(try fixture.guest.write(block(8), sector: 0) == 0)
    case .flush: #expect(try fixture.guest.flush() == 0)
    default:
      let range = fixture.driver.memory.pointer(fixture.guest.dataAddress)
      range.storeBytes(of: 0, as: UInt64.self)
      range.storeBytes(of: 8, toByteOffset: 8, as: UInt64.self)
      #expect(
        try fixture.guest.request(
          type: 11, sector: 0, data: [.init(fixture.guest.dataAddress, 16, writable: false)]
        ).status == 0)
    }
    #expect(plan.injected == 3)
    #expect(eventually { fixture.backend.counters[0].retries.value == 3 })
    fixture.settle()
    #expect(fixture.backend.counters[0].failed.value == 0)
  }

  @Test func retryEndsAtItsDeadlineWithAnError() throws {
    let fixture = try fixture { $0.onError = .retry(milliseconds: 60) }
    defer { fixture.stop() }
    plan.add(.init([.write], result: Self.inputOutput))
    let start = EventLoop.now()
    #expect(try fixture.guest.write(block(1), sector: 0) == 1)
    #expect(EventLoop.now() - start >= 60_000_000)
    plan.clear()
    #expect(try fixture.guest.write(block(1), sector: 0) == 0)
  }

  /// The engine was short of something: whatever the policy, the guest sees a pause.
  @Test(arguments: [true, false]) func shortageIsRetriedUnderAnyPolicy(direct: Bool) throws {
    let fixture = try fixture(direct: direct)
    defer { fixture.stop() }
    plan.add(.init(result: Self.again, count: 2))
    #expect(try fixture.guest.write(block(3), sector: 8) == 0)
    #expect(try fixture.guest.read(sector: 8, count: 4096).bytes == block(3))
    #expect(plan.injected == 2)
  }

  @Test func heldQueueStopsAndResumeCompletesEverything() throws {
    let fixture = try fixture { $0.onNoSpace = .hold }
    defer { fixture.stop() }
    plan.add(.init([.write], result: Self.noSpace))
    let first = start(fixture, type: 1, sector: 0, slot: 0)
    #expect(eventually { reports.list == ["held 0 -28"] })
    let later = (1..<6).map { start(fixture, type: 1, sector: UInt64($0) * 8, slot: $0) }
    // Still failing: a resume before there is room holds again.
    fixture.backend.resume()
    #expect(eventually { reports.list.count >= 3 })
    fixture.settle()
    #expect(reports.list.last == "held 0 -28")
    #expect(status(fixture, first) == 0xee)
    plan.clear()
    fixture.backend.resume()
    for _ in 0..<6 { _ = try fixture.guest.waitForUsed() }
    for address in [first] + later { #expect(status(fixture, address) == 0) }
    fixture.settle()
    #expect(reports.list.last == "resumed 0")
    for slot in 0..<6 {
      #expect(try fixture.guest.read(sector: UInt64(slot) * 8, count: 4096).bytes == block(UInt8(slot + 1)))
    }
    #expect(fixture.backend.counters[0].failed.value == 0)
  }

  @Test func holdIsForNoSpaceAloneWhereSoSaid() throws {
    let fixture = try fixture { $0.onNoSpace = .hold }
    defer { fixture.stop() }
    plan.add(.init([.write], result: Self.inputOutput, count: 1))
    #expect(try fixture.guest.write(block(1), sector: 0) == 1)
    fixture.settle()
    #expect(reports.list.isEmpty)
  }

  @Test func resetOfAHeldDeviceLeavesAWorkingOne() throws {
    let fixture = try fixture { $0.onError = .hold }
    defer { fixture.stop() }
    plan.add(.init([.write], result: Self.inputOutput))
    _ = start(fixture, type: 1, sector: 0, slot: 0)
    #expect(eventually { reports.list == ["held 0 -5"] })
    plan.clear()
    fixture.driver.reset()
    #expect(eventually { reports.list.last == "resumed 0" })
    try fixture.driver.start(wanted: [.eventIndex, .indirectDescriptors])
    #expect(try fixture.guest.write(block(9), sector: 0) == 0)
    #expect(eventually { fixture.backend.counters[0].inFlight.load(ordering: .relaxed) == 0 })
  }

  @Test func delayedCompletionIsFoundByTheWatchdogWithQueueAndLayer() throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    plan.isHolding = true
    let address = start(fixture, type: 1, sector: 0, slot: 0)
    #expect(eventually { fixture.backend.stuckRequest(at: EventLoop.now()) != nil })
    let stuck = try #require(fixture.backend.stuckRequest(at: EventLoop.now()))
    #expect((stuck.queue, stuck.layer) == (0, .engine))
    #expect(stuck.age >= 20)
    plan.isHolding = false
    fixture.backend.resume()  // the engine's wake-up has been taken: any run of the queue brings the answer
    _ = try fixture.guest.waitForUsed()
    #expect(status(fixture, address) == 0)
    #expect(eventually { fixture.backend.stuckRequest(at: EventLoop.now()) == nil })
  }

  @Test func requestThatIsRetriedForLongIsReportedAsSuch() throws {
    let fixture = try fixture { $0.onError = .retry(milliseconds: 60_000) }
    defer { fixture.stop() }
    plan.add(.init([.write], result: Self.inputOutput))
    _ = start(fixture, type: 1, sector: 0, slot: 0)
    #expect(eventually { fixture.backend.stuckRequest(at: EventLoop.now())?.layer == .retry })
    plan.clear()
    _ = try fixture.guest.waitForUsed()
  }

  /// The driver begins again while the store keeps eight of its requests.
  private func resetWithRequestsInTheStore(_ fixture: BlockFixture) throws {
    plan.isHolding = true
    for slot in 0..<8 { _ = start(fixture, type: UInt32(slot & 1), sector: UInt64(slot) * 8, slot: slot) }
    #expect(eventually { fixture.backend.counters[0].inFlight.load(ordering: .relaxed) == 8 })
    fixture.driver.reset()
    try fixture.driver.start(wanted: [.eventIndex])
  }

  /// 2.4: a completion of the old life never reaches the new one.
  @Test func completionOfAnEarlierLifeIsDropped() throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    for _ in 0..<20 {
      try resetWithRequestsInTheStore(fixture)
      let address = start(fixture, type: 4, sector: 0, slot: 20)
      fixture.settle()
      #expect(fixture.driver.takeUsed() == nil)
      plan.isHolding = false
      fixture.backend.resume()
      let used = try fixture.guest.waitForUsed()
      #expect(used.length == 1)
      #expect(status(fixture, address) == 0)
      fixture.settle()
      #expect(fixture.driver.takeUsed() == nil)
    }
  }

  /// The last completion of the old life comes while the pump is at work, behind its look at the ring: nobody wakes it for that request again.
  @Test(arguments: 0...3) func requestBehindAnEarlierLifeIsServedWheneverThatEnds(looks: Int) throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    for _ in 0..<4 {
      try resetWithRequestsInTheStore(fixture)
      let address = start(fixture, type: 0, sector: 0, slot: 20)
      fixture.settle()
      plan.late = looks
      plan.isHolding = false
      // One run, which is all that there may be: completions that are there already wake nobody.
      fixture.backend.resume()
      if looks > 1 {
        fixture.settle()
        fixture.backend.resume()
      }
      _ = try fixture.guest.waitForUsed()
      #expect(status(fixture, address) == 0)
      plan.late = 0
    }
  }
}
