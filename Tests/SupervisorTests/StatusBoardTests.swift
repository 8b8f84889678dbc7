import ControlAPI
import DeviceHost
import Devices
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@testable import Supervisor

/// What the supervisor publishes is values and counters: nothing in it can be called, or keeps anything alive.
@Suite struct StatusBoardTests {
  /// What serves the devices of a guest.
  private struct Owners: Sendable {
    weak let transport: (any DeviceTransport)?
    weak let memory: (any GuestMemorySource)?
    weak let bus: (any GuestBus)?
    weak let backend: DeviceBackend?
  }

  private static let profiles = #"""
    {"version": 1, "guests": [
      {"guest": "mmio*", "devices": [{"type": "console"}, {"type": "entropy"}]},
      {"guest": "pci*", "transport": "pci", "devices": [{"type": "console"}, {"type": "entropy"}]}]}
    """#

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  private func owners(_ world: World, _ domain: DomainID) -> Owners? {
    world.inside { supervisor in
      guard let device = supervisor.table.guests[domain]?.devices.values.first(where: { $0.key.kind == .disk }) else {
        return nil
      }
      return Owners(
        transport: device.transport, memory: device.bus.memory(of: device.key), bus: device.bus,
        backend: device.backend)
    }
  }

  /// A guest with a disk at work.
  private func boot(_ world: World, _ bus: String, as number: DomainID = 5) throws -> SimulatedBlockGuest {
    let domain = try world.domain(number, name: "\(bus)1", type: bus == "xenbus" ? "pvh" : "hvm")
    try world.toolstack.attach(disk: "xvde", image: world.image(bus), to: number)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: number))
    let guest: SimulatedBlockGuest
    switch bus {
    case "xenbus": guest = try world.bootXenbus(domain).guest
    case "pci":
      let registers = try PCIFunctionRegisters(
        domain: domain, function: PCIAddress(device: 16), base: 0xf300_0000, interrupts: .messages)
      let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
      try driver.start(deviceID: 2, wanted: [.indirectDescriptors, .eventIndex, .blockFlush], queueSize: 64)
      guest = SimulatedBlockGuest(domain: domain, driver: driver)
    default: guest = try world.boot(domain)
    }
    #expect(try guest.write(block(7), sector: 8) == 0)
    #expect(eventually { world.state("\(bus)1", "xvde") == "connected" })
    return guest
  }

  /// A client that still reads of a guest that has gone has its numbers, and holds nothing of it.
  @Test(arguments: ["mmio", "pci", "xenbus"]) func readerKeepsNothingOfAGuestAlive(bus: String) throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: Self.profiles)
    _ = try boot(world, bus)
    let owners = try #require(self.owners(world, 5))
    #expect(owners.transport != nil && owners.memory != nil && owners.bus != nil && owners.backend != nil)
    let held = try #require(world.board.current.guests[5])
    let device = try #require(held.devices.first { $0.key.kind == .disk })
    let before = SupervisorControl.describe(device: device, counters: true)
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { world.board.current.guests[5] == nil })
    #expect(eventually { owners.transport == nil }, "the transport is kept")
    #expect(eventually { owners.memory == nil }, "the guest's memory is kept")
    #expect(eventually { owners.bus == nil }, "the bus is kept")
    #expect(eventually { owners.backend == nil }, "the backend is kept")
    // What it did is still there to be read.
    let after = SupervisorControl.describe(device: device, counters: true)
    #expect(after["writes"] == 1 && after["writes"] == before["writes"])
    #expect(after["counters"]?["interrupts"]?.integerValue == before["counters"]?["interrupts"]?.integerValue)
  }

  /// Everything that is on the board while guests are at work, whatever they reach their devices by.
  @Test func boardHoldsValuesAndCountersAlone() throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: Self.profiles)
    let buses = ["mmio", "pci", "xenbus"]
    for (index, bus) in buses.enumerated() { _ = try boot(world, bus, as: DomainID(5 + index)) }
    #expect(
      eventually {
        buses.dropLast().allSatisfy { bus in
          ["console0", "rng0"].allSatisfy { world.state("\(bus)1", $0) == "ready" }
        }
      })
    let search = OwnerSearch(
      world.board.current,
      counters: [
        Gauge.self, PoolGauges.self, Counter.self, QueueCounters.self, QueueLatencies.self, IOReqServer.Counters.self,
      ])
    #expect(search.found.isEmpty, "\(search.found.joined(separator: "\n"))")
    // It was there to be looked at.
    for type: Any.Type in [
      StatusBoard.Guest.self, StatusBoard.Device.self, StatusBoard.IOReqServerReport.self, BackendReadings.self,
      BackendPort.self, QueueCounters.self, QueueLatencies.self, IOReqServer.Counters.self, Fact.self,
      Gauge.self, PoolGauges.self, GrantGauges.self, Reading.self, Reading.Member.self,
    ] {
      #expect(search.types.contains(String(reflecting: type)), "\(type)")
    }
  }
}
