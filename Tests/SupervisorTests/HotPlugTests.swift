import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// Disks that come and go while their guest runs, in slots that were declared before.
@Suite struct HotPlugTests {
  private func world(spares: Int = 2) throws -> (World, SimulatedDomain) {
    let world = try World()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: #"{"version": 1, "guests": [{"guest": "web*", "spareDisks": \#(spares)}]}"#)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    return (world, domain)
  }

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  @Test func spareDiskIsFilledUsedAndEmptiedWhileTheGuestRuns() throws {
    let (world, domain) = try world()
    defer { world.end() }
    #expect(eventually { world.state("web1", "spare0") == "ready" && world.state("web1", "spare1") == "ready" })
    // The first spare has the last slot.
    let guest = try world.boot(domain, slot: 7)
    #expect(guest.driver.registers.read(0x100, width: 8) == 0)
    #expect(try guest.write(block(1), sector: 0) == 1)
    let generation = guest.driver.registers.read(0x0fc)
    let image = world.image("added.img", bytes: 2 << 20)
    let answer = world.call("device.attach", ["guest": "web1", "image": .string(image)])
    #expect(answer["device"] == "spare0")
    #expect(answer["way"] == "spare slot, config-change")
    #expect(eventually { guest.driver.registers.read(0x100, width: 8) == 4096 })
    #expect(guest.driver.registers.read(0x0fc) != generation)
    #expect(eventually { world.eventKinds.contains(.deviceAttached) })
    _ = guest.driver.acknowledgeInterrupt()
    #expect(try guest.write(block(9), sector: 16) == 0)
    #expect(try guest.read(sector: 16, count: 4096).bytes == block(9))
    // The toolstack's disk is beside it.
    let first = try world.boot(domain, slot: 0, area: 4 << 20)
    #expect(try first.write(block(3), sector: 0) == 0)
    #expect(world.call("device.detach", ["guest": "web1", "device": "spare0"])["accepted"] == true)
    #expect(eventually { guest.driver.registers.read(0x100, width: 8) == 0 })
    #expect(eventually { world.eventKinds.contains(.deviceDetached) })
    #expect(try guest.read(sector: 16, count: 4096).status == 1)
    // And again, by name.
    let again = world.call("device.attach", ["guest": "web1", "image": .string(image), "device": "spare0"])
    #expect(again["accepted"] == true)
    #expect(eventually { guest.driver.registers.read(0x100, width: 8) == 4096 })
    #expect(try guest.read(sector: 16, count: 4096).bytes == block(9))
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { domain.usage == .init() && world.info("guests") == 0 })
  }

  @Test func imageThatCannotBeAttachedLeavesTheSpareEmpty() throws {
    let (world, domain) = try world(spares: 1)
    defer { world.end() }
    #expect(eventually { world.state("web1", "spare0") == "ready" })
    let guest = try world.boot(domain, slot: 7)
    #expect(world.call("device.attach", ["guest": "web1", "image": "/nowhere.img"])["accepted"] == true)
    #expect(eventually { world.eventKinds.contains(.deviceNotAttached) })
    #expect(world.reasons(.deviceNotAttached).first?.contains("/nowhere.img") == true)
    #expect(eventually { world.state("web1", "spare0") == "connected" })
    #expect(guest.driver.registers.read(0x100, width: 8) == 0)
    let image = world.image("added.img", bytes: 2 << 20)
    #expect(world.call("device.attach", ["guest": "web1", "image": .string(image)])["accepted"] == true)
    #expect(eventually { guest.driver.registers.read(0x100, width: 8) == 4096 })
    #expect(eventually { world.eventKinds.contains(.deviceAttached) })
    let full = world.call("device.attach", ["guest": "web1", "image": .string(image)])
    #expect(full["message"] == "every spare disk of guest 'web1' is in use")
  }

  @Test func refusalsSayWhatToDo() throws {
    let (world, _) = try world(spares: 0)
    defer { world.end() }
    let none = world.call("device.attach", ["guest": "web1", "image": "/a.img"])
    #expect(none["message"] == "guest 'web1' has no spare disks")
    #expect(none["data"]?["remedy"]?.stringValue?.contains("spareDisks") == true)
    let relative = world.call("device.attach", ["guest": "web1", "image": "a.img"])
    #expect(relative["data"]?["field"] == "params.image")
    let toolstacks = world.call("device.detach", ["guest": "web1", "device": "xvde"])
    #expect(toolstacks["message"] == "'web1/xvde' was made by the toolstack")
    // What is being started cannot be paused.
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    let dry = world.call("device.pause", ["guest": "web1", "device": "xvde", "dryRun": true])
    #expect(dry["dryRun"] == true)
    world.settle()
    #expect(world.state("web1", "xvde") == "ready")
  }
}
