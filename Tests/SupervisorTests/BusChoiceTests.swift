import ControlAPI
import DeviceHost
import EventLoop
import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

@testable import Supervisor

/// Each device of a guest has the transport that its entry and its options say.
@Suite struct BusChoiceTests {
  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  private func transport(_ world: World, _ device: String, of guest: String = "alpha") -> String? {
    world.device(guest, device)["transport"]?.stringValue
  }

  private func reason(_ world: World, _ device: String) -> String {
    world.device("alpha", device)["reason"]?.stringValue ?? ""
  }

  private func facts(_ world: World, _ device: String) -> [String: String] {
    (world.device("alpha", device)["facts"]?.arrayValue ?? []).reduce(into: [:]) {
      $0[$1["name"]?.stringValue ?? ""] = $1["value"]?.stringValue
    }
  }

  /// libxl calls every guest on Arm pvh.
  private func arm(_ world: World) throws -> SimulatedDomain { try world.domain(5, name: "alpha", type: "pvh") }

  @Test func diskInAnArmGuestsDeviceTreeIsServedByRegisters() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try arm(world)
    try world.toolstack.attach(disk: "xvda", image: world.image(), to: 5, changes: SimulatedToolstack.armDisk)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    #expect(world.toolstack.value("vx-offer", disk: "xvda", of: 5) == nil)
    #expect(transport(world, "xvda") == "mmio")
    #expect(facts(world, "xvda")["window"] == "0x2000000")
    // Only that window: the slots of x86 guests lie in this guest's memory, perhaps.
    #expect(domain.claimedMemory == [0x200_0000...0x200_01ff])
    let guest = try world.boot(domain, base: 0x200_0000)
    #expect(try guest.write(block(7), sector: 8) == 0)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block(7))
    #expect(eventually { world.state("alpha", "xvda") == "connected" })
    #expect(domain.interrupts.load(ordering: .relaxed) >= 1)
    #expect(try world.toolstack.destroy(5, disks: ["xvda"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
  }

  @Test func genericDeviceInAnArmGuestsDeviceTreeIsServedByRegisters() throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: #"{"version": 1, "guests": [{"devices": [{"type": "entropy", "create": false}]}]}"#)
    let domain = try arm(world)
    try world.toolstack.attachGeneric(type: "virtio,device4", device: 0, to: 5, base: "0x2000200", irq: "34")
    #expect(eventually { world.state("alpha", "rng0") == "ready" })
    #expect(transport(world, "rng0") == "mmio")
    let registers = TrappedRegisters(domain: domain, base: 0x200_0200)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
    try driver.start(deviceID: 4, wanted: [.eventIndex], queueSize: 16)
    let guest = SimulatedBlockGuest(domain: domain, driver: driver)
    _ = driver.add([.init(guest.dataAddress, 64, writable: true)])
    driver.notify()
    #expect(try guest.waitForUsed().length == 64)
  }

  @Test(arguments: [true, false]) func guestHasDevicesByRegistersAndOverXenbus(xenbusFirst: Bool) throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start { $0.stateFolder = folder }
    let domain = try arm(world)
    let (tree, attached) = xenbusFirst ? ("xvdf", "xvde") : ("xvde", "xvdf")
    func attach(_ disk: String) throws {
      try world.toolstack.attach(
        disk: disk, image: world.image(disk), to: 5, changes: disk == tree ? SimulatedToolstack.armDisk : [:])
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    for disk in ["xvde", "xvdf"] { try attach(disk) }
    #expect(transport(world, tree) == "mmio")
    #expect(transport(world, attached) == "xenbus")
    let first = try world.boot(domain, base: 0x200_0000)
    let (second, _) = try world.bootXenbus(domain, disk: attached, area: 6 << 20)
    for round: UInt8 in 1...5 {
      #expect(try first.write(block(round), sector: 8) == 0)
      #expect(try second.write(block(round + 100), sector: 8) == 0)
      #expect(try first.read(sector: 8, count: 4096).bytes == block(round))
      #expect(try second.read(sector: 8, count: 4096).bytes == block(round + 100))
    }
    #expect(eventually { ["xvde", "xvdf"].allSatisfy { world.state("alpha", $0) == "connected" } })
    // Both outlive the daemon, each in its own way.
    world.stop()
    try world.start { $0.stateFolder = folder }
    #expect(eventually { ["xvde", "xvdf"].allSatisfy { world.state("alpha", $0) == "connected" } })
    #expect(world.eventKinds.count { $0 == .deviceAdopted } == 2)
    #expect(try first.read(sector: 8, count: 4096).bytes == block(5))
    #expect(try second.read(sector: 8, count: 4096).bytes == block(105))
    #expect(try world.toolstack.destroy(5, disks: ["xvde", "xvdf"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
    #expect(eventually { domain.grants.mappedPages == 0 && domain.grants.boundPorts == 0 })
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty })
  }

  /// An ioreq server that cannot be made keeps only those devices from working that need it.
  @Test func deviceOverXenbusNeedsNoServer() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try arm(world)
    domain.pageFailures.store(.max, ordering: .relaxed)
    try world.toolstack.attach(disk: "xvde", image: world.image("a"), to: 5, changes: SimulatedToolstack.armDisk)
    try world.toolstack.attach(disk: "xvdf", image: world.image("b"), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdf", domain: 5))
    #expect(eventually { world.state("alpha", "xvde") == "failed" })
    let (guest, _) = try world.bootXenbus(domain, disk: "xvdf")
    #expect(try guest.write(block(1), sector: 0) == 0)
    domain.pageFailures.store(0, ordering: .relaxed)
    #expect(eventually { world.state("alpha", "xvde") == "ready" })
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  /// A mistake in an entry may be about the very thing that decides.
  @Test func correctedEntryMovesADeviceThatTheGuestDoesNotKnow() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try arm(world)
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5, changes: ["base": nil, "irq": "33"])
    #expect(eventually { reason(world, "xvde").hasPrefix("base: ") })
    #expect(transport(world, "xvde") == "xenbus")
    try world.toolstack.set("base", "33554432", disk: "xvde", of: 5)
    #expect(eventually { world.state("alpha", "xvde") == "ready" })
    #expect(transport(world, "xvde") == "mmio")
    #expect(try world.boot(domain, base: 0x200_0000).write(block(1), sector: 0) == 0)
  }

  /// What vxd makes for a guest stays when the only device of the toolstack's moves to another bus.
  @Test func profilesDevicesStayWhileTheOnlyOtherMoves() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"""
        {"version": 1, "guests": [{"transport": "pci", "devices": [{"type": "entropy", "transport": "mmio"}]}]}
        """#)
    let domain = try world.domain(5, name: "alpha")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5, changes: ["mode": "x", "irq": "40"])
    #expect(eventually { world.state("alpha", "xvde") == "failed" && world.state("alpha", "rng0") == "ready" })
    #expect(transport(world, "xvde") == "pci")
    try world.toolstack.set("base", "\(0x200_0000)", disk: "xvde", of: 5)
    #expect(eventually { transport(world, "xvde") == "mmio" })
    #expect(world.kinds(of: "rng0") == [.deviceReady] && world.state("alpha", "rng0") == "ready")
    try world.toolstack.set("mode", "w", disk: "xvde", of: 5)
    #expect(eventually { world.state("alpha", "xvde") == "ready" })
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
    #expect(world.kinds(of: "rng0") == [.deviceReady, .deviceClosing, .deviceGone])
  }

  // MARK: PCI by the device

  @Test func oneDeviceOfAGuestIsOnThePCIBus() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let profiles = #"""
      {"version": 1, "disks": [{"device": "xvdf", "transport": "pci"}],
       "guests": [{"devices": [{"type": "entropy", "transport": "pci"}, {"type": "entropy"}]}]}
      """#
    try world.start(profiles: profiles) { $0.stateFolder = folder }
    let domain = try world.domain(5, name: "alpha")
    for disk in ["xvde", "xvdf"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    #expect(["xvde", "xvdf", "rng0", "rng1"].map { transport(world, $0) } == ["mmio", "pci", "pci", "mmio"])
    // The slots of the others drive pins of PCI devices of these numbers.
    let pins = try ["rng0", "xvdf"].map { name in
      try #require(UInt8(facts(world, name)["function"]?.dropFirst(3).prefix(2) ?? "", radix: 16))
    }
    for name in ["xvde", "rng1"] {
      let slot = try #require(world.device("alpha", name)["slot"]?.integerValue)
      #expect(!pins.contains { SlotTable.slot(Int(slot)).interrupt == .pciIntx(device: $0, pin: 0) })
    }
    let plain = try world.boot(domain, slot: Int(try #require(world.device("alpha", "xvde")["slot"]?.integerValue)))
    // The other slots are empty, and can be looked at.
    #expect(TrappedRegisters(domain: domain, base: SlotTable.slot(3).base).read(0x000) == 0x7472_6976)
    let registers = try PCIFunctionRegisters(
      domain: domain, function: PCIAddress(device: 17), base: 0xf300_0000, interrupts: .messages)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 6 << 20)
    try driver.start(wanted: [.eventIndex], queueSize: 64)
    let function = SimulatedBlockGuest(domain: domain, driver: driver)
    #expect(try plain.write(block(1), sector: 0) == 0)
    #expect(try function.write(block(2), sector: 0) == 0)
    // The profile is another one by now: each device keeps what it has.
    world.stop()
    try world.start { $0.stateFolder = folder }
    #expect(eventually { ["xvde", "xvdf"].allSatisfy { world.state("alpha", $0) == "connected" } })
    #expect(["xvde", "xvdf"].map { transport(world, $0) } == ["mmio", "pci"])
    #expect(try plain.read(sector: 0, count: 4096).bytes == block(1))
    #expect(try function.read(sector: 0, count: 4096).bytes == block(2))
    #expect(try world.toolstack.destroy(5, disks: ["xvde", "xvdf"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
  }

  @Test func oneDeviceOfAPCIGuestIsInASlot() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"""
        {"version": 1, "disks": [{"device": "xvde", "transport": "mmio"}], "guests": [{"transport": "pci"}]}
        """#)
    let domain = try world.domain(5, name: "alpha")
    for disk in ["xvde", "xvdf"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    #expect(["xvde", "xvdf"].map { transport(world, $0) } == ["mmio", "pci"])
    #expect(try world.boot(domain).write(block(1), sector: 0) == 0)
  }

  /// The slots of a guest whose server was started for its PCI devices are claimed with the first device in one. When that fails, the device is
  /// not there, and is tried again.
  @Test func slotsThatCannotBeClaimedAreClaimedWithTheNextTry() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"""
        {"version": 1, "disks": [{"device": "xvdf", "transport": "mmio"}], "guests": [{"transport": "pci"}]}
        """#)
    let domain = try world.domain(5, name: "alpha")
    try world.toolstack.attach(disk: "xvde", image: world.image("xvde"), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    domain.rangeFailures.store(1, ordering: .sequentiallyConsistent)
    try world.toolstack.attach(disk: "xvdf", image: world.image("xvdf"), to: 5)
    #expect(eventually { world.state("alpha", "xvdf") == "failed" })
    #expect(domain.rangeFailures.load(ordering: .sequentiallyConsistent) == 0)
    #expect(eventually { world.state("alpha", "xvdf") == "ready" })
    #expect(["xvde", "xvdf"].map { transport(world, $0) } == ["pci", "mmio"])
    #expect(TrappedRegisters(domain: domain, base: SlotTable.slot(1).base).read(0x000) == 0x7472_6976)
    #expect(try world.toolstack.destroy(5, disks: ["xvde", "xvdf"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
  }

  /// The first server of a guest is made, and cannot be used: the next one reaches the guest's memory as well.
  @Test func serverOfTheSecondTryReachesMemory() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "alpha")
    domain.rangeFailures.store(1, ordering: .sequentiallyConsistent)
    try world.toolstack.attach(disk: "xvde", image: world.image("xvde"), to: 5)
    #expect(eventually { world.reasons(.guestFailed).count == 1 && world.state("alpha", "xvde") == "ready" })
    #expect(try world.boot(domain).write(block(1), sector: 0) == 0)
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
  }

  /// What cannot be followed is refused, where the device itself asks for it.
  @Test func transportThatADeviceCannotHaveIsRefused() throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: #"{"version": 1, "disks": [{"transport": "pci"}], "guests": [{"transport": "pci"}]}"#)
    _ = try arm(world)
    try world.toolstack.attach(disk: "xvde", image: world.image("a"), to: 5, changes: SimulatedToolstack.armDisk)
    try world.toolstack.attach(disk: "xvdf", image: world.image("b"), to: 5)
    #expect(eventually { reason(world, "xvde").contains("at 0x2000000 in the guest's device tree") })
    #expect(eventually { reason(world, "xvdf").contains("has this device over Xenbus") })
    #expect(reason(world, "xvde").hasPrefix("transport: ") && reason(world, "xvdf").hasPrefix("transport: "))
    #expect(throws: SettingFault.self) {
      try Profiles(try JSONText.parse(Array(#"{"version": 1, "disks": [{"transport": "usb"}]}"#.utf8)))
    }
  }
}

/// What operators are told of guests on Arm.
@Suite struct ArmFindingsTests {
  @Test func operatorsOfAGuestOnArmAreToldWhatIsTrueThere() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"{"version": 1, "guests": [{"spareDisks": 1, "devices": [{"type": "network", "bridge": "br0"}]}]}"#)
    _ = try world.domain(5, name: "alpha", type: "pvh")
    try world.toolstack.attach(disk: "xvda", image: world.image(), to: 5, changes: SimulatedToolstack.armDisk)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvda", domain: 5))
    let disk = world.device("alpha", "xvda")
    // There is no QEMU, no table of slots, and no number in it.
    #expect(disk["warning"] == nil && disk["slot"] == nil && disk["base"] == "0x2000000")
    #expect(disk["guestNeeds"] == "virtio_mmio and the device's driver")
    // What a guest without slots cannot have says what to do instead.
    for (name, words) in [("spare0", "disk = [ ... ]"), ("net0", #"virtio = [ ... ] and "create": false here"#)] {
      #expect(eventually { world.state("alpha", name) == "failed" })
      let reason = world.device("alpha", name)["reason"]?.stringValue ?? ""
      #expect(reason.contains("'vxctl attach'") && reason.hasSuffix(words), "\(reason)")
    }
    let known = world.call("guest.list").arrayValue?.first
    #expect(known?["guestNeeds"]?.stringValue?.contains("acpi") == false)
    #expect(known?["note"] == nil && known?["warning"] == nil)
    #expect(try world.toolstack.destroy(5, disks: ["xvda"]))
    #expect(eventually { world.info("guests") == 0 })
  }
}
