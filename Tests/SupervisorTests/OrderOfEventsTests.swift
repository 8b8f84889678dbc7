import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// What happens while something else is under way.
@Suite struct OrderOfEventsTests {
  private let block = [UInt8](repeating: 5, count: 4096)

  /// Threads of this process with a name. Names have 15 characters at most.
  private func threads(_ name: String) -> Int {
    TemporaryFolder.names("/proc/self/task").count { thread in
      guard let file = fopen("/proc/self/task/\(thread)/comm", "re") else { return false }
      defer { fclose(file) }
      var bytes = [UInt8](repeating: 0, count: 32)
      let count = fread(&bytes, 1, bytes.count, file)
      return String(decoding: bytes.prefix(count), as: UTF8.self) == name + "\n"
    }
  }

  /// Takes every ioreq server that a domain can have.
  private func takeServers(_ world: World, _ domain: DomainID) throws -> [(any GuestHandle, UInt16)] {
    let handle = try world.hypervisor.open(domain)
    var servers: [(any GuestHandle, UInt16)] = []
    while let server = try? handle.createIOReqServer() { servers.append((handle, server)) }
    return servers
  }

  /// The image opens after the guest's server has failed: nothing is held for a device that cannot be served, and when a server can be
  /// made after all, it is.
  @Test func imageThatOpensBehindAFailedServerIsClosedAgain() throws {
    let world = try World()
    defer { world.end() }
    let daemon = try StorageDaemon(folder: world.folder, image: world.image("nbd.img"))
    defer { daemon.stop() }
    try world.start()
    let domain = try world.domain(5, name: "late")
    let servers = try takeServers(world, 5)
    #expect(servers.count == 8)
    daemon.pause()
    try world.toolstack.attach(disk: "xvde", image: daemon.address, to: 5)
    #expect(eventually { world.state("late", "xvde") == "failed" })
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(world.reasons(.guestFailed).first?.contains("cannot create an ioreq server") == true)
    // It gives itself its name when it runs.
    #expect(eventually { threads("vxd-late/xvde") == 1 })
    daemon.resume()
    #expect(eventually { threads("vxd-late/xvde") == 0 })
    #expect(world.state("late", "xvde") == "failed")
    for (handle, server) in servers { try handle.destroyIOReqServer(server) }
    #expect(eventually { world.state("late", "xvde") == "ready" })
    #expect(world.toolstack.value("error", disk: "xvde", of: 5) == nil)
    #expect(try world.boot(domain).write(block, sector: 0) == 0)
  }

