import ControlAPI
import DeviceHost
import Devices
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import Synchronization
import TestSupport
import Testing
import Virtqueue
import Xen

/// Devices over Xenbus: grants, channels and nodes, with a frontend that follows the protocol.
@Suite struct XenbusTests {
  private let plan = FaultPlan()

  private func world(
    profiles: String? = nil, _ change: (inout SupervisorSettings) -> Void = { _ in }
  ) throws -> (World, SimulatedDomain) {
    let world = try World()
    let domain = try world.domain(5, name: "web1", type: "pvh")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    let plan = plan
    try world.start(profiles: profiles) {
      $0.decorate = { engine, _ in FaultyEngine(engine, plan) }
      change(&$0)
    }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    return (world, domain)
  }

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  private func load(_ domain: SimulatedDomain, _ guest: SimulatedBlockGuest, depth: Int = 16) -> CheckingGuest {
    CheckingGuest(
      domain: domain, driver: guest.driver, depth: depth, blocks: 256, area: guest.driver.areaEnd + 8192, seed: 3)
  }

  private func expectNothingLeft(_ domain: SimulatedDomain, _ world: World) {
    #expect(eventually { domain.grants.mappedPages == 0 && domain.grants.boundPorts == 0 })
    #expect(eventually { world.info("grantedPages") == 0 })
  }

  // MARK: Life

