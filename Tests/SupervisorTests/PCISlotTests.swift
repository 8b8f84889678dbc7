import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

@testable import Supervisor

/// Where functions on the PCI bus are: what profiles choose, and what QEMU has there already.
@Suite struct PCISlotTests {
  private func place(_ world: World, _ device: String) -> String? {
    world.device("web1", device)["facts"]?.arrayValue?.first { $0["name"] == "function" }?["value"]?.stringValue
  }

  private func profile(_ disks: String, _ devices: String = "") -> String {
    #"{"version": 1, "disks": [\#(disks)], "guests": [{"guest": "web*", "transport": "pci", "devices": [\#(devices)]}]}"#
  }

  @Test func profilesChooseSlotsAndTheOthersFollow() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: profile(
        #"{"guest": "web*", "device": "xvdf", "slot": 5}, {"guest": "web*", "device": "xvdg", "slot": 21}"#,
        #"{"type": "entropy", "slot": 9}, {"type": "console"}"#))
    let domain = try world.domain(5, name: "web1")
    for disk in ["xvdg", "xvdf", "xvde"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    #expect(place(world, "xvde") == "00:10.0" && place(world, "xvdf") == "00:05.0" && place(world, "xvdg") == "00:15.0")
    #expect(place(world, "rng0") == "00:09.0")
    let registers = try PCIFunctionRegisters(domain: domain, function: PCIAddress(device: 5))
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
    try driver.start(wanted: [.eventIndex], queueSize: 64)
    let guest = SimulatedBlockGuest(domain: domain, driver: driver)
    #expect(try guest.write([UInt8](repeating: 3, count: 512), sector: 0) == 0)
  }

  @Test func slotOfAnotherDeviceIsRefused() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: profile(
        #"{"guest": "web*", "device": "xvdf", "slot": 16}, {"guest": "web*", "device": "xvdh", "slot": 7}"#))
    _ = try world.domain(5, name: "web1")
    for disk in ["xvde", "xvdf", "xvdh"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    let reason = world.device("web1", "xvdf")["reason"]?.stringValue ?? ""
    #expect(reason.contains("slot: another of the guest's devices is PCI device 16 already"), "\(reason)")
    #expect(eventually { world.state("web1", "xvde") == "ready" && place(world, "xvdh") == "00:07.0" })
  }

  @Test(arguments: ["2", "32", "-1", "\"x\""]) func slotsThatThereAreNotAreRefused(slot: String) throws {
    let world = try World()
    defer { world.end() }
    #expect(throws: (any Error).self) {
      try world.start(profiles: profile(#"{"guest": "web*", "slot": \#(slot)}"#))
    }
  }

  /// QEMU is started behind the guest's disks, and its monitor with it.
  @Test func placeThatQEMUHasTooIsRefusedByTheDaemon() throws {
    let world = try World()
    defer { world.end() }
    let folder = world.folder.path
    try world.start(profiles: profile(#"{"guest": "web*", "device": "xvdf", "slot": 5}"#)) { $0.qemuFolder = folder }
    let domain = try world.domain(5, name: "web1")
    for disk in ["xvde", "xvdf"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    let monitor = try MonitorOfQEMU(
      path: folder + "/qmp-libxenstat-5",
      devices: #"{"bus": 0, "slot": 3, "function": 0}, {"bus": 0, "slot": 5, "function": 0}"#)
    // It is asked when the guest looks.
    #expect(domain.configurationAccess(vcpu: 0, PCIAddress(device: 16), register: 0, size: 4) != .max)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    monitor.end()
    let reason = world.device("web1", "xvdf")["reason"]?.stringValue ?? ""
    #expect(reason.contains("QEMU has PCI device 5 (00:05.0) too") && reason.contains("option \"slot\""), "\(reason)")
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    // What comes later goes around what QEMU has.
    try world.toolstack.attach(disk: "xvdg", image: world.image("xvdg"), to: 5)
    #expect(eventually { world.state("web1", "xvdg") == "ready" })
    #expect(eventually { world.call("guest.list").arrayValue?.count == 1 })
  }
}
