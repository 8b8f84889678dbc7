import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

/// One vxd with the devices of a fleet: what each more of them costs, and that the last costs what the first did.
///
/// VXD_FLEET is the number of devices (a multiple of 64); VXD_FLEET_SHOWN=1 prints what was measured.
@Suite(.serialized) struct FleetTests {
  private static let names = ["xvde", "xvdf", "xvdg", "xvdh"]
  private static let guests = max(16, (getenv("VXD_FLEET").flatMap { Int(String(cString: $0)) } ?? 128) / names.count)
  private static let isShown = getenv("VXD_FLEET_SHOWN") != nil

  private struct Guest {
    let domain: SimulatedDomain
    var disks: [SimulatedBlockGuest] = []
  }

  private struct Reading {
    let kilobytes: Int
    let milliseconds: Int
    let calls: Int
  }

  private func say(_ text: String) { if Self.isShown { print(text) } }

  @Test func aThousandDevicesCostWhatTheFirstDid() throws {
    let stage = try DaemonStage()
    #expect(eventually { stage.isServing(0) }, "\(stage.daemon.report)")
    let client = try ControlClient(path: stage.socket)
    let image = stage.folder.file("fleet.img", bytes: 4 << 20)
    func reading() -> Reading {
      Reading(
        kilobytes: stage.daemon.ownKilobytes, milliseconds: stage.daemon.processorMilliseconds,
        calls: stage.daemon.readsAndWrites)
    }
    func states(_ state: JSONValue) -> Int {
      (try? client.call("device.list"))?.arrayValue?.filter { $0["state"] == state }.count ?? 0
    }
    var fleet: [Guest] = []
    /// Devices of one more quarter of the guests, each served and used once.
    func grow() throws {
      let begun = fleet.count
      for index in begun..<(begun + Self.guests / 4) {
        let id = DomainID(index + 1)
        let domain = try SimulatedDomain(identifier: id, memoryBytes: 16 << 20)
        try stage.toolstack.create(domain, name: "guest\(id)")
        for name in Self.names {
          try stage.toolstack.attach(disk: name, image: image, to: id, readOnly: true)
        }
        for name in Self.names {
          try #require(stage.toolstack.wait(for: "2", of: "state", disk: name, domain: id), "\(stage.daemon.report)")
        }
        fleet.append(Guest(domain: domain))
      }
      try #require(eventually(seconds: 120) { states("ready") == Self.guests / 4 * Self.names.count })
    }
    func boot() throws {
      for index in fleet.indices where fleet[index].disks.isEmpty {
        for slot in Self.names.indices {
          let domain = fleet[index].domain
          let registers = TrappedRegisters(domain: domain, base: SlotTable.slot(slot).base)
          let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: UInt64(1 + slot * 3) << 20)
          try driver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
          fleet[index].disks.append(SimulatedBlockGuest(domain: domain, driver: driver))
        }
      }
    }
    func use() throws {
      for guest in fleet {
        for disk in guest.disks { try #require(try disk.read(sector: 8, count: 4096).status == 0) }
      }
    }

    var kilobytes: [Int] = []
    var calls: [Int] = []
    let quarter = Self.guests / 4 * Self.names.count
    for number in 1...4 {
      let before = reading()
      try grow()
      let between = reading()
      try boot()
      try use()
      let after = reading()
      calls.append((between.calls - before.calls) / quarter)
      kilobytes.append((after.kilobytes - before.kilobytes) / quarter)
      say(
        "fleet: \(number * quarter) devices, \(after.kilobytes) KiB, \(stage.daemon.threads.count) threads. Each of the last \(quarter): "
          + "\((between.milliseconds - before.milliseconds) * 1000 / quarter) us of processor and \(calls[number - 1]) reads and writes to "
          + "attach, \((between.kilobytes - before.kilobytes) / quarter) KiB when attached, \(kilobytes[number - 1]) KiB when used"
      )
    }
    try #require(eventually { states("connected") == 4 * quarter })
    // The first quarter pays for what all share. A disk has 20 KiB of saved state and the page that its
    // request went through; an unoptimised build has larger stacks. Sanitizers have memory of their own for each thread and each allocation.
    for later in kilobytes.dropFirst() where !testsAreSlow {
      #expect(later <= 192, "\(kilobytes) KiB for each device")
    }
    // Work is counted and not timed: what a device costs does not depend on how many there are.
    #expect(calls[3] <= calls[1] + calls[1] / 4, "\(calls) reads and writes for each device")
  }

  /// 64 guests with two disks each, all of which always have 20 reads of 256 KiB under way, served by however many processors there are.
  @Test func guestsThatDoTheSameGetTheSame() throws {
    let stage = try DaemonStage()
    #expect(eventually { stage.isServing(0) }, "\(stage.daemon.report)")
    let image = stage.folder.file("fleet.img", bytes: 4 << 20)
    let (guests, disks) = (64, 2)
    var drivers: [SimulatedDriver] = []
    for index in 0..<guests {
      let id = DomainID(index + 1)
      let domain = try SimulatedDomain(identifier: id, memoryBytes: 8 << 20)
      try stage.toolstack.create(domain, name: "guest\(id)")
      for name in Self.names.prefix(disks) {
        try stage.toolstack.attach(disk: name, image: image, to: id, readOnly: true)
        try #require(stage.toolstack.wait(for: "2", of: "state", disk: name, domain: id), "\(stage.daemon.report)")
      }
      for slot in 0..<disks {
        let registers = TrappedRegisters(domain: domain, base: SlotTable.slot(slot).base)
        let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: UInt64(1 + slot * 3) << 20)
        try driver.start(wanted: [.eventIndex], queueSize: 64)
        drivers.append(driver)
      }
    }
    // A header of zeroes: a read from the disk's start.
    let chains = drivers.map { driver -> [SimulatedDriver.Buffer] in
      let place = (driver.areaEnd + 4095) & ~4095
      driver.memory.pointer(place).initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
      return [
        .init(place, 16, writable: false), .init(place + 4096, 262_144, writable: true),
        .init(place + 64, 1, writable: true),
      ]
    }
    for (driver, chain) in zip(drivers, chains) {
      for _ in 0..<20 { _ = driver.rings[0].add(chain, indirect: false) }
      driver.notify()
    }
    var answered = [Int](repeating: 0, count: drivers.count)
    var total = 0
    let goal = drivers.count * (testsAreSlow ? 100 : 400)
    let deadline = EventLoop.now() + 120_000_000_000
    // Without a pause: a guest gets its next request as soon as one is answered, so that the answers, and not this loop, are what is waited for.
    while total < goal, EventLoop.now() < deadline {
      for (index, driver) in drivers.enumerated() {
        while driver.rings[0].takeUsed() != nil {
          answered[index] += 1
          total += 1
          _ = driver.rings[0].add(chains[index], indirect: false)
        }
        if driver.rings[0].notificationIsWanted() { driver.notify() }
      }
    }
    try #require(total >= goal, "\(total) of \(goal): \(stage.daemon.report)")
    let shares = (0..<guests).map { answered[$0 * disks] + answered[$0 * disks + 1] }.sorted()
    say("fleet: \(guests) guests with \(disks) disks: \(shares[0]) to \(shares[guests - 1]) requests, \(total) in all")
    // The host's scheduler has a part in it, and what else runs there: that nobody is left behind is what must hold on any machine.
    #expect(shares[0] * guests >= total / 2, "\(shares)")
  }
}