  /// A retried start hangs in a server that does not answer when the entry is corrected: the new image is opened when the threads of
  /// the old one are joined.
  @Test func correctedEntryLeavesNoThreadBehind() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "hang")
    let socket = world.folder.path + "/silent.sock"
    try world.toolstack.attach(disk: "xvde", image: "nbd+unix:///disk?socket=\(socket)", to: 5)
    #expect(eventually { world.state("hang", "xvde") == "failed" })
    let listener = try UnixSocket.listen(socket, mode: 0o600)
    defer { close(listener) }
    var connection: Int32 = -1
    #expect(
      eventually {
        connection = accept(listener, nil, nil)
        return connection >= 0
      })
    try world.toolstack.set("params", world.image(), disk: "xvde", of: 5)
    // A device that comes later is there: so the correction has been seen.
    try world.toolstack.attach(disk: "xvdf", image: world.image("second"), to: 5)
    #expect(eventually { world.state("hang", "xvdf") == "ready" })
    #expect(world.state("hang", "xvde") == "failed")
    #expect(threads("vxd-hang/xvde") == 1)
    close(connection)
    #expect(eventually { world.state("hang", "xvde") == "ready" })
    #expect(threads("vxd-hang/xvde") == 1)
    #expect(try world.boot(domain).write(block, sector: 0) == 0)
    #expect(try world.toolstack.destroy(5, disks: ["xvde", "xvdf"]))
    #expect(eventually { world.info("guests") == 0 })
    #expect(threads("vxd-hang/xvde") == 0)
  }

  /// A driver at work whose device's entry becomes wrong: its requests wait, and are answered when the entry is right again.
  @Test(arguments: ["mmio", "pci", "xenbus"]) func driverWaitsWhileItsEntryIsWrong(transport: String) throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start(profiles: #"{"version": 1, "guests": [{"transport": "\#(transport == "pci" ? "pci" : "mmio")"}]}"#)
    {
      $0.stateFolder = folder
    }
    let domain = try world.domain(5, name: "web1", type: transport == "xenbus" ? "pvh" : "hvm")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest: SimulatedBlockGuest
    switch transport {
    case "pci":
      let registers = try PCIFunctionRegisters(domain: domain, function: PCIAddress(device: 16))
      let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
      try driver.start(wanted: [.eventIndex], queueSize: 64)
      guest = SimulatedBlockGuest(domain: domain, driver: driver)
    case "xenbus": guest = try world.bootXenbus(domain).guest
    default: guest = try world.boot(domain)
    }
    #expect(try guest.write(block, sector: 0) == 0)
    let image = world.image()
    try world.toolstack.set("params", "relative.img", disk: "xvde", of: 5)
    _ = world.call("device.restart", ["guest": "web1", "device": "xvde"])
    #expect(eventually { world.state("web1", "xvde") == "failed" })
    world.settle()
    guest.putHeader(at: guest.dataAddress + 8192, type: 4, sector: 0)
    let flush: [SimulatedDriver.Buffer] = [
      .init(guest.dataAddress + 8192, 16, writable: false), .init(guest.dataAddress + 8208, 1, writable: true),
    ]
    #expect(guest.driver.add(flush) != nil)
    guest.driver.notify(queue: 0)
    try world.toolstack.set("params", image, disk: "xvde", of: 5)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    _ = try guest.waitForUsed()
    #expect(try guest.write(block, sector: 8) == 0)
  }

  /// A device that cannot be put into its place: it is failed, says why, and comes with a correction or by itself.
  @Test(arguments: [true, false]) func deviceThatCannotBeInsertedIsServedLater(corrects: Bool) throws {
    let world = try World()
    defer { world.end() }
    try world.start { $0.startRetry.firstPause = corrects ? 3_600_000 : 20 }
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    // Its window, and the device in it.
    domain.rangeFailures.store(2, ordering: .relaxed)
    // Where libxl says that it is, as on Arm: its window is claimed for it alone.
    try world.toolstack.attach(
      disk: "xvdf", image: world.image("second"), to: 5, changes: ["base": "33554432", "irq": "33"])
    #expect(eventually { world.reasons(.deviceFailed).contains { $0.hasPrefix("base: map_io_range") } })
    if corrects {
      #expect(eventually { world.state("web1", "xvdf") == "failed" })
      #expect(world.toolstack.value("error", disk: "xvdf", of: 5)?.hasPrefix("base: ") == true)
      // The guest would find nobody there.
      #expect(world.toolstack.value("state", disk: "xvdf", of: 5) == "1")
      try world.toolstack.set("params", world.image("third"), disk: "xvdf", of: 5)
    }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdf", domain: 5))
    #expect(eventually { world.state("web1", "xvdf") == "ready" })
    #expect(world.toolstack.value("error", disk: "xvdf", of: 5) == nil)
    let registers = TrappedRegisters(domain: domain, base: 33_554_432, vcpu: 0)
    #expect(registers.read(0) == 0x7472_6976)
  }

  /// An operator's restart of such a device is as good.
  @Test func deviceThatCannotBeInsertedIsRestarted() throws {
    let world = try World()
    defer { world.end() }
    try world.start { $0.startRetry.firstPause = 3_600_000 }
    let domain = try world.domain(5, name: "web1")
    domain.rangeFailures.store(0, ordering: .relaxed)
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    // Its window, and the device in it.
    domain.rangeFailures.store(2, ordering: .relaxed)
    try world.toolstack.attach(
      disk: "xvdf", image: world.image("second"), to: 5, changes: ["base": "33554432", "irq": "33"])
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    #expect(world.call("device.restart", ["guest": "web1", "device": "xvdf"])["accepted"] == true)
    #expect(eventually { world.state("web1", "xvdf") == "ready" })
  }

  /// A guest owns its frontend: it may make its devices end and begin as fast as it can, and is slowed.
  @Test func guestThatClosesAndOpensItsDeviceWithoutEndIsSlowedAndSpokenOfLess() throws {
    let world = try World()
    defer { world.end() }
    _ = try world.domain(5, name: "churn", type: "pvh")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start { $0.startRetry.longestPause = 400 }
    let xenstore = try XenStore(socketPath: world.server.path)
    let frontend = "/local/domain/5/device/virtio_disk/\(SimulatedToolstack.deviceNumber("xvde"))"
    let backend = try #require(xenstore.read("\(frontend)/backend"))
    var slowed = 0
    for round in 0..<24 {
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5), "round \(round)")
      try xenstore.write("\(frontend)/backend", "/elsewhere")
      try xenstore.remove("\(frontend)/state")
      #expect(world.toolstack.wait(for: "6", of: "state", disk: "xvde", domain: 5), "round \(round)")
      #expect(eventually { world.state("churn", "xvde") == nil })
      try xenstore.write("\(frontend)/backend", backend)
      try xenstore.write("\(frontend)/state", "1")
      // A change of the entry is what has it looked at again: in the wild, the echo of the state that was written.
      try world.toolstack.set("online", "1", disk: "xvde", of: 5)
      #expect(eventually { world.state("churn", "xvde") != nil })
      if world.device("churn", "xvde")["reason"] == "its guest closes and opens it too often" { slowed += 1 }
    }
    // Five starts are free; the pauses behind them soon have 200 ms at least, which nobody overlooks.
    #expect(slowed >= 10)
    // Twenty news of the device, whatever they are, and twenty of its guest.
    let kinds: [SupervisorEvent.Kind] = [.deviceReady, .deviceClosing, .deviceGone, .guestAppeared, .guestGone]
    #expect(world.eventKinds.count { kinds.contains($0) } <= 40)
    #expect(world.reasons(.deviceClosing).count + world.reasons(.deviceGone).count >= 10)
  }
}
