import ControlAPI
import EventLoop
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Virtqueue
import Xen

/// Guests that break every rule: vxd goes on, only their own device suffers, the reason is recorded, everything is given back.
@Suite(.serialized) struct HostileGuestTests {
  private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

  /// Two vCPUs of the hostile guest race on one device while an honest neighbour's I/O is verified.
  @Test(arguments: UInt64(1)...30) func neighboursOfAHostileGuestNeverNotice(seed: UInt64) throws {
    let world = try World()
    defer { world.end() }
    let hostile = try world.domain(5, name: "hostile", vcpus: 2)
    let honest = try world.domain(6, name: "honest")
    try world.toolstack.attach(disk: "xvde", image: world.image("hostile.img"), to: 5)
    try world.toolstack.attach(disk: "xvde", image: world.image("honest.img"), to: 6)
    try world.start(
      profiles:
        #"{"version": 1, "disks": [{"guest": "hostile", "queues": 2, "threads": 2, "packed": true, "inOrder": true}]}"#)
    #expect(eventually { world.state("hostile", "xvde") == "ready" && world.state("honest", "xvde") == "ready" })
    let neighbour = try world.boot(honest)

    let vcpus = try (0..<2).map { try LoopThread(name: "vcpu\($0)") }
    let done = [Latch(), Latch()]
    for vcpu in 0..<2 {
      let latch = done[vcpu]
      vcpus[vcpu].loop.enqueue {
        let guest = HostileGuest(
          domain: hostile, slot: SlotTable.slot(0), vcpu: vcpu, area: 4 << 20, seed: seed &* 2 &+ UInt64(vcpu))
        for _ in 0..<60 { guest.act() }
        latch.open()
      }
    }
    for round in 0..<10 {
      let byte = UInt8(truncatingIfNeeded: seed &+ UInt64(round))
      #expect(try neighbour.write(block(byte), sector: UInt64(round) * 8) == 0, "seed \(seed)")
      #expect(try neighbour.read(sector: UInt64(round) * 8, count: 4096).bytes == block(byte), "seed \(seed)")
    }
    for vcpu in 0..<2 {
      #expect(done[vcpu].wait(seconds: 60), "seed \(seed)")
      vcpus[vcpu].stopAndJoin()
    }
    #expect(eventually { world.state("honest", "xvde") == "connected" }, "seed \(seed)")

    // The hostile guest's own device works again after a reset.
    let reformed = try world.boot(hostile, area: 8 << 20)
    #expect(try reformed.write(block(1), sector: 0) == 0, "seed \(seed)")
    #expect(eventually { world.state("hostile", "xvde") == "connected" }, "seed \(seed)")

    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(try world.toolstack.destroy(6, disks: ["xvde"]))
    #expect(eventually { world.info("guests") == 0 })
    #expect(eventually { hostile.usage == .init() && honest.usage == .init() }, "seed \(seed): \(hostile.usage)")
  }

  /// The same on the PCI bus: BARs go anywhere, decoding is toggled and vectors are rewritten by one vCPU while the other drives the device.
  @Test(arguments: UInt64(1)...30) func neighboursOfAHostileGuestOnThePCIBusNeverNotice(seed: UInt64) throws {
    let world = try World()
    defer { world.end() }
    let hostile = try world.domain(5, name: "hostile", vcpus: 2)
    let honest = try world.domain(6, name: "honest")
    try world.toolstack.attach(disk: "xvde", image: world.image("hostile.img"), to: 5)
    try world.toolstack.attach(disk: "xvde", image: world.image("honest.img"), to: 6)
    try world.start(
      profiles: #"""
        {"version": 1, "disks": [{"guest": "hostile", "queues": 2, "threads": 2}],
         "guests": [{"guest": "*", "transport": "pci"}]}
        """#)
    #expect(eventually { world.state("hostile", "xvde") == "ready" && world.state("honest", "xvde") == "ready" })
    let place = PCIAddress(device: 16)
    func boot(_ domain: SimulatedDomain, area: UInt64) throws -> SimulatedBlockGuest {
      let registers = try PCIFunctionRegisters(domain: domain, function: place)
      let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: area)
      try driver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
      return SimulatedBlockGuest(domain: domain, driver: driver)
    }
    let neighbour = try boot(honest, area: 1 << 20)
    // Both vCPUs know where the function is before either of them begins.
    let functions = try (0..<2).map { try PCIFunctionRegisters(domain: hostile, function: place, vcpu: $0) }
    let vcpus = try (0..<2).map { try LoopThread(name: "vcpu\($0)") }
    let done = [Latch(), Latch()]
    for vcpu in 0..<2 {
      let latch = done[vcpu]
      // Each is used by one thread.
      nonisolated(unsafe) let function = functions[vcpu]
      vcpus[vcpu].loop.enqueue {
        let guest = HostileGuest(
          domain: hostile, function: function, vcpu: vcpu, area: 4 << 20, seed: seed &* 2 &+ UInt64(vcpu))
        for _ in 0..<60 { guest.act() }
        latch.open()
      }
    }
    for round in 0..<10 {
      let byte = UInt8(truncatingIfNeeded: seed &+ UInt64(round))
      #expect(try neighbour.write(block(byte), sector: UInt64(round) * 8) == 0, "seed \(seed)")
      #expect(try neighbour.read(sector: UInt64(round) * 8, count: 4096).bytes == block(byte), "seed \(seed)")
    }
    for vcpu in 0..<2 {
      #expect(done[vcpu].wait(seconds: 60), "seed \(seed)")
      vcpus[vcpu].stopAndJoin()
    }
    #expect(eventually { world.state("honest", "xvde") == "connected" }, "seed \(seed)")
    let reformed = try boot(hostile, area: 8 << 20)
    #expect(try reformed.write(block(1), sector: 0) == 0, "seed \(seed)")
    #expect(eventually { world.state("hostile", "xvde") == "connected" }, "seed \(seed)")
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(try world.toolstack.destroy(6, disks: ["xvde"]))
    #expect(eventually { world.info("guests") == 0 })
    #expect(eventually { hostile.usage == .init() && honest.usage == .init() }, "seed \(seed): \(hostile.usage)")
  }

  /// In a process of its own, in which nothing else has threads and descriptors.
  ///
  /// What is there at the end was there after the first guest. The reverse may not hold: what a moment's work had open when the
  /// first sample was taken, or a thread that was about to end, is gone later.
  @Test func descriptorsAndThreadsReturnToTheStartValue() throws {
    let stage = try DaemonStage()
    #expect(eventually { stage.isServing(0) }, "\(stage.daemon.report)")
    let control = try ControlClient(path: stage.socket)
    var before: (threads: [String], descriptors: [String]) = ([], [])
    for seed in UInt64(1)...8 {
      // The first guest makes what stays for good.
      if seed == 2 { before = (stage.daemon.threads, stage.daemon.descriptors) }
      let domain = try stage.guest(DomainID(10 + seed), name: "hostile\(seed)", disks: ["xvde"])
      let guest = HostileGuest(domain: domain, slot: SlotTable.slot(0), vcpu: 0, area: 4 << 20, seed: seed)
      for _ in 0..<40 { guest.act() }
      #expect(try stage.toolstack.destroy(domain.identifier, disks: ["xvde"]))
      #expect(
        eventually { domain.usage == .init() && (try? control.call("system.info"))?["guests"] == 0 },
        "\(domain.usage) \(stage.daemon.report)")
      // A thread that is joined is in /proc for a moment longer.
      #expect(
        eventually {
          !stage.daemon.threads.contains { name in
            ["vxd-hostile", "vxd-guest", "vxd-storage"].contains { name.hasPrefix($0) }
          }
        }, "seed \(seed): \(stage.daemon.threads)")
    }
    #expect(before.threads.count > 2 && before.descriptors.count > 5, "\(before)")
    var (threads, descriptors): ([String], [String]) = ([], [])
    let isBack = eventually {
      threads = excess(of: stage.daemon.threads, over: before.threads)
      descriptors = excess(of: stage.daemon.descriptors, over: before.descriptors)
      return threads.isEmpty && descriptors.isEmpty
    }
    #expect(isBack, "left: threads \(threads), descriptors \(descriptors); before: \(before)")
    #expect(!stage.daemon.log.contains("Sanitizer"), "\(stage.daemon.report)")
  }

  /// What is more often in `present` than in `past`.
  private func excess(of present: [String], over past: [String]) -> [String] {
    var rest = past
    return present.filter { name in
      guard let index = rest.firstIndex(of: name) else { return true }
      rest.remove(at: index)
      return false
    }
  }

  @Test(arguments: [
    ("loop", VirtqueueFaultCase.loop), ("next out of range", .next), ("index jump", .jump), ("nested table", .nested),
  ]) func reasonOfAFaultIsRecorded(name: String, fault: VirtqueueFaultCase) throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start()
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    let guest = try world.boot(domain)
    let table = guest.driver.rings[0].descriptorArea
    let memory = guest.driver.memory
    let ring = try #require(guest.driver.rings[0] as? SimulatedSplitRing)
    switch fault {
    case .loop:
      memory.putDescriptor(at: table, 8 << 20, 16, 1, 0)
      ring.publish(0)
    case .next:
      memory.putDescriptor(at: table, 8 << 20, 16, 1, 999)
      ring.publish(0)
    case .jump: ring.jumpAvailable(to: 9999)
    case .nested:
      memory.putDescriptor(at: table, 8 << 20, 16, 4, 0)
      memory.putDescriptor(at: 8 << 20, 9 << 20, 16, 4, 0)
      ring.publish(0)
    }
    guest.driver.notify()
    #expect(eventually { world.state("web1", "xvde") == "faulted" }, "\(name)")
    #expect(world.device("web1", "xvde")["reason"]?.stringValue?.contains(fault.words) == true, "\(name)")
    #expect(guest.driver.status & 0x40 != 0, "\(name)")
    #expect(world.eventKinds.contains(.deviceFaulted), "\(name)")
  }

  enum VirtqueueFaultCase {
    case loop, next, jump, nested

    var words: String {
      switch self {
      case .loop: "too long or loops"
      case .next: "next field names 999"
      case .jump: "9999 ahead"
      case .nested: "inside an indirect table"
      }
    }
  }

  /// What a frontend or a confused toolstack may do to the nodes: garbage, giant values, trees that vanish, states out of order.
  @Test(arguments: UInt64(1)...40) func nodesMayBeAnythingAndTheNeighbourStays(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let world = try World()
    defer { world.end() }
    let honest = try world.domain(6, name: "honest")
    try world.toolstack.attach(disk: "xvde", image: world.image("honest.img"), to: 6)
    try world.start()
    #expect(eventually { world.state("honest", "xvde") == "ready" })
    let neighbour = try world.boot(honest)
    let domain = try world.domain(5, name: "victim")
    try world.toolstack.attach(disk: "xvdf", image: world.image("victim.img"), to: 5)
    let keys = [
      "frontend", "frontend-id", "online", "state", "params", "type", "specification", "transport", "mode", "base",
      "irq", "discard-enable", "dev", "hotplug-status", "error", "unknown/deep/er",
    ]
    for _ in 0..<25 {
      let value: String =
        switch Int.random(in: 0..<6, using: &random) {
        case 0: ""
        case 1: String(repeating: "x", count: 2000)
        case 2: "\(random.next())"
        case 3: "\(Int.random(in: -3...9, using: &random))"
        case 4: "\u{1}\u{7f}é/../%n"
        default:
          ["0", "1", "2", "3", "4", "5", "6", "nbd://x", "/dev/null", "/", "0x", "mmio"].randomElement(using: &random)
            ?? ""
        }
      switch Int.random(in: 0..<8, using: &random) {
      case 0: try world.toolstack.removeEntry(disk: "xvdf", of: 5)
      case 1: try world.toolstack.attach(disk: "xvdf", image: world.folder.path + "/victim.img", to: 5)
      case 2: try world.toolstack.removeFrontend(of: 5)
      default: try world.toolstack.set(keys.randomElement(using: &random) ?? "state", value, disk: "xvdf", of: 5)
      }
    }
    #expect(try neighbour.write(block(7), sector: 0) == 0, "seed \(seed)")
    #expect(try neighbour.read(sector: 0, count: 4096).bytes == block(7), "seed \(seed)")
    #expect(eventually { world.state("honest", "xvde") == "connected" }, "seed \(seed)")
    // A correct entry is served after all that.
    try world.toolstack.removeEntry(disk: "xvdf", of: 5)
    #expect(eventually { world.state("victim", "xvdf") == nil }, "seed \(seed)")
    // Also where there was no device, and vxd has yet to see that its entry is gone.
    world.settle()
    try world.toolstack.attach(disk: "xvdf", image: world.folder.path + "/victim.img", to: 5)
    #expect(
      eventually { world.state("victim", "xvdf") == "ready" },
      """
      seed \(seed), state \(world.toolstack.value("state", disk: "xvdf", of: 5) ?? "-"): \(world.device("victim", "xvdf"))
      """)
    #expect(try world.toolstack.destroy(5, disks: ["xvdf"]), "seed \(seed)")
    #expect(eventually { domain.usage == .init() }, "seed \(seed)")
  }
}
