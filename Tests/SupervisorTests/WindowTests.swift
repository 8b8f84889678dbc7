import ControlAPI
import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Xen

@testable import Supervisor

/// Windows in the device tree of a guest on Arm: its kernel looks there whatever becomes of the device, and dies where nobody answers.
@Suite struct WindowTests {
  private func arm(_ world: World) throws -> SimulatedDomain { try world.domain(5, name: "alpha", type: "pvh") }

  private func attach(_ world: World, _ disk: String, base: UInt64 = 0x200_0000, image: String? = nil) throws {
    var changes = SimulatedToolstack.armDisk
    changes["base"] = "\(base)"
    changes["irq"] = "\(33 + (base - 0x200_0000) / 0x200)"
    try world.toolstack.attach(disk: disk, image: image ?? world.image(disk), to: 5, changes: changes)
  }

  private func registers(_ domain: SimulatedDomain, _ base: UInt64 = 0x200_0000) -> TrappedRegisters {
    TrappedRegisters(domain: domain, base: base)
  }

  /// What virtio_mmio_probe finds: a slot, and no device.
  private func expectEmptySlot(_ domain: SimulatedDomain, _ base: UInt64 = 0x200_0000) {
    let registers = registers(domain, base)
    #expect(registers.read(0x000) == 0x7472_6976 && registers.read(0x004) == 2 && registers.read(0x008) == 0)
    registers.write(0x070, 0)
    #expect(domain.aborts.load(ordering: .relaxed) == 0)
  }

  private func isAnswered(_ domain: SimulatedDomain, _ base: UInt64 = 0x200_0000) -> Bool {
    domain.claimedMemory.contains { $0.contains(base) }
  }

  /// What the tests below rest on.
  @Test func accessThatNobodyAnswersIsCounted() throws {
    let world = try World()
    defer { world.end() }
    let domain = try arm(world)
    #expect(registers(domain).read(0x000) == .max)
    #expect(domain.aborts.load(ordering: .relaxed) == 1)
  }

