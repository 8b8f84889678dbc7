import ControlAPI
import SimulatedXen
import TestSupport
import Testing
import Xen

@testable import Supervisor

/// `vxctl explain` and `vxctl doctor` against a daemon with guests of every kind, not of HVM guests with disks alone.
@Suite struct ExplainTests {
  /// A run of vxctl that finds the world's daemon.
  ///
  /// - Parameter seesXenstore: not so in a driver domain's user's shell.
  private func vxctl(_ world: World, _ words: [String], seesXenstore: Bool = true) -> ProgramRun {
    let path = seesXenstore ? world.server.path : world.folder.path + "/nothing"
    return ProgramRun(
      "/usr/bin/env",
      ["XENSTORED_PATH=\(path)", ProgramRun.path("vxctl")] + words + ["--socket", world.controlPath])
  }

  @Test(arguments: ["pv", "pvh"]) func guestOverXenbusIsExplained(type: String) throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "db1", type: type)
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start()
    let server = try world.serveControl()
    defer { server.stop() }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let waiting = vxctl(world, ["explain", "db1"])
    #expect(waiting.status == 1 && waiting.output.contains("the guest's driver has not connected"), "\(waiting.output)")
    #expect(waiting.output.contains("it needs the kernel module virtio_xenbus"), "\(waiting.output)")
    let (guest, _) = try world.bootXenbus(domain)
    #expect(try guest.write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
    #expect(eventually { world.state("db1", "xvde") == "connected" })
    for target in ["db1", "db1/xvde", "5"] {
      let run = vxctl(world, ["explain", target])
      #expect(run.status == 0 && run.output.hasSuffix("no problem found\n"), "\(target): \(run.output) \(run.errors)")
      #expect(run.output.contains("guest memory: by grants") && run.output.contains("event channels"), "\(run.output)")
      #expect(!run.output.contains("ioreq") && !run.output.contains("slot"), "\(run.output)")
    }
    // Its event channel is counted, and that of a server it does not have is not.
    #expect(world.metrics.contains("vxd_event_channels 1\n"))
  }

  @Test func guestWithoutDisksIsExplained() throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "plain")
    try world.start(profiles: #"{"version": 1, "guests": [{"guest": "p*", "devices": [{"type": "entropy"}]}]}"#)
    let server = try world.serveControl()
    defer { server.stop() }
    #expect(eventually { world.state("plain", "rng0") == "ready" })
    let waiting = vxctl(world, ["explain", "plain"])
    #expect(waiting.output.contains("plain/rng0: the guest's driver has not connected"), "\(waiting.output)")
    let registers = TrappedRegisters(domain: domain, base: SlotTable.slot(7).base, vcpu: 0)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
    try driver.start(deviceID: 4, wanted: [], queueSize: 16)
    #expect(eventually { world.state("plain", "rng0") == "connected" })
    let run = vxctl(world, ["explain", "plain"])
    #expect(run.status == 0 && run.output.contains("plain/rng0: entropy is open"), "\(run.output)")
    // A guest with nothing of ours is told so, and what a line would need.
    _ = try world.domain(6, name: "none", type: "pv")
    let none = vxctl(world, ["explain", "none"])
    #expect(none.status == 1 && none.output.contains("no virtio device whose backend is this domain"), "\(none.output)")
    // One that cannot have what its profile declares, too: PV guests, and those on Arm, have no slots.
    _ = try world.domain(7, name: "plainer", type: "pvh")
    #expect(eventually { world.state("plainer", "rng0") == "failed" })
    let refused = vxctl(world, ["explain", "plainer"])
    #expect(
      refused.status == 1 && refused.output.contains("on Arm add a line to its configuration"), "\(refused.output)")
  }

  /// A driver domain knows its guests by their numbers alone, and may not look at them.
  @Test(arguments: [true, false]) func guestOfADriverDomainIsExplained(seesXenstore: Bool) throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "web1", type: "hvm")
    let xenstore = try XenStore(socketPath: world.server.path)
    try xenstore.write("/local/domain/0/domid", "7")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start()
    let server = try world.serveControl()
    defer { server.stop() }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(world.call("guest.list").arrayValue?.first?["ioreqServer"] == nil)
    let (guest, _) = try world.bootXenbus(domain)
    #expect(try guest.write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
    let run = vxctl(world, ["explain", "5"], seesXenstore: seesXenstore)
    #expect(run.status == 0 && run.output.contains("no problem found"), "\(run.output) \(run.errors)")
    #expect(run.output.contains("Xenstore is not readable here") == !seesXenstore, "\(run.output)")
    #expect(run.output.contains("grants"), "\(run.output)")
    // Doctor looks at what a driver domain needs, no rights over guests, and at what is wrong with their devices.
    #expect(world.call("system.info")["hostNodes"] == ["evtchn", "gntdev"])
    try world.toolstack.attach(disk: "xvdf", image: "/nowhere/disk.img", to: 5)
    let name = world.call("guest.list").arrayValue?.first?["name"]?.stringValue ?? ""
    #expect(eventually { world.state(name, "xvdf") == "failed" })
    let doctor = vxctl(world, ["doctor", "--json"], seesXenstore: seesXenstore)
    let findings = try JSONText.parse(Array(doctor.output.utf8)).arrayValue ?? []
    let subjects = findings.compactMap { $0["subject"]?.stringValue }
    #expect(subjects.contains("\(name)/xvdf") && !subjects.contains("\(name)/xvde"), "\(doctor.output)")
  }

  /// Doctor names what is wrong with a device of any guest, by whatever it is reached.
  @Test func doctorLooksAtEveryGuest() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles:
        #"{"version": 1, "guests": [{"guest": "plain", "devices": [{"type": "console", "pty": "/nowhere/pty"}]}]}"#)
    let server = try world.serveControl()
    defer { server.stop() }
    _ = try world.domain(5, name: "pv", type: "pv")
    try world.toolstack.attach(disk: "xvde", image: "/nowhere/disk.img", to: 5)
    _ = try world.domain(6, name: "good", type: "pvh")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 6)
    let plain = try world.domain(7, name: "plain")
    #expect(eventually { world.state("pv", "xvde") == "failed" && world.state("plain", "console0") == "failed" })
    #expect(eventually { world.state("good", "xvde") == "ready" })
    let run = vxctl(world, ["doctor", "--json"])
    let findings = try JSONText.parse(Array(run.output.utf8)).arrayValue ?? []
    func text(_ subject: String) -> String? {
      findings.first { $0["subject"]?.stringValue == subject }?["text"]?.stringValue
    }
    #expect(text("pv/xvde")?.contains("/nowhere/disk.img") == true, "\(run.output)")
    #expect(text("plain/console0")?.contains("pty") == true, "\(run.output)")
    #expect(text("good/xvde") == nil && text("vxd")?.hasPrefix("answers") == true)
    // A guest whose drivers are gone when it is saved is nothing to warn of; one that has none is.
    #expect(text("plain") == nil)
    #expect(vxctl(world, ["explain", "plain"]).output.contains("note xl save and xl restore keep these devices;"))
    plain.hasXenDrivers.store(false, ordering: .relaxed)
    #expect(vxctl(world, ["doctor"]).output.contains("xl save and xl migrate lose the state of these devices"))
    #expect(vxctl(world, ["explain", "plain"]).output.contains("note xl save and xl migrate lose"))
  }
}
