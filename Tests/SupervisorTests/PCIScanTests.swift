import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@testable import Supervisor

/// What a guest finds that looks through its PCI bus before vxd has asked QEMU what it has there.
@Suite struct PCIScanTests {
  static let (ours, disputed) = (PCIAddress(device: 16), PCIAddress(device: 5))
  static let block: UInt64 = 0x1042_1af4
  static let profile =
    #"{"version": 1, "disks": [{"guest": "web*", "device": "xvdf", "slot": 5}], "guests": [{"guest": "web*", "transport": "pci"}]}"#

  /// A supervisor that asks nobody by itself, and a guest with two disks, of which one is in the disputed place.
  func start(_ world: World, tick: UInt64 = 600_000) throws -> SimulatedDomain {
    try start(world, by: Self.profile, tick: tick)
    let domain = try world.domain(5, name: "web1")
    for disk in ["xvde", "xvdf"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    // Both are there before the guest can run.
    #expect(domain.claimedFunctions == [Self.disputed, Self.ours])
    return domain
  }

  func start(_ world: World, by profile: String, tick: UInt64 = 600_000) throws {
    let folder = world.folder.path
    let state = try StateFolder(path: folder + "/state")
    try world.start(profiles: profile) {
      $0.qemuFolder = folder
      $0.stateFolder = state
      $0.xenstoreCheckMilliseconds = tick
    }
  }

  func monitor(_ world: World, slot: Int?) throws -> MonitorOfQEMU {
    try MonitorOfQEMU(
      path: world.folder.path + "/qmp-libxenstat-5",
      devices: slot.map { #"{"bus": 0, "slot": 1, "function": 0}, {"bus": 0, "slot": \#($0), "function": 0}"# })
  }

  func identity(_ domain: SimulatedDomain, _ function: PCIAddress) -> UInt64 {
    domain.configurationAccess(vcpu: 0, function, register: 0, size: 4) & 0xffff_ffff
  }

  /// Has a driver take a function's disk into use.
  func drive(_ domain: SimulatedDomain, _ function: PCIAddress, disk: String, _ world: World) throws {
    let registers = try PCIFunctionRegisters(
      domain: domain, function: function, base: 0xf300_0000, interrupts: .messages)
    try SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20).start(
      wanted: [.eventIndex], queueSize: 64)
    #expect(eventually { world.state("web1", disk) == "connected" })
  }

  @Test(arguments: [true, false]) func placeOfQEMUsIsEmptyForTheFirstLook(atThatPlace: Bool) throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    let monitor = try monitor(world, slot: 5)
    // Whatever the guest looks at first.
    if !atThatPlace { #expect(identity(domain, Self.ours) == Self.block) }
    #expect(identity(domain, Self.disputed) == 0xffff_ffff)
    #expect(domain.claimedFunctions == [Self.ours])
    #expect(identity(domain, Self.ours) == Self.block)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    let reason = world.device("web1", "xvdf")["reason"]?.stringValue ?? ""
    #expect(reason.contains("QEMU has PCI device 5 (00:05.0) too"), "\(reason)")
    #expect(world.state("web1", "xvde") == "ready")
    monitor.end()
  }

  @Test func guestOfAQEMUThatHasOtherPlacesFindsBoth() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    let monitor = try monitor(world, slot: 6)
    #expect(identity(domain, Self.disputed) == Self.block && identity(domain, Self.ours) == Self.block)
    monitor.end()
    world.settle()
    #expect(world.state("web1", "xvdf") == "ready" && world.state("web1", "xvde") == "ready")
  }

  @Test func guestWithoutAMonitorDoesNotWait() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    let begun = EventLoop.now()
    #expect(identity(domain, Self.disputed) == Self.block)
    #expect(EventLoop.now() - begun < 2_000_000_000)
  }