  @Test(arguments: ["no image", "wrong mode", "same image"])
  func refusedDeviceIsAnEmptySlot(why: String) throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try arm(world)
    try attach(world, "xvda")
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    switch why {
    case "no image": try attach(world, "xvdb", base: 0x200_0200, image: "/nowhere/disk.img")
    case "same image": try attach(world, "xvdb", base: 0x200_0200, image: world.folder.path + "/xvda")
    default:
      try world.toolstack.attach(
        disk: "xvdb", image: world.image("b"), to: 5, changes: ["base": "0x2000200", "irq": "34", "mode": "x"])
    }
    // xl goes on with the guest now.
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdb", domain: 5))
    expectEmptySlot(domain, 0x200_0200)
    // The window is claimed first, so that xl goes on; that the image is none is found after it.
    #expect(eventually { world.state("alpha", "xvdb") == "failed" })
    #expect(try world.boot(domain, base: 0x200_0000).write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
    #expect(domain.aborts.load(ordering: .relaxed) == 0)
  }

  /// Nothing is claimed where no device can be, whatever an entry says; the device is refused, and the others are served.
  @Test(arguments: ["0xffffffffffffff00", "0xfffffffffffffe00", "0x2000201", "0x10000000000000"])
  func addressThatIsNoneIsNotClaimed(base: String) throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try arm(world)
    try attach(world, "xvda")
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    try world.toolstack.attach(
      disk: "xvdb", image: world.image("b"), to: 5, changes: ["base": base, "irq": "34"])
    #expect(eventually { world.state("alpha", "xvdb") == "failed" })
    #expect(world.toolstack.value("error", disk: "xvdb", of: 5)?.contains("base") == true)
    #expect(try world.boot(domain, base: 0x200_0000).write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
  }

  /// The toolstack waits until the window is claimed, and lets the guest go on then.
  @Test(arguments: [true, false]) func guestIsNotLetGoOnBeforeItsWindowIsClaimed(isRefused: Bool) throws {
    let world = try World()
    defer { world.end() }
    try world.start { $0.startRetry.firstPause = 10 }
    let domain = try arm(world)
    domain.rangeFailures.store(.max, ordering: .relaxed)
    try attach(world, "xvda", image: isRefused ? "/nowhere" : nil)
    #expect(eventually { world.state("alpha", "xvda") == "failed" })
    #expect(eventually { domain.rangeFailures.load(ordering: .relaxed) < .max - 3 })
    #expect(world.toolstack.value("state", disk: "xvda", of: 5) == "1")
    #expect(world.toolstack.value("error", disk: "xvda", of: 5) != nil)
    domain.rangeFailures.store(0, ordering: .relaxed)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    #expect(isAnswered(domain))
    if isRefused { expectEmptySlot(domain) }
  }

  /// A window that Xen does not give is no matter of the guest's other devices, now or with the next daemon.
  @Test func windowThatIsRefusedKeepsNoServerFromItsStart() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start {
      $0.stateFolder = folder
      $0.startRetry.firstPause = 10
    }
    let domain = try arm(world)
    domain.refusedMemory.withLock { $0 = 0x200_0000...0x200_01ff }
    try attach(world, "xvda")
    #expect(eventually { world.state("alpha", "xvda") == "failed" })
    try attach(world, "xvdb", base: 0x200_0200)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdb", domain: 5))
    #expect(world.toolstack.value("state", disk: "xvda", of: 5) == "1")
    #expect(folder.guest(5)?.windows == [0x200_0200])
    try world.toolstack.removeEntry(disk: "xvda", of: 5)
    #expect(eventually { world.state("alpha", "xvda") == nil })
    world.stop()
    try world.start {
      $0.stateFolder = folder
      $0.startRetry.firstPause = 10
    }
    try #require(eventually { world.state("alpha", "xvdb") == "ready" })
    #expect(try world.boot(domain, base: 0x200_0200).write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
  }

  /// Without a server nobody answers: better no guest than one whose kernel dies.
  @Test func guestIsNotLetGoOnWithoutAServer() throws {
    let world = try World()
    defer { world.end() }
    try world.start { $0.startRetry.firstPause = 10 }
    let domain = try arm(world)
    domain.pageFailures.store(.max, ordering: .relaxed)
    try attach(world, "xvda")
    #expect(eventually { world.state("alpha", "xvda") == "failed" })
    #expect(eventually { domain.pageFailures.load(ordering: .relaxed) < .max - 3 })
    #expect(world.toolstack.value("state", disk: "xvda", of: 5) == "1")
    domain.pageFailures.store(0, ordering: .relaxed)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    #expect(try world.boot(domain, base: 0x200_0000).write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
  }

  /// A claim that failed once, and a device that brought its window with it: the window is the guest's all the same, across a restart too.
  @Test(arguments: [0, 1, 2]) func windowThatComesWithItsDeviceStays(failures: Int) throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start { $0.stateFolder = folder }
    let domain = try arm(world)
    domain.rangeFailures.store(failures, ordering: .relaxed)
    try attach(world, "xvda")
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    #expect(eventually { world.state("alpha", "xvda") == "ready" })
    try world.toolstack.set("online", "0", disk: "xvda", of: 5)
    try world.toolstack.set("state", "5", disk: "xvda", of: 5)
    #expect(world.toolstack.wait(for: "6", of: "state", disk: "xvda", domain: 5))
    try world.toolstack.removeEntry(disk: "xvda", of: 5)
    world.stop()
    try world.start { $0.stateFolder = folder }
    expectEmptySlot(domain)
    #expect(isAnswered(domain))
  }

  /// Devices that are taken away while the guest runs leave empty slots; the server stays, and nothing of the guest is mapped.
  @Test(arguments: [false, true]) func windowsStayWhenTheLastDeviceIsTakenAway(isUsed: Bool) throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start { $0.stateFolder = folder }
    let domain = try arm(world)
    for (disk, base) in [("xvda", UInt64(0x200_0000)), ("xvdb", 0x200_0200)] {
      try attach(world, disk, base: base)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    if isUsed {
      #expect(try world.boot(domain, base: 0x200_0000).write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
    }
    for disk in ["xvda", "xvdb"] {
      try world.toolstack.set("online", "0", disk: disk, of: 5)
      try world.toolstack.set("state", "5", disk: disk, of: 5)
      #expect(world.toolstack.wait(for: "6", of: "state", disk: disk, domain: 5))
    }
    #expect(domain.usage.mappings == 0)
    expectEmptySlot(domain)
    expectEmptySlot(domain, 0x200_0200)
    // Also across a restart, and when a device comes back.
    for disk in ["xvda", "xvdb"] { try world.toolstack.removeEntry(disk: disk, of: 5) }
    world.stop()
    #expect(isAnswered(domain))
    try world.start { $0.stateFolder = folder }
    expectEmptySlot(domain, 0x200_0200)
    #expect(domain.usage.mappings == 0)
    try attach(world, "xvda")
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    #expect(try world.boot(domain, base: 0x200_0000).write([UInt8](repeating: 2, count: 512), sector: 0) == 0)
    expectEmptySlot(domain, 0x200_0200)
    #expect(try world.toolstack.destroy(5, disks: ["xvda"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty })
    #expect(domain.aborts.load(ordering: .relaxed) == 0)
  }

  /// A guest that goes while nobody is there leaves nothing to the next daemon.
  @Test func serverOfAGuestThatIsGoneIsGivenBack() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start { $0.stateFolder = folder }
    let domain = try arm(world)
    try attach(world, "xvda", image: "/nowhere")
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    world.stop()
    #expect(isAnswered(domain))
    try world.toolstack.removeEntry(disk: "xvda", of: 5)
    _ = try world.toolstack.destroy(5, disks: [])
    try world.start { $0.stateFolder = folder }
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty && world.info("guests") == 0 })
  }

  /// The daemon ends for good: accesses wait for another one, which finds the server.
  @Test func windowsOutliveADaemonThatEndsForGood() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start { $0.stateFolder = folder }
    let domain = try arm(world)
    try attach(world, "xvda")
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    _ = try world.boot(domain, base: 0x200_0000)
    world.stop(handsOver: false)
    #expect(isAnswered(domain))
    #expect(domain.usage == SimulatedDomain.Usage(ioreqServers: 1))
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("alpha", "xvda") == "faulted" })
    #expect(try world.boot(domain, base: 0x200_0000).write([UInt8](repeating: 2, count: 512), sector: 0) == 0)
    #expect(domain.aborts.load(ordering: .relaxed) == 0)
  }
}
