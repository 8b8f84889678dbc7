import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

@testable import Supervisor

/// `vxctl explain` of a guest on its PCI bus, with QEMU's monitor beside it.
@Suite struct PCIExplainTests {
  private func explain(_ world: World) -> ProgramRun {
    ProgramRun(
      "/usr/bin/env",
      [
        "XENSTORED_PATH=\(world.server.path)", ProgramRun.path("vxctl"), "explain", "web1", "--socket",
        world.controlPath, "--qemu-folder", world.folder.path,
      ])
  }

  @Test func placeThatQEMUHasTooIsNamed() throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: #"{"version": 1, "guests": [{"guest": "web*", "transport": "pci"}]}"#)
    let server = try world.serveControl()
    defer { server.stop() }
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(world.device("web1", "xvde")["addressBesideQEMU"] == "00:10.0")
    let waiting = explain(world)
    #expect(waiting.status == 1 && waiting.output.contains("the guest's driver has not connected"), "\(waiting.output)")
    #expect(waiting.output.contains("it needs virtio_pci"), "\(waiting.output)")
    let path = world.folder.path + "/qmp-libxenstat-5"
    let other = #"{"bus": 0, "slot": 3, "function": 0, "class_info": {"class": 512}, "irq": 11}"#
    let same = #"{"bus": 0, "slot": 16, "function": 0, "class_info": {"class": 512}, "irq": 11}"#
    let bad = try MonitorOfQEMU(path: path, devices: other + "," + same)
    let refused = explain(world)
    bad.end()
    unlink(path)
    #expect(refused.status == 1, "\(refused.output)")
    #expect(refused.output.contains("web1/xvde: QEMU has a device at PCI function 00:10.0 too"), "\(refused.output)")
    let registers = try PCIFunctionRegisters(domain: domain, function: PCIAddress(device: 16))
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
    try driver.start(wanted: [.eventIndex], queueSize: 64)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    let good = try MonitorOfQEMU(path: path, devices: other)
    let run = explain(world)
    good.end()
    #expect(run.status == 0 && run.output.hasSuffix("no problem found\n"), "\(run.output) \(run.errors)")
    #expect(run.output.contains("function 00:10.0; BAR 0xf3000000; vectors 2"), "\(run.output)")
  }
}