  @Test func hungQEMUHoldsTheGuestForSomeSecondsOnly() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    let monitor = try monitor(world, slot: nil)
    let begun = EventLoop.now()
    #expect(identity(domain, Self.disputed) == Self.block)
    #expect(EventLoop.now() - begun < 10_000_000_000)
    monitor.end()
    #expect(identity(domain, Self.ours) == Self.block)
  }

  /// A guest that was let look without an answer: what it has not touched is taken out of QEMU's place when there is one.
  @Test func placeOfAQEMUThatAnswersTooLateIsEmptyForTheNextLook() throws {
    let world = try World()
    defer { world.end() }
    let hung = try monitor(world, slot: nil)
    let domain = try start(world, tick: 50)
    #expect(identity(domain, Self.disputed) == Self.block)
    hung.end()
    unlink(world.folder.path + "/qmp-libxenstat-5")
    let monitor = try monitor(world, slot: 5)
    #expect(eventually { domain.claimedFunctions == [Self.ours] })
    monitor.end()
    #expect(identity(domain, Self.disputed) == 0xffff_ffff && identity(domain, Self.ours) == Self.block)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    // The next daemon does not put it back, although a driver is at work with the other.
    try drive(domain, Self.ours, disk: "xvde", world)
    unlink(world.folder.path + "/qmp-libxenstat-5")
    world.stop()
    let last = try self.monitor(world, slot: 5)
    try start(world, by: Self.profile, tick: 50)
    last.isAsked.wait()
    last.end()
    #expect(eventually { world.state("web1", "xvdf") == "failed" && world.state("web1", "xvde") == "connected" })
    #expect(eventually { domain.claimedFunctions == [Self.ours] })
  }

  /// libxl gives QEMU more once it runs, before it lets the guest run: what QEMU has is asked when the guest looks, not before.
  @Test func deviceThatQEMUGetsBeforeTheGuestRunsIsKnown() throws {
    let world = try World()
    defer { world.end() }
    let path = world.folder.path + "/qmp-libxenstat-5"
    let early = try monitor(world, slot: 6)
    let domain = try start(world, tick: 20)
    world.settle()
    early.end()
    unlink(path)
    let monitor = try monitor(world, slot: 5)
    #expect(identity(domain, Self.disputed) == 0xffff_ffff && identity(domain, Self.ours) == Self.block)
    monitor.end()
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
  }

  private static let plain = #"{"version": 1, "guests": [{"guest": "web*", "transport": "pci"}]}"#

  /// One that was in QEMU's place gets another when it is tried again, and has it with the next daemon; others go around what QEMU has, also
  /// before that has been asked for once more.
  @Test func devicesGoAroundWhatQEMUHas() throws {
    let world = try World()
    defer { world.end() }
    try start(world, by: Self.plain)
    let domain = try world.domain(5, name: "web1")
    func attach(_ disk: String) throws {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    for disk in ["xvde", "xvdf"] { try attach(disk) }
    let monitor = try MonitorOfQEMU(
      path: world.folder.path + "/qmp-libxenstat-5",
      devices: #"{"bus": 0, "slot": 17, "function": 0}, {"bus": 0, "slot": 19, "function": 0}"#)
    #expect(identity(domain, Self.ours) == Self.block)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    monitor.end()
    unlink(world.folder.path + "/qmp-libxenstat-5")
    #expect(world.call("device.restart", ["guest": "web1", "device": "xvdf"])["accepted"] == true)
    #expect(eventually { world.state("web1", "xvdf") == "ready" })
    for disk in ["xvdg", "xvdh"] { try attach(disk) }
    #expect(eventually { ["xvdg", "xvdh"].allSatisfy { world.state("web1", $0) == "ready" } })
    let places = [16, 18, 20, 21].map { PCIAddress(device: $0) }
    #expect(domain.claimedFunctions == places)
    world.stop()
    try start(world, by: Self.plain)
    #expect(eventually { ["xvde", "xvdf", "xvdg", "xvdh"].allSatisfy { world.state("web1", $0) == "ready" } })
    #expect(domain.claimedFunctions == places)
  }

  /// QEMU's device is detached, and the operator tries again.
  @Test func deviceComesBackWhenQEMUsIsGone() throws {
    let world = try World()
    defer { world.end() }
    let path = world.folder.path + "/qmp-libxenstat-5"
    let domain = try start(world, tick: 20)
    let first = try monitor(world, slot: 5)
    #expect(identity(domain, Self.disputed) == 0xffff_ffff)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    first.end()
    unlink(path)
    let second = try monitor(world, slot: 6)
    // The first try asks QEMU once more.
    _ = world.call("device.restart", ["guest": "web1", "device": "xvdf"])
    second.isAsked.wait()
    second.end()
    world.settle()
    #expect(
      eventually {
        _ = world.call("device.restart", ["guest": "web1", "device": "xvdf"])
        return world.state("web1", "xvdf") == "ready"
      })
    #expect(identity(domain, Self.disputed) == Self.block)
  }

  /// A driver at work neither waits for an answer with the next daemon nor loses its device by it, as when QEMU got the place meanwhile.
  @Test func guestAtWorkNeitherWaitsNorLosesItsFunctionWithTheNextDaemon() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    try drive(domain, Self.disputed, disk: "xvdf", world)
    world.stop()
    let monitor = try monitor(world, slot: 5)
    try start(world, by: Self.profile, tick: 50)
    // What QEMU has is known by then.
    #expect(
      eventually { world.device("web1", "xvdf")["warning"]?.stringValue?.contains("QEMU has PCI device 5 too") == true }
    )
    monitor.end()
    world.settle()
    #expect(world.state("web1", "xvdf") == "connected")
    #expect(domain.claimedFunctions == [Self.disputed, Self.ours])
    #expect(identity(domain, Self.disputed) == Self.block)
    // Nor by a restart of its backend.
    _ = world.call("device.restart", ["guest": "web1", "device": "xvdf"])
    #expect(eventually { world.reasons(.deviceRestarted).count == 1 && world.state("web1", "xvdf") == "connected" })
  }

  /// Where the supervisor does not answer, the guest's thread does.
  @Test func waitEndsByItself() throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "web1")
    var settings = SupervisorSettings()
    settings.longestScanHold = 100
    let isAsked = Latch()
    let host = BusHost(hypervisor: world.hypervisor, settings: settings, grantBudget: GrantBudget(limit: 16)) {
      report in
      if case .scan = report { isAsked.open() }
    }
    let ground = try GuestGround(GuestFacts(domain: 5, isDriverDomain: false, type: "hvm", transport: .pci), host)
    let (bus, server) = (try PCIBus(ground), try ground.registers())
    ground.thread.run { here in
      #expect(server.start(uuid: nil, here) == .serverStarted)
      let number = try? server.server(here).identifier
      #expect(throws: Never.self) { try server.handle.claim(.configuration(Self.ours), for: try #require(number)) }
    }
    #expect(eventually { domain.claimedFunctions == [Self.ours] })
    #expect(identity(domain, Self.ours) == 0xffff_ffff)
    isAsked.wait()
    ground.thread.run { here in server.close(here) }
    ground.thread.stopAndJoin()
    withExtendedLifetime(bus) {}
  }

  /// The daemon dies before it has asked; the next one answers the access.
  @Test func nextDaemonAsksToo() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    world.stop()
    let monitor = try monitor(world, slot: 5)
    let found = Latch()
    let vcpu = try LoopThread(name: "vcpu")
    vcpu.loop.enqueue {
      #expect(identity(domain, Self.disputed) == 0xffff_ffff)
      found.open()
    }
    try start(world, by: Self.profile)
    found.wait()
    vcpu.stopAndJoin()
    monitor.end()
    #expect(domain.claimedFunctions == [Self.ours])
    #expect(identity(domain, Self.ours) == Self.block)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
  }
}
