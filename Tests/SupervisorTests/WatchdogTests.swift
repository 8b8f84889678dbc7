import SimulatedXen
import TestSupport
import Testing
import Xen

@testable import Supervisor

/// What the watchdog sees, and what systemd is told of it.
@Suite struct WatchdogTests {
  /// A data thread that does not come back from a batch, of a device that is not a disk.
  @Test func hangingThreadOfADeviceOfAnyTypeIsReported() throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "web1")
    try world.start(profiles: #"{"version": 1, "guests": [{"devices": [{"type": "entropy"}]}]}"#)
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(eventually { world.state("web1", "rng0") == "ready" })
    let registers = TrappedRegisters(domain: domain, base: SlotTable.slot(7).base, vcpu: 0)
    try SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20).start(
      deviceID: 4, wanted: [], queueSize: 64)
    #expect(eventually { world.state("web1", "rng0") == "connected" })
    let device = try #require(world.board.current.guests[5]?.devices.first { $0.name == "rng0" })
    let counters = try #require(device.readings?.counters.first)
    // As its thread says at the start of a batch, long ago. The end of one that is under way still would take it back.
    #expect(
      eventually {
        counters.batchSince.store(1, ordering: .relaxed)
        return world.eventKinds.contains(.deviceStuck)
      })
    #expect(world.device("web1", "rng0")["stuck"]?["layer"] == "data thread")
    counters.batchSince.store(0, ordering: .relaxed)
    #expect(eventually { world.eventKinds.contains(.deviceUnstuck) })
  }

  /// A queue that is held waits for an operator, and so does what is in it; a thread that hangs beside it is another matter.
  @Test func hangingThreadBesideAQueueThatIsHeldIsReported() throws {
    let world = try World()
    defer { world.end() }
    let plan = FaultPlan()
    let domain = try world.domain(5, name: "web1")
    try world.start(
      profiles: #"{"version": 1, "disks": [{"queues": 2, "threads": 2, "onError": "hold", "stuckSeconds": 1}]}"#
    ) {
      $0.decorate = { engine, _ in FaultyEngine(engine, plan) }
    }
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    plan.add(FaultPlan.Fault(result: -5))
    guest.putHeader(at: 8 << 20, type: 1, sector: 0)
    #expect(
      guest.driver.add([
        .init(8 << 20, 16, writable: false), .init(9 << 20, 512, writable: false), .init(10 << 20, 1, writable: true),
      ]) != nil)
    guest.driver.notify()
    #expect(eventually { world.state("web1", "xvde") == "held" })
    let device = try #require(world.board.current.guests[5]?.devices.first)
    let counters = try #require(device.readings?.counters[1])
    #expect(
      eventually {
        counters.batchSince.store(1, ordering: .relaxed)
        return world.reasons(.deviceStuck).contains { $0.contains("data thread") }
      })
    // What waits in the queue that is held is not reported, however old it is.
    #expect(world.reasons(.deviceStuck).count == 1)
    #expect(world.device("web1", "xvde")["stuck"]?["queue"] == 1)
    counters.batchSince.store(0, ordering: .relaxed)
    #expect(eventually { world.eventKinds.contains(.deviceUnstuck) })
    plan.clear()
  }

  private func board(_ hanging: [Int]) -> StatusBoard {
    let board = StatusBoard()
    for (index, count) in hanging.enumerated() {
      let domain = DomainID(index + 1)
      let devices = (0..<5).map { number in
        StatusBoard.Device(
          key: DeviceKey(kind: .disk, domain: domain, device: UInt32(number)), name: "xvd\(number)", guestName: "g",
          phase: .connected, stuck: number < count ? StuckRequest(queue: 0, layer: .thread, age: 60_000) : nil)
      }
      board.update {
        $0.guests[domain] = StatusBoard.Guest(
          domain: domain, name: "g", phase: "running", vcpus: 1, devices: devices)
      }
    }
    return board
  }

  /// A guest with most of all devices, and all of them hanging, has nobody restarted.
  @Test(arguments: [
    ([5], true), ([5, 0], true), ([5, 5], false), ([1, 1, 0], false), ([5, 5, 0, 0, 0], true), ([], true),
  ])
  func oneGuestNeverDecides(hanging: [Int], isHealthy: Bool) {
    #expect(board(hanging).isHealthy == isHealthy)
  }
}
