import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

/// Frontends that break the rules of Xenbus: their own device suffers, the reason is recorded, nothing stays mapped, the neighbour goes on.
@Suite struct HostileFrontendTests {
  private func world() throws -> (World, SimulatedDomain, SimulatedDomain) {
    let world = try World()
    let hostile = try world.domain(5, name: "hostile", type: "pvh")
    let honest = try world.domain(6, name: "honest", type: "pv")
    try world.toolstack.attach(disk: "xvde", image: world.image("hostile.img"), to: 5)
    try world.toolstack.attach(disk: "xvde", image: world.image("honest.img"), to: 6)
    try world.start { $0.faultLimit = 1000 }
    #expect(eventually { world.state("hostile", "xvde") == "ready" && world.state("honest", "xvde") == "ready" })
    return (world, hostile, honest)
  }

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  /// What is wrong with a setup page: a name, and where which bytes are put.
  private static let faults: [(name: String, offset: Int, value: UInt64, width: Int)] = [
    ("magic", 0, 0xdead_beef, 4), ("version", 4, 2, 2), ("no queues", 6, 0, 2), ("many queues", 6, 0xffff, 2),
    ("features", 8, .max, 8), ("no features", 8, 0, 8),
    ("epoch", 0x10, 1, 4), ("read-only pages", 0x14, 1, 4),
    ("all pages read-only", 0x14, 0xffff_ffff, 4), ("no pages", 0x18, 0, 4),
    ("all pages", 0x18, 0xffff_ffff, 4), ("more pages than granted", 0x18, 32768, 4), ("no directories", 0x1c, 0, 4),
    ("many directories", 0x1c, 33, 4), ("directory", 0x20, 0xffff_fff0, 4), ("directory zero", 0x20, 0, 4),
    ("queue index", 0x100, 9, 2), ("queue size", 0x102, 0, 2), ("odd queue size", 0x102, 63, 2),
    ("large queue size", 0x102, 32768, 2), ("no port", 0x104, 0, 4), ("unknown port", 0x104, 0xffff_ffff, 4),
    ("descriptors at zero", 0x110, 0, 8), ("descriptors outside", 0x110, 0x1000_0000, 8),
    ("descriptors at the end", 0x110, 0xffff_ffff_ffff_fff0, 8), ("unaligned descriptors", 0x110, 0x10_0001, 8),
    ("available ring outside", 0x118, 0x7fff_ffff_ffff_fffe, 8), ("used ring outside", 0x120, 0x1000_0000_0000, 8),
    ("in-flight area outside", 0x128, 0xffff_fffc, 4), ("in-flight area's size", 0x12c, 12, 4),
  ]

  @Test func everyWrongSetupIsRefusedWithAReasonAndARightOneServed() throws {
    let (world, hostile, honest) = try world()
    defer { world.end() }
    let neighbour = try world.bootXenbus(honest)
    for fault in Self.faults {
      let registers = try XenbusRegisters(server: world.server, domain: hostile, disk: "xvde")
      registers.alter = { page in
        for index in 0..<fault.width {
          (page + fault.offset + index).storeBytes(
            of: UInt8(truncatingIfNeeded: fault.value >> UInt64(8 * index)), as: UInt8.self)
        }
      }
      let driver = SimulatedDriver(registers: registers, memory: hostile.memory, area: 1 << 20)
      try driver.start(wanted: [.indirectDescriptors], queueSize: 64)
      #expect(!registers.isConnected, "\(fault.name) was accepted")
      #expect(registers.acknowledgement.hasPrefix("\(registers.sequence) error "), "\(fault.name)")
      #expect(eventually { world.state("hostile", "xvde") == "faulted" }, "\(fault.name)")
      #expect(hostile.grants.mappedPages == 0 && hostile.grants.boundPorts == 0, "\(fault.name)")
      try registers.xenstore.write("\(registers.frontend)/state", "1")
      try registers.xenstore.write("\(registers.frontend)/vx-setup", "0 0")
    }
    #expect(try neighbour.guest.write(block(1), sector: 0) == 0)
    // The frontend's numbers go on from where they are.
    let again = try world.bootXenbus(hostile)
    if !again.registers.isConnected { again.registers.connect() }
    #expect(again.registers.isConnected)
    #expect(try again.guest.write(block(2), sector: 0) == 0)
  }

