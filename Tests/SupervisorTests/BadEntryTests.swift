import Devices
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

@Suite struct BadEntryTests {
  @Test(
    arguments: [
      ("params", nil, "params: the key is missing"), ("params", "", "params: the value is empty"),
      (
        "params", "relative.img",
        "params: expected an absolute path of an image or an NBD address (nbd://, nbd+unix://), not 'relative.img'"
      ),
      ("params", "/nowhere/disk.img", "params: cannot open '/nowhere/disk.img': No such file or directory"),
      ("params", "/tmp", "params: '/tmp' is neither a regular file nor a block device"),
      ("mode", "x", "mode: expected 'r' or 'w', not 'x'"), ("mode", nil, "mode: the key is missing"),
      ("type", "phy", "type: expected 'standalone', not 'phy'"),
      ("specification", "xen", "specification: expected 'virtio', not 'xen'"),
      ("transport", "pci", "transport: expected 'mmio', not 'pci'"),
      ("base", "12x", "base: expected a number of at most 64 bits, decimal or hexadecimal with 0x, not '12x'"),
      ("base", "-1", "base: expected a number of at most 64 bits, decimal or hexadecimal with 0x, not '-1'"),
      (
        "base", "18446744073709551616",
        "base: expected a number of at most 64 bits, decimal or hexadecimal with 0x, not '18446744073709551616'"
      ),
      ("base", "513", "base: expected a multiple of 512 below 2^52, not 0x201"),
      ("irq", "99999", "irq: expected a shared peripheral interrupt (32 to 1019), or 0 with base 0, not 99999"),
      ("discard-enable", "yes", "discard-enable: expected 0 or 1, not 'yes'"),
      ("frontend-id", "8", "frontend-id: expected 5, the domain of the entry's path, not 8"),
    ] as [(String, String?, String)])
  func badEntryIsNamedAndTheOtherDiskWorks(key: String, value: String?, reason: String) throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.toolstack.attach(disk: "xvdf", image: world.image("second"), to: 5, changes: [key: value])
    // xl waits for this state of both.
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdf", domain: 5))
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(world.toolstack.value("error", disk: "xvdf", of: 5) == reason)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    #expect(world.device("web1", "xvdf")["reason"]?.stringValue == reason)
    #expect(try world.boot(domain).write([UInt8](repeating: 7, count: 512), sector: 0) == 0)
    #expect(try world.toolstack.destroy(5, disks: ["xvde", "xvdf"]))
    #expect(eventually { domain.usage == .init() })
  }

  @Test func imageThatIsTooSmallIsNamed() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    _ = try world.domain(5, name: "web1")
    let image = world.image("small", bytes: 100)
    try world.toolstack.attach(disk: "xvde", image: image, to: 5)
    #expect(
      world.toolstack.wait(
        for: "params: '\(image)' has 100 bytes; a disk needs at least 512", of: "error", disk: "xvde", domain: 5))
  }

  @Test func correctedEntryIsServed() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: "/nowhere", to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(eventually { world.state("web1", "xvde") == "failed" })
    try world.toolstack.set("params", world.image(), disk: "xvde", of: 5)
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    world.settle()
    #expect(world.toolstack.value("error", disk: "xvde", of: 5) == nil)
    #expect(try world.boot(domain).write([UInt8](repeating: 7, count: 512), sector: 0) == 0)
  }

  /// A toolstack that makes a device anew does not wait for what vxd still does about the old one's end.
  @Test func entryThatIsWrittenAnewWhileTheOldOnesEndIsNotedIsServed() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    let path = SimulatedToolstack.backendPath(5, "xvde")
    try world.whileTheSupervisorWaits {
      try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5, changes: ["online": "0"])
      world.server.afterNextRead(of: "\(path)/state", write: ["\(path)/online": "1", "\(path)/state": "1"])
    }
    #expect(eventually { world.state("web1", "xvde") == "ready" }, "\(world.device("web1", "xvde"))")
    #expect(try world.boot(domain).write([UInt8](repeating: 7, count: 512), sector: 0) == 0)
  }

  /// The same while the old device still waits for its store.
  @Test func entryThatIsWrittenAnewWhileItsDeviceClosesIsServed() throws {
    let plan = FaultPlan()
    let world = try World()
    defer { world.end() }
    try world.start { $0.decorate = { engine, _ in FaultyEngine(engine, plan) } }
    let domain = try world.domain(5, name: "web1")
    // The second disk keeps the guest's session.
    for disk in ["xvde", "xvdf"] {
      try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: 5))
    }
    let guest = try world.boot(domain)
    plan.isHolding = true
    guest.putHeader(at: 8 << 20, type: 4, sector: 0)
    #expect(guest.driver.add([.init(8 << 20, 16, writable: false), .init(9 << 20, 1, writable: true)]) != nil)
    guest.driver.notify()
    #expect(eventually { world.device("web1", "xvde")["inFlight"] == 1 })
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    #expect(eventually { world.state("web1", "xvde") == "closing" })
    try world.toolstack.attach(disk: "xvde", image: world.image("other"), to: 5)
    plan.isHolding = false
    #expect(eventually { world.state("web1", "xvde") == "ready" }, "\(world.device("web1", "xvde"))")
    #expect(try world.boot(domain).write([UInt8](repeating: 7, count: 512), sector: 0) == 0)
  }

  @Test func badEntryThatIsRemovedIsForgotten() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: "/nowhere", to: 5)
    #expect(eventually { world.state("web1", "xvde") == "failed" })
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    #expect(eventually { world.info("guests") == 0 })
  }

  @Test func imageInUseByAnotherGuestIsRefusedWithItsName() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let image = world.image()
    for identifier: DomainID in [5, 6] {
      _ = try world.domain(identifier, name: "web\(identifier)")
      try world.toolstack.attach(disk: "xvde", image: image, to: identifier)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: identifier))
    }
    #expect(eventually { world.device("web6", "xvde")["reason"]?.stringValue?.contains("in use by web5/xvde") == true })
  }

  @Test func moreDisksThanSlotsAreRefusedOneByOne() throws {
    let world = try World()
    defer { world.end() }
    try world.start(slots: 2)
    _ = try world.domain(5, name: "web1")
    for disk in ["xvde", "xvdf", "xvdg"] { try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5) }
    #expect(eventually { world.state("web1", "xvdg") == "failed" })
    #expect(eventually { world.state("web1", "xvdf") == "ready" })
  }

  @Test func genericDeviceOfAnUnservedTypeIsNamed() {
    let key = DeviceKey(kind: .generic, domain: 5, device: 0)
    #expect(
      throws: EntryFault(
        "type",
        "expected one of virtio,device1 (network), virtio,device3 (console), virtio,device4 (entropy), not 'virtio,device1a'"
      )
    ) {
      _ = try DeviceEntry.parse(key, ["type": "virtio,device1a"])
    }
  }

  /// On Arm libxl says where the device is; numbers come in both notations.
  @Test(arguments: [("33554432", "33"), ("0x2000000", "0x21")]) func armEntryKeepsItsBaseAndInterrupt(
    base: String, irq: String
  ) throws {
    let key = DeviceKey(kind: .disk, domain: 5, device: 51776)
    let entry = try DeviceEntry.parse(
      key,
      [
        "frontend": "/local/domain/5/device/virtio_disk/51776", "frontend-id": "5", "type": "standalone",
        "specification": "virtio", "transport": "mmio", "mode": "w", "params": "/a", "dev": "xvde", "base": base,
        "irq": irq,
      ])
    #expect(try entry.slot(key, taken: [], count: 8) == DeviceSlot(index: nil, base: 0x200_0000, interrupt: .spi(33)))
  }

  @Test func diskKeepsItsSlotWhateverElseTheGuestHas() {
    #expect(DeviceEntry.diskIndex(SimulatedToolstack.deviceNumber("xvde")) == 4)
    #expect(DeviceEntry.diskIndex(SimulatedToolstack.deviceNumber("xvdp")) == 15)
    #expect(DeviceEntry.diskIndex(SimulatedToolstack.deviceNumber("xvdq")) == 16)
    #expect(DeviceEntry.diskIndex(768) == nil)
  }

  @Test(arguments: ["/" + String(repeating: "x", count: 5000), "nbd://host/" + String(repeating: "%41", count: 8000)])
  func nameOfAnImageHasALimit(image: String) throws {
    let keys = [
      "frontend": "/local/domain/5/device/virtio_disk/51776", "frontend-id": "5", "online": "1", "state": "1",
      "params": image, "type": "standalone", "specification": "virtio", "transport": "mmio", "dev": "xvde",
      "mode": "w", "base": "0", "irq": "0",
    ]
    let fault = #expect(throws: EntryFault.self) {
      _ = try DeviceEntry.parse(DeviceKey(kind: .disk, domain: 5, device: 51776), keys)
    }
    #expect(fault?.message.contains("longer than") == true, "\(fault?.message ?? "")")
    #expect(fault?.message.utf8.count ?? 0 < 300)
  }
}
