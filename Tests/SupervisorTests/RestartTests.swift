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
import Xen

/// Backends that fail, and what guest and operator see of it.
@Suite struct RestartTests {
  private let plan = FaultPlan()

  private func world(_ profiles: String = "", faultLimit: Int = 50) throws -> (World, SimulatedDomain) {
    let world = try World()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    let plan = plan
    try world.start(profiles: #"{"version": 1, "disks": [{"guest": "*"\#(profiles)}]}"#) {
      $0.decorate = { engine, _ in FaultyEngine(engine, plan) }
      $0.faultLimit = faultLimit
    }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    return (world, domain)
  }

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  @Test(arguments: [-6, -19, -116]) func storeThatIsGoneIsOpenedAgainAndNothingIsLost(result: Int) throws {
    let (world, domain) = try world()
    defer { world.end() }
    let boot = try world.boot(domain)
    let guest = CheckingGuest(
      domain: domain, driver: boot.driver, depth: 16, blocks: 256, area: boot.driver.areaEnd + 8192, seed: 7)
    var rounds = 0
    try guest.run {
      if guest.answered > UInt64(rounds + 1) * 300, rounds < 3, world.state("web1", "xvde") == "connected" {
        rounds += 1
        plan.add(FaultPlan.Fault(result: result, count: 1))
      }
      // Not before the last fault has hit somebody.
      return guest.answered > 3000 && world.reasons(.deviceRestarted).count == 3
    }
    world.settle()
    #expect(world.reasons(.deviceRestarting).count == 3)
    #expect(world.device("web1", "xvde")["restarts"] == 3)
    #expect(world.device("web1", "xvde")["counters"]?["adopted"]?.integerValue ?? 0 > 0)
    #expect(world.device("web1", "xvde")["counters"]?["failed"] == 0)
  }

  @Test func deviceThatFailsTooOftenIsLeftAloneUntilAnOperatorRestartsIt() throws {
    let (world, domain) = try world(#", "restartLimit": 2"#)
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    plan.add(FaultPlan.Fault(result: -19))
    guest.putHeader(at: 8 << 20, type: 0, sector: 0)
    let chain: [SimulatedDriver.Buffer] = [
      .init(8 << 20, 16, writable: false), .init(9 << 20, 4096, writable: true),
      .init((9 << 20) + 4096, 1, writable: true),
    ]
    #expect(guest.driver.add(chain) != nil)
    guest.driver.notify()
    #expect(eventually { world.state("web1", "xvde") == "quarantined" })
    #expect(world.device("web1", "xvde")["reason"]?.stringValue?.contains("vxctl device restart web1/xvde") == true)
    #expect(world.device("web1", "xvde")["restarts"] == 2)
    world.settle()
    #expect(guest.driver.takeUsed() == nil)
    plan.clear()
    #expect(world.call("device.restart", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    let used = try guest.waitForUsed()
    #expect(used.length == 4097)
    #expect(domain.memory.pointer((9 << 20) + 4096).load(as: UInt8.self) == 0)
    #expect(domain.memory.pointer(9 << 20).load(as: UInt8.self) == 1)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
  }

  @Test func withPolicyNeverTheGuestGetsTheError() throws {
    let (world, domain) = try world(#", "restart": "never""#)
    defer { world.end() }
    let guest = try world.boot(domain)
    plan.add(FaultPlan.Fault(result: -19, count: 1))
    #expect(try guest.write(block(1), sector: 0) == 1)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.settle()
    #expect(!world.eventKinds.contains(.deviceRestarting))
  }

  @Test func imageThatComesLaterIsServedAsSoonAsItIsThere() throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.folder.path + "/late.img", to: 5)
    try world.start()
    #expect(eventually { world.state("web1", "xvde") == "failed" })
    _ = world.image("late.img")
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    #expect(try world.boot(domain).write(block(1), sector: 0) == 0)
  }

  @Test func guestThatBreaksItsQueueTooOftenIsQuarantinedAndItsNeighbourIsNot() throws {
    let (world, domain) = try world(faultLimit: 2)
    defer { world.end() }
    let neighbour = try world.domain(6, name: "good")
    try world.toolstack.attach(disk: "xvde", image: world.image("good"), to: 6)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 6))
    let good = try world.boot(neighbour)
    for _ in 0..<3 {
      let bad = try world.boot(domain)
      bad.driver.jumpAvailable(to: 50000)
      bad.driver.notify()
      #expect(eventually { bad.driver.status & 0x40 != 0 })
    }
    #expect(eventually { world.state("web1", "xvde") == "quarantined" })
    #expect(try good.write(block(2), sector: 0) == 0)
    // A reset does not help; an operator does.
    let bad = try world.boot(domain)
    bad.driver.notify()
    world.settle()
    #expect(world.state("web1", "xvde") == "quarantined")
    #expect(world.call("device.restart", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(try bad.write(block(3), sector: 0) == 0)
  }

  @Test func pausedDeviceMakesItsGuestWaitAndResumeLosesNothing() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(4), sector: 8) == 0)
    #expect(world.call("device.pause", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(eventually { world.state("web1", "xvde") == "paused" && world.device("web1", "xvde")["inFlight"] == nil })
    guest.putHeader(at: 8 << 20, type: 0, sector: 8)
    let chain: [SimulatedDriver.Buffer] = [
      .init(8 << 20, 16, writable: false), .init(9 << 20, 4096, writable: true),
      .init((9 << 20) + 4096, 1, writable: true),
    ]
    #expect(guest.driver.add(chain) != nil)
    guest.driver.notify()
    world.settle()
    #expect(guest.driver.takeUsed() == nil)
    #expect(world.call("device.resume", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(try guest.waitForUsed().length == 4097)
    #expect(domain.memory.pointer(9 << 20).load(as: UInt8.self) == 4)
  }

  @Test func guestMayGoWhileItsDeviceIsPausedOrRestarting() throws {
    let (world, domain) = try world()
    defer { world.end() }
    _ = try world.boot(domain)
    #expect(world.call("device.pause", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(eventually { world.state("web1", "xvde") == "paused" })
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { domain.usage == .init() && world.info("guests") == 0 })
  }
}