  @Test func guestReadsAndWritesAndLeavesNothingBehind() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(registers.isConnected)
    #expect(guest.driver.features.isSuperset(of: [.indirectDescriptors, .eventIndex]))
    #expect(try guest.write(block(7), sector: 8) == 0)
    #expect(try guest.flush() == 0)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block(7))
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    let device = world.device("web1", "xvde")
    #expect(device["transport"] == "xenbus")
    #expect(device["grants"]?["access"] == "mapped")
    #expect(device["grants"]?["mapCalls"] == 1)
    #expect(world.metrics.contains("\nvxd_event_channels 1\n"))
    // No privilege was used.
    #expect(domain.usage == .init())
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    expectNothingLeft(domain, world)
    #expect(world.metrics.contains("\nvxd_event_channels 0\n"))
    #expect(registers.revokeAll() == 0)
  }

  @Test(arguments: [
    (nil, "1024"), (#"{"version": 1, "disks": [{"queueSize": 128, "queues": 2}]}"#, "128,128"),
  ])
  func ringsAreLargeUnlessAProfileSaysOtherwise(_ profiles: String?, _ sizes: String) throws {
    let (world, _) = try world(profiles: profiles)
    defer { world.end() }
    let offer = try #require(world.toolstack.value("vx-offer", disk: "xvde", of: 5))
    #expect(offer.split(separator: " ").contains("sizes=\(sizes)"))
  }

  @Test func driverMayResetAndComeBackAnyNumberOfTimes() throws {
    let (world, domain) = try world()
    defer { world.end() }
    for round in 0..<15 {
      let (guest, registers) = try world.bootXenbus(domain)
      #expect(registers.isConnected)
      #expect(try guest.write(block(UInt8(round)), sector: 16) == 0)
      // With a request under way.
      plan.isHolding = true
      guest.putHeader(at: 8 << 20, type: 0, sector: 16)
      let chain: [SimulatedDriver.Buffer] = [
        .init(8 << 20, 16, writable: false), .init(9 << 20, 4096, writable: true),
        .init((9 << 20) + 4096, 1, writable: true),
      ]
      #expect(guest.driver.add(chain) != nil)
      guest.driver.notify()
      #expect(eventually { registers.inFlight(0).count == 1 })
      let held = try LatchedRelease(plan)
      guest.driver.reset()
      held.join()
      #expect(domain.grants.mappedPages == 0)
      #expect(domain.grants.boundPorts == 0)
      #expect(registers.revokeAll() == 0)
    }
  }

  /// Lets the store work again a moment later, from another thread: a reset waits for what reaches guest memory.
  private final class LatchedRelease {
    private let thread: LoopThread
    private let latch = Latch()

    init(_ plan: FaultPlan) throws(Errno) {
      thread = try LoopThread(name: "release")
      let (loop, latch) = (thread.loop, latch)
      loop.enqueue {
        loop.schedule(afterMilliseconds: 20) {
          plan.isHolding = false
          latch.open()
        }
      }
    }

    func join() {
      latch.wait()
      thread.stopAndJoin()
    }
  }

  @Test func inFlightAreaNamesTheChainsThatTheDeviceHas() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(domain)
    plan.isHolding = true
    var heads: Set<Int> = []
    for index in 0..<5 {
      let at = UInt64(8 << 20) + UInt64(index) * 8192
      guest.putHeader(at: at, type: 0, sector: 0)
      let head = guest.driver.add([
        .init(at, 16, writable: false), .init(at + 64, 512, writable: true), .init(at + 32, 1, writable: true),
      ])
      heads.insert(Int(try #require(head)))
    }
    guest.driver.notify()
    #expect(eventually { Set(registers.inFlight(0)) == heads })
    plan.isHolding = false
    guest.driver.notify()
    for _ in 0..<5 { _ = try guest.waitForUsed() }
    // A chain leaves the area when its answer is published.
    #expect(eventually { registers.inFlight(0).isEmpty })
  }

  @Test(arguments: [1, 32]) func steadyStateCostsNoMappingAndLessThanOneNotification(depth: Int) throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, _) = try world.bootXenbus(domain)
    let load = load(domain, guest, depth: depth)
    try load.run { load.answered > 500 }
    let before = (
      load.answered, domain.grants.mapCalls.load(ordering: .relaxed), domain.grants.sent.load(ordering: .relaxed),
      domain.grants.received.load(ordering: .relaxed), domain.grants.copies.load(ordering: .relaxed)
    )
    try load.run { load.answered > 4500 }
    let requests = load.answered - before.0
    #expect(domain.grants.mapCalls.load(ordering: .relaxed) == before.1)
    #expect(domain.grants.copies.load(ordering: .relaxed) == before.4)
    let sent = domain.grants.sent.load(ordering: .relaxed) - before.2
    let received = domain.grants.received.load(ordering: .relaxed) - before.3
    #expect(sent <= requests && received <= requests)
    if depth > 1 { #expect(sent < requests && received < requests) }
    print("depth \(depth): \(requests) requests, \(sent) notifications, \(received) interrupts, 0 mapping calls")
  }

  @Test func configurationWritesAndChangesGoBothWays() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(registers.read(0x100 + 32, width: 1) == 1)
    registers.write(0x100 + 32, width: 1, 0)
    #expect(eventually { registers.configuration.count > 32 && registers.configuration[32] == 0 })
    #expect(registers.read(0x100, width: 8) == 8192)
    let answer = world.call("device.resize", ["guest": "web1", "device": "xvde", "bytes": 8_388_608])
    #expect(answer["accepted"] == true)
    #expect(eventually { registers.read(0x100, width: 8) == 16384 })
    #expect(try guest.write(block(1), sector: 16384 - 8) == 0)
  }

  @Test func unplugWaitsForTheDriver() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    try world.toolstack.set("online", "0", disk: "xvde", of: 5)
    try world.toolstack.set("state", "5", disk: "xvde", of: 5)
    // The driver ends its requests first, and may.
    for sector in 0..<20 { #expect(try guest.write(block(9), sector: UInt64(sector) * 8) == 0) }
    world.settle()
    #expect(world.toolstack.value("state", disk: "xvde", of: 5) == "5")
    try registers.xenstore.write("\(registers.frontend)/state", "5")
    #expect(registers.wait(for: "6"))
    expectNothingLeft(domain, world)
    #expect(eventually { world.state("web1", "xvde") == nil })
  }

  @Test func frontendThatVanishesLeavesNothing() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    try world.toolstack.removeFrontend(of: 5)
    expectNothingLeft(domain, world)
    #expect(registers.revokeAll() == 0)
    #expect(eventually { world.toolstack.value("state", disk: "xvde", of: 5) == "6" })
  }

  /// The store still reads and writes the arena for a backend that is being stopped.
  @Test(arguments: ["reset", "vanish"]) func arenaStaysMappedUntilABackendThatIsStoppedIsDone(end: String) throws {
    let (world, domain) = try world()
    defer { world.end() }
    try world.toolstack.attach(disk: "xvdf", image: world.image("second.img"), to: 5)
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    plan.isHolding = true
    defer { plan.isHolding = false }
    guest.putHeader(at: 8 << 20, type: 0, sector: 16)
    _ = guest.driver.add([
      .init(8 << 20, 16, writable: false), .init(9 << 20, 4096, writable: true),
      .init((9 << 20) + 4096, 1, writable: true),
    ])
    guest.driver.notify()
    #expect(eventually { registers.inFlight(0).count == 1 })
    let mapped = domain.grants.mappedPages
    #expect(world.call("device.pause", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(eventually { world.state("web1", "xvde") == "paused" })
    if end == "reset" {
      try registers.xenstore.write("\(registers.frontend)/state", "5")
    } else {
      try registers.xenstore.remove(registers.frontend)
    }
    // What another device of the guest does comes behind that, on the same threads.
    let other = try XenbusRegisters(server: world.server, domain: domain, disk: "xvdf")
    #expect(other.wait(for: "2"))
    try other.xenstore.write("\(other.frontend)/vx-setup", "1 0")
    try other.xenstore.write("\(other.frontend)/state", "3")
    #expect(eventually { other.acknowledgement.hasPrefix("1 error") })
    #expect(domain.grants.mappedPages == mapped)
    #expect(domain.grants.boundPorts == 1)
    #expect(world.toolstack.value("state", disk: "xvde", of: 5) == "4")
    plan.isHolding = false
    #expect(registers.wait(for: "6"))
    #expect(domain.grants.mappedPages == 0)
    #expect(domain.grants.boundPorts == 0)
    #expect(registers.revokeAll() == 0)
  }

  // MARK: Failures of the backend

  @Test func backendThatFailsIsStartedAgainAndNothingIsLost() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, _) = try world.bootXenbus(domain)
    let load = load(domain, guest)
    var rounds = 0
    try load.run {
      if load.answered > UInt64(rounds + 1) * 300, rounds < 3, world.state("web1", "xvde") == "connected" {
        rounds += 1
        plan.add(FaultPlan.Fault(result: -19, count: 1))
      }
      // Not before the last fault has hit somebody.
      return load.answered > 3000 && world.reasons(.deviceRestarted).count == 3
    }
    #expect(world.device("web1", "xvde")["counters"]?["failed"] == 0)
  }

  @Test func guestGoesOnWithTheNextSupervisor() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1", type: "pv")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    let plan = plan
    func start() throws {
      try world.start {
        $0.stateFolder = folder
        $0.decorate = { engine, _ in FaultyEngine(engine, plan) }
      }
    }
    try start()
    let (guest, registers) = try world.bootXenbus(domain)
    let sequence = registers.sequence
    let load = load(domain, guest)
    var turns = 0
    try load.run {
      if load.answered > UInt64(turns + 1) * 400, turns < 4 {
        turns += 1
        world.stop()
        #expect(domain.grants.mappedPages == 0 && domain.grants.boundPorts == 0)
        do { try start() } catch { Issue.record("\(error)") }
      }
      return load.answered > 2500 && turns == 4
    }
    // The same life: nothing was negotiated anew.
    #expect(registers.sequence == sequence)
    #expect(eventually { world.reasons(.deviceAdopted).count == 4 })
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    expectNothingLeft(domain, world)
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty })
  }

  @Test func setupThatChangedWhileNobodyLookedIsNotGoneOnWith() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1", type: "pvh")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start { $0.stateFolder = folder }
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    // Another ring than the journal knows.
    let setup = domain.memory.pointer(UInt64(domain.memory.pageCount - 1) << 12)
    setup.storeBytes(of: 2 << 20, toByteOffset: 0x110, as: UInt64.self)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { registers.acknowledgement.contains("has changed since") })
    #expect(eventually { world.state("web1", "xvde") == "faulted" })
    #expect(registers.backendStatus & 0x40 != 0)
    guest.driver.reset()
    let again = try world.bootXenbus(domain)
    #expect(again.registers.isConnected)
    #expect(try again.guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  @Test func driverOfADeviceThatNobodyRemembersIsToldToReset() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    // Without a folder for state: as if it had been lost.
    world.stop()
    try world.start()
    #expect(eventually { registers.backendStatus & 0x40 != 0 })
    #expect(eventually { world.state("web1", "xvde") == "faulted" })
    guest.driver.reset()
    let again = try world.bootXenbus(domain)
    #expect(try again.guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  // MARK: Want of room

  @Test func arenaThatCannotBeMappedAsAWholeIsCopied() throws {
    let (world, domain) = try world()
    defer { world.end() }
    domain.grants.largeMapFailures.store(.max, ordering: .relaxed)
    let (guest, _) = try world.bootXenbus(domain)
    #expect(world.device("web1", "xvde")["grants"]?["access"] == "copied")
    let load = load(domain, guest, depth: 8)
    try load.run { load.answered > 800 }
    #expect(world.device("web1", "xvde")["counters"]?["failed"] == 0)
    #expect(world.device("web1", "xvde")["grants"]?["copiedBytes"]?.integerValue ?? 0 > 400 * 4096)
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    expectNothingLeft(domain, world)
  }

  @Test func budgetThatIsUsedUpMeansCopiesNotErrors() throws {
    let (world, domain) = try world { $0.grantBudget = 64 }
    defer { world.end() }
    let (guest, _) = try world.bootXenbus(domain)
    #expect(world.device("web1", "xvde")["grants"]?["access"] == "copied")
    #expect(try guest.write(block(3), sector: 0) == 0)
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(3))
    #expect(world.info("grantedPages") ?? 99 <= 64)
  }

  @Test func guestWaitsWhileThereIsNoRoomAtAll() throws {
    let (world, domain) = try world()
    defer { world.end() }
    domain.grants.mapFailures.store(8, ordering: .relaxed)
    let (guest, registers) = try world.bootXenbus(domain)
    #expect(registers.isConnected)
    #expect(domain.grants.mapFailures.load(ordering: .relaxed) == 0)
    #expect(try guest.write(block(3), sector: 0) == 0)
    world.settle()
    #expect(!world.eventKinds.contains(.deviceFaulted))
  }
}
