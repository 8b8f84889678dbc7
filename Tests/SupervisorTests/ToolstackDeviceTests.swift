import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// Disks that dom0 writes to Xenstore by itself: what `vxctl attach --backend`, `detach --xenbus` and `reattach` do.
@Suite struct ToolstackDeviceTests {
  private func world() throws -> (World, SimulatedDomain, XenStore) {
    let world = try World()
    let domain = try world.domain(5, name: "web1", type: "pvh")
    let xenstore = try XenStore(socketPath: world.server.path)
    try xenstore.write("/local/domain/0/name", "Domain-0")
    try world.start()
    return (world, domain, xenstore)
  }

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  @Test func diskComesAndGoesWhileItsGuestRuns() throws {
    let (world, domain, xenstore) = try world()
    defer { world.end() }
    for round in 0..<5 {
      let disk = ToolstackDevice(xenstore, guest: 5, device: try ToolstackDevice.number("xvdb"))
      try disk.create(backend: 0, target: world.image(), readOnly: false)
      #expect(eventually { world.state("web1", "xvdb") == "ready" })
      let (guest, registers) = try world.bootXenbus(domain, disk: "xvdb")
      #expect(try guest.write(block(UInt8(round)), sector: 0) == 0)
      try disk.requestEnd()
      world.settle()
      #expect(!disk.hasEnded)
      guest.driver.reset()
      #expect(disk.wait(seconds: 30) { disk.hasEnded })
      #expect(registers.revokeAll() == 0)
      try disk.remove()
      #expect(!disk.exists)
      #expect(eventually { world.state("web1", "xvdb") == nil })
    }
    #expect(domain.grants.boundPorts == 0)
  }

  @Test func driverThatDoesNotLetGoLosesTheDiskByForce() throws {
    let (world, domain, xenstore) = try world()
    defer { world.end() }
    let disk = ToolstackDevice(xenstore, guest: 5, device: try ToolstackDevice.number("xvdb"))
    try disk.create(backend: 0, target: world.image(), readOnly: false)
    #expect(eventually { world.state("web1", "xvdb") == "ready" })
    let (guest, _) = try world.bootXenbus(domain, disk: "xvdb")
    #expect(try guest.write(block(1), sector: 0) == 0)
    try disk.requestEnd()
    world.settle()
    #expect(!disk.hasEnded)
    try disk.forceEnd()
    #expect(disk.wait(seconds: 30) { disk.hasEnded })
    #expect(eventually { domain.grants.mappedPages == 0 })
  }

  @Test func diskWhoseBackendIsGoneIsGivenToAnother() throws {
    let (world, domain, xenstore) = try world()
    defer { world.end() }
    let disk = ToolstackDevice(xenstore, guest: 5, device: try ToolstackDevice.number("xvda"))
    let image = world.image()
    try disk.create(backend: 9, target: image, readOnly: false)
    #expect(disk.backend == "/local/domain/9/backend/virtio_disk/5/51712")
    try xenstore.remove("/local/domain/9")
    try disk.move(to: 0)
    #expect(xenstore.read("\(disk.frontend)/backend-id") == "0")
    #expect(eventually { world.state("web1", "xvda") == "ready" })
    let (guest, _) = try world.bootXenbus(domain, disk: "xvda")
    #expect(try guest.write(block(1), sector: 0) == 0)
    #expect(ToolstackDevice.all(xenstore).count == 1)
  }

  @Test func mistakesAreNamedAndChangeNothing() throws {
    let (world, _, xenstore) = try world()
    defer { world.end() }
    func words(_ body: () throws(ToolstackDevice.Fault) -> Void) -> String {
      do throws(ToolstackDevice.Fault) { try body() } catch { return error.message }
      return ""
    }
    #expect(
      words { () throws(ToolstackDevice.Fault) in _ = try ToolstackDevice.number("sda") }.contains("xvda to xvdp"))
    #expect(
      words { () throws(ToolstackDevice.Fault) in _ = try ToolstackDevice.domain("nobody", xenstore) }.contains(
        "'nobody'")
    )
    #expect(
      words { () throws(ToolstackDevice.Fault) in _ = try ToolstackDevice.domain("77", xenstore) }.contains(
        "no domain 77")
    )
    #expect(try ToolstackDevice.domain("web1", xenstore) == 5)
    let disk = ToolstackDevice(xenstore, guest: 5, device: try ToolstackDevice.free(xenstore, guest: 5))
    #expect(ToolstackDevice.name(disk.device) == "xvda")
    try disk.create(backend: 0, target: world.image(), readOnly: true)
    #expect(
      words { () throws(ToolstackDevice.Fault) in try disk.create(backend: 0, target: "/x", readOnly: false) }.contains(
        "already"))
    #expect(ToolstackDevice.name(try ToolstackDevice.free(xenstore, guest: 5)) == "xvdb")
    try xenstore.write("/libxl/6/device/vbd/51712/frontend", "x")
    let mixed = ToolstackDevice(xenstore, guest: 6, device: try ToolstackDevice.number("xvdb"))
    #expect(
      words { () throws(ToolstackDevice.Fault) in try mixed.create(backend: 0, target: "/x", readOnly: false) }
        .contains(
          "plain Xen disks"))
    #expect(!mixed.exists)
  }

  /// In a driver domain nobody else removes a device's entry.
  @Test func driverDomainServesEveryGuestOverXenbusAndRemovesItsEntries() throws {
    let world = try World()
    defer { world.end() }
    let xenstore = try XenStore(socketPath: world.server.path)
    try xenstore.write("/local/domain/0/domid", "7")
    let domain = try world.domain(5, name: "web1", type: "hvm")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start()
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    let (guest, _) = try world.bootXenbus(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    #expect(domain.usage == .init())
    // As libxl: the frontend goes, then it waits for the backend's directory to go.
    let backend = SimulatedToolstack.backendPath(5, "xvde")
    try xenstore.remove("/local/domain/5/device/virtio_disk/\(SimulatedToolstack.deviceNumber("xvde"))")
    try xenstore.write("\(backend)/online", "0")
    try xenstore.write("\(backend)/state", "5")
    #expect(eventually { xenstore.list(backend) == nil })
    #expect(domain.grants.mappedPages == 0)
  }
}
