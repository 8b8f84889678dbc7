import ControlAPI
import EventLoop
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@testable import Supervisor

/// Devices on the PCI bus of a guest whose profile says so.
@Suite struct PCIBusTests {
  private static let profile = #"{"version": 1, "guests": [{"guest": "web*", "transport": "pci"}]}"#

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  /// The guest's driver on a function.
  private func boot(
    _ domain: SimulatedDomain, device: UInt8 = 16, base: UInt64 = 0xf300_0000, id: UInt32 = 2, area: UInt64 = 1 << 20,
    queues: Int = 1, _ interrupts: PCIFunctionRegisters.Interrupts = .messages
  ) throws -> (guest: SimulatedBlockGuest, registers: PCIFunctionRegisters) {
    let registers = try PCIFunctionRegisters(
      domain: domain, function: PCIAddress(device: device), base: base, interrupts: interrupts)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: area)
    try driver.start(
      deviceID: id, wanted: [.indirectDescriptors, .eventIndex, .blockFlush], queueSize: 64, queueCount: queues)
    return (SimulatedBlockGuest(domain: domain, driver: driver), registers)
  }

  private func facts(_ world: World, _ guest: String, _ device: String) -> [String: String] {
    (world.device(guest, device)["facts"]?.arrayValue ?? []).reduce(into: [:]) {
      $0[$1["name"]?.stringValue ?? ""] = $1["value"]?.stringValue
    }
  }

  @Test(arguments: [PCIFunctionRegisters.Interrupts.messages, .pin])
  func diskIsServed(interrupts: PCIFunctionRegisters.Interrupts) throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: Self.profile)
    let domain = try world.domain(5, name: "web1")
    let other = try world.domain(6, name: "db1")
    for identifier: DomainID in [5, 6] {
      try world.toolstack.attach(disk: "xvde", image: world.image("\(identifier)"), to: identifier)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: identifier))
    }
    #expect(facts(world, "web1", "xvde")["BAR"] == "not enabled")
    let (guest, registers) = try boot(domain, interrupts)
    #expect(try guest.write(block(7), sector: 8) == 0)
    #expect(try guest.flush() == 0)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block(7))
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(world.device("web1", "xvde")["transport"] == "pci")
    #expect(facts(world, "web1", "xvde")["function"] == "00:10.0")
    #expect(facts(world, "web1", "xvde")["BAR"] == "0xf3000000")
    // Interrupts came the way that they should, by the queue's vector; answers that the driver has seen by then need none.
    if interrupts == .messages {
      #expect(domain.messages[registers.message(1)] ?? 0 >= 1)
      #expect(!domain.level(16 * 4))
    } else {
      #expect(domain.messages.isEmpty)
      #expect(domain.interrupts.load(ordering: .relaxed) >= 1)
    }
    // The other guest has none of it.
    #expect(world.device("db1", "xvde")["transport"] == "mmio")
    #expect(try world.boot(other).write(block(1), sector: 0) == 0)
    #expect(other.configurationAccess(vcpu: 0, PCIAddress(device: 16), register: 0, size: 4) == .max)
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { world.state("web1", "xvde") == nil && domain.usage == .init() })
  }

  /// A device that leaves the profile while no daemon runs: what the earlier one claimed for it is not left in Xen, where it would hide what QEMU has
  /// there.
  /// - Parameter failures: of the next daemon to reach the server, before it does.
  @Test(arguments: [0, 1]) func claimsOfAFunctionThatNobodyAsksForAreGivenBack(failures: Int) throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    func profiles(_ devices: String) -> String {
      #"{"version": 1, "guests": [{"guest": "web*", "transport": "pci", "devices": [\#(devices)]}]}"#
    }
    let entropy = #"{"type": "entropy"}"#
    try world.start(profiles: profiles(entropy + "," + entropy)) { $0.stateFolder = folder }
    let domain = try world.domain(5, name: "web1")
    #expect(eventually { ["rng0", "rng1"].allSatisfy { world.state("web1", $0) == "ready" } })
    for device: UInt8 in [30, 31] {
      let registers = try PCIFunctionRegisters(
        domain: domain, function: PCIAddress(device: device), base: 0xf300_0000 + UInt64(device) << 20,
        interrupts: .messages)
      #expect(registers.read(0, width: 4) != UInt64(UInt32.max))
    }
    func isClaimed(_ device: UInt64) -> Bool {
      domain.claimedMemory.contains { $0.contains(0xf300_0000 + device << 20) }
    }
    #expect(isClaimed(30) && isClaimed(31))
    world.stop()
    #expect(isClaimed(30) && isClaimed(31))
    domain.pageFailures.store(failures, ordering: .sequentiallyConsistent)
    try world.start(profiles: profiles(entropy)) { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "rng0") == "ready" && world.state("web1", "rng1") == nil })
    world.settle()
    #expect(!isClaimed(30) && isClaimed(31))
    #expect(domain.configurationAccess(vcpu: 0, PCIAddress(device: 30), register: 0, size: 4) == .max)
  }

  @Test func everyTypeIsServed() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"""
        {"version": 1, "guests": [{"guest": "web*", "transport": "pci", "devices": [
          {"type": "entropy"}, {"type": "console", "ports": [{"name": "vx.test"}]}]}]}
        """#)
    let domain = try world.domain(5, name: "web1")
    #expect(eventually { world.state("web1", "rng0") == "ready" && world.state("web1", "console0") == "ready" })
    try world.toolstack.attach(disk: "xvdf", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdf", domain: 5))
    #expect(facts(world, "web1", "rng0")["function"] == "00:1f.0")
    #expect(facts(world, "web1", "console0")["function"] == "00:1e.0")
    #expect(facts(world, "web1", "xvdf")["function"] == "00:11.0")
    let (entropy, _) = try boot(domain, device: 31, base: 0xf300_0000, id: 4)
    _ = entropy.driver.add([.init(entropy.dataAddress, 64, writable: true)])
    entropy.driver.notify()
    #expect(try entropy.waitForUsed().length == 64)
    let (disk, _) = try boot(domain, device: 17, base: 0xf301_0000, area: 4 << 20)
    #expect(try disk.write(block(3), sector: 0) == 0)
    let (console, registers) = try boot(domain, device: 30, base: 0xf302_0000, id: 3, area: 8 << 20, queues: 6)
    #expect(console.driver.rings.count == 6)
    #expect(registers.vectorCount == 7)
    // The line that the guest writes is taken.
    _ = console.driver.add([.init(console.dataAddress, 1, writable: false)], queue: 1)
    console.driver.notify(queue: 1)
    _ = try console.waitForUsed(queue: 1)
    #expect(domain.messages[registers.message(2)] ?? 0 >= 1)
    #expect(try world.toolstack.destroy(5, disks: ["xvdf"]))
    #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
  }

  @Test func barMovesUnderAWorkingDriver() throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: Self.profile)
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let (guest, registers) = try boot(domain)
    for step: UInt64 in 1...5 {
      registers.move(to: 0xf300_0000 + step * 0x10_0000)
      #expect(try guest.write(block(UInt8(step)), sector: 8 * step) == 0)
      #expect(facts(world, "web1", "xvde")["BAR"] == "0xf3\(step)00000")
    }
    registers.move(to: 0xfee0_0000)
    #expect(facts(world, "web1", "xvde")["BAR"]?.contains("may not use") == true)
    registers.move(to: 0xf300_0000)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block(1))
  }

  @Test func guestGoesOnWithTheNextSupervisor() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: Self.profile) { $0.stateFolder = folder }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let (guest, registers) = try boot(domain, base: 0xf345_4000)
    #expect(try guest.write(block(1), sector: 0) == 0)
    registers.mask(1, true)
    world.stop()
    #expect(domain.usage == SimulatedDomain.Usage(ioreqServers: 1))
    let before = domain.messages[registers.message(1)] ?? 0
    // The profile is another one by now: the guest keeps what it has.
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(world.eventKinds.contains(.deviceAdopted))
    #expect(facts(world, "web1", "xvde")["BAR"] == "0xf3454000")
    // A masked vector waits across the restart, and is sent when it is unmasked.
    #expect(eventually { registers.isPending(1) })
    #expect(domain.messages[registers.message(1)] ?? 0 == before)
    registers.mask(1, false)
    #expect(domain.messages[registers.message(1)] ?? 0 == before + 1)
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
    #expect(registers.configuration(0x10, 4) == 0xf345_4000)
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { domain.usage == .init() })
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty })
  }

  @Test func deviceWhoseStateIsOfAnUnknownVersionIsFaulted() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: Self.profile) { $0.stateFolder = folder }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    _ = try boot(domain)
    world.stop()
    let name = try #require(TemporaryFolder.names(folder.path).first { $0.hasSuffix(".device") })
    _ = world.folder.file("state/" + name, text: "nonsense, and long enough for a first look")
    try world.start(profiles: Self.profile) { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "faulted" })
    // A driver that looks for its devices again finds it.
    let (guest, _) = try boot(domain, base: 0xf360_0000)
    #expect(try guest.write(block(1), sector: 0) == 0)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
  }

  @Test func placesOnTheBusAreSaidAndRefused() {
    func key(_ kind: DeviceKey.Kind, _ device: UInt32) -> DeviceKey {
      DeviceKey(kind: kind, domain: 1, device: device)
    }
    func disk(_ name: String) -> DeviceKey { key(.disk, SimulatedToolstack.deviceNumber(name)) }
    #expect(PCIBus.place(disk("xvde"), taken: []) == 16)
    #expect(PCIBus.place(disk("xvdg"), taken: []) == 18)
    #expect(PCIBus.place(disk("xvdg"), taken: [18]) == 16)
    #expect(PCIBus.place(disk("xvda"), taken: []) == 16)
    #expect(PCIBus.place(key(.spare, 0), taken: []) == 31)
    #expect(PCIBus.place(key(.declared("network"), 0), taken: [31, 30]) == 29)
    #expect(PCIBus.place(key(.generic, 0), taken: [16]) == 17)
    #expect(PCIBus.place(disk("xvde"), taken: Set(16...31)) == nil)
    #expect(PCIBus.place(disk("xvdz"), taken: []) == 16)
  }

  @Test func moreDevicesThanPlacesAreRefusedWithAReason() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"""
        {"version": 1, "guests": [{"guest": "web*", "transport": "pci", "spareDisks": 16}]}
        """#)
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(eventually { world.state("web1", "spare15") != nil })
    #expect(eventually { world.state("web1", "spare15") == "failed" || world.state("web1", "xvde") == "failed" })
    let reason = (world.device("web1", "xvde")["reason"] ?? world.device("web1", "spare15")["reason"])?.stringValue
    #expect(reason?.contains("PCI devices 16 to 31 are all in use") == true, "\(reason ?? "none")")
  }
}