  @Test func pageThatIsGrantedForReadingOnlyIsNoPlaceForData() throws {
    let (world, hostile, _) = try world()
    defer { world.end() }
    let registers = try XenbusRegisters(server: world.server, domain: hostile, disk: "xvde")
    registers.alter = { _ in
      // The directory names a read-only grant for a page behind the rings.
      let reference = hostile.grants.grant(frame: 1000, writable: false)
      let directory = hostile.memory.pageCount - 33
      hostile.memory.pointer(UInt64(directory) << 12).storeBytes(of: reference, toByteOffset: 4 * 1000, as: UInt32.self)
    }
    let driver = SimulatedDriver(registers: registers, memory: hostile.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors], queueSize: 64)
    // The rings are good, so the device works; a request that needs the page fails, and it alone.
    #expect(registers.isConnected)
    #expect(world.device("hostile", "xvde")["grants"]?["access"] == "copied")
    let guest = SimulatedBlockGuest(domain: hostile, driver: driver)
    #expect(try guest.write(block(4), sector: 0) == 0)
    let bad = try guest.request(type: 0, sector: 0, data: [.init(1000 << 12, 4096, writable: true)])
    #expect(bad.status == 1)
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(4))
  }

  /// Descriptor table in page 256, available ring in 257, used ring in 258: what a driver grants read-only ends at page 257.
  @Test(arguments: [false, true]) func ringsThatAreGrantedReadOnlyAreReadAndNoPlaceForData(copied: Bool) throws {
    let (world, hostile, _) = try world()
    defer { world.end() }
    let registers = try XenbusRegisters(server: world.server, domain: hostile, disk: "xvde")
    registers.readOnlyPages = 257
    registers.patience = 5
    if copied { hostile.grants.largeMapFailures.store(1, ordering: .relaxed) }
    let driver = SimulatedDriver(registers: registers, memory: hostile.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
    #expect(registers.isConnected)
    #expect(world.device("hostile", "xvde")["grants"]?["access"] == .string(copied ? "copied" : "mapped"))
    let guest = SimulatedBlockGuest(domain: hostile, driver: driver)
    for count in 0..<100 { #expect(try guest.write(block(UInt8(count)), sector: 8) == 0) }
    let table = driver.rings[0].descriptorArea
    let bad = try guest.request(type: 0, sector: 8, data: [.init(table, 4096, writable: true)])
    #expect(bad.status == 1)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block(99))
    driver.reset()
    #expect(hostile.grants.mappedPages == 0)
  }

  @Test(arguments: [(256, "not within"), (258, "in a read-only page")])
  func ringsOnTheWrongSideOfTheReadOnlyPagesAreRefused(pages: Int, reason: String) throws {
    let (world, hostile, _) = try world()
    defer { world.end() }
    let registers = try XenbusRegisters(server: world.server, domain: hostile, disk: "xvde")
    registers.readOnlyPages = pages
    registers.patience = 5
    let driver = SimulatedDriver(registers: registers, memory: hostile.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors], queueSize: 64)
    #expect(!registers.isConnected)
    #expect(registers.acknowledgement.contains(reason))
    #expect(eventually { hostile.grants.mappedPages == 0 })
  }

  @Test func addressOutsideTheArenaFailsItsRequestAlone() throws {
    let (world, hostile, _) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(hostile)
    for address: UInt64 in [UInt64(registers.references.count) << 12, 1 << 27, 1 << 40, .max - 8191] {
      let bad = try guest.request(type: 0, sector: 0, data: [.init(address, 4096, writable: true)])
      #expect(bad.status == 1)
    }
    #expect(try guest.write(block(5), sector: 0) == 0)
  }

  @Test func grantThatIsInUseCannotBeTakenBackAndAfterResetItCan() throws {
    let (world, hostile, _) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(hostile)
    #expect(try guest.write(block(5), sector: 0) == 0)
    #expect(!hostile.grants.revoke(registers.references[300]))
    guest.driver.reset()
    #expect(hostile.grants.revoke(registers.references[300]))
  }

  @Test func garbageInTheFrontendsNodesEndsNothingButItsOwnDevice() throws {
    let (world, hostile, honest) = try world()
    defer { world.end() }
    let neighbour = try world.bootXenbus(honest)
    let xenstore = try XenStore(socketPath: world.server.path)
    let frontend = "/local/domain/5/device/virtio_disk/\(SimulatedToolstack.deviceNumber("xvde"))"
    let garbage = [
      "", " ", "4", "-1", "99999999999999999999", "3 3", "0x3", "\u{1F600}", String(repeating: "7", count: 1500),
    ]
    for text in garbage {
      for node in ["vx-setup", "vx-cfgw", "state"] {
        try xenstore.write("\(frontend)/\(node)", text)
        try xenstore.write("\(frontend)/state", "3")
      }
    }
    for text in ["1", "1 2 3", "a b", "1 -2", "4294967296 1", "1 4294967295", "7 7"] {
      try xenstore.write("\(frontend)/vx-setup", text)
      try xenstore.write("\(frontend)/state", "3")
    }
    for _ in 0..<20 { #expect(try neighbour.guest.write(block(1), sector: 0) == 0) }
    #expect(eventually { hostile.grants.mappedPages == 0 })
    try xenstore.write("\(frontend)/state", "1")
    let (guest, registers) = try world.bootXenbus(hostile)
    if !registers.isConnected { registers.connect() }
    #expect(registers.isConnected)
    for text in ["1", "1 0", "1 0 f", "1 9999999 00", "x 0 00", "1 -1 00", "2 0 zz", "3 32 000000000000000000"] {
      try xenstore.write("\(frontend)/vx-cfgw", text)
    }
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.settle()
    #expect(world.state("hostile", "xvde") == "connected")
  }

  @Test func eventStormLeavesTheNeighbourAlone() throws {
    let (world, hostile, honest) = try world()
    defer { world.end() }
    let (guest, _) = try world.bootXenbus(hostile)
    let neighbour = try world.bootXenbus(honest)
    let storm = try LoopThread(name: "storm")
    let over = Latch()
    storm.loop.enqueue {
      for port in 0..<200_000 { hostile.grants.send(UInt32(5 + port % 3)) }
      over.open()
    }
    for _ in 0..<50 { #expect(try neighbour.guest.write(block(1), sector: 0) == 0) }
    over.wait()
    storm.stopAndJoin()
    #expect(try guest.write(block(1), sector: 0) == 0)
  }

  @Test func brokenRingNeedsAResetAndEventsCostNothingUntilThen() throws {
    let (world, hostile, _) = try world()
    defer { world.end() }
    let (guest, registers) = try world.bootXenbus(hostile)
    guest.driver.jumpAvailable(to: 50000)
    guest.driver.notify()
    #expect(eventually { registers.backendStatus & 0x40 != 0 })
    #expect(eventually { world.state("hostile", "xvde") == "faulted" })
    for _ in 0..<1000 { guest.driver.notify() }
    guest.driver.reset()
    let again = try world.bootXenbus(hostile)
    #expect(try again.guest.write(block(6), sector: 0) == 0)
  }

  @Test(arguments: UInt64(1)...200) func randomSetupPagesAreAnsweredAndNeverTrap(seed: UInt64) {
    var random = seed &* 0x9E37_79B9_7F4A_7C15 | 1
    func next() -> UInt64 {
      random ^= random << 13
      random ^= random >> 7
      random ^= random << 17
      return random
    }
    let offer = XenbusOffer(
      identity: DeviceIdentity(deviceID: 2, offeredFeatures: [.version1, .eventIndex], queueSizes: [256, 64]),
      maximumPages: 32768, configurationBytes: 60, epoch: 77)
    for _ in 0..<50 {
      var page = [UInt8](repeating: 0, count: 4096)
      func put(_ value: UInt64, _ offset: Int, _ width: Int) {
        for index in 0..<width { page[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
      }
      put(0x3153_5856, 0, 4)
      put(1, 4, 2)
      put(next() % 3, 6, 2)
      put(0x3_2000_0000, 8, 8)
      put(77, 0x10, 4)
      put(2048, 0x18, 4)
      put(2, 0x1c, 4)
      for queue in 0..<2 {
        let entry = 0x100 + 48 * queue
        put(UInt64(queue), entry, 2)
        put(64, entry + 2, 2)
        put(UInt64(queue + 5), entry + 4, 4)
        for area in 0..<3 { put(UInt64(0x10000 * (1 + 3 * queue + area)), entry + 16 + 8 * area, 8) }
      }
      // A few fields become anything.
      for _ in 0..<Int(next() % 4) { put(next(), Int(next() % 0x168) & ~1, [2, 4, 8][Int(next() % 3)]) }
      let result = page.withUnsafeBytes { bytes -> XenbusSetup? in try? XenbusSetup(bytes, offer) }
      for queue in result?.queues ?? [] {
        guard let layout = queue?.layout else { continue }
        let end = UInt64(result?.pages ?? 0) << 12
        #expect(
          layout.descriptorArea >= 4096 && layout.descriptorArea + UInt64(layout.descriptorBytes) <= end, "seed \(seed)"
        )
        #expect(layout.deviceArea + UInt64(layout.deviceBytes(packed: false)) <= end, "seed \(seed)")
      }
    }
  }
}
