import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Virtqueue
import Xen

/// Guests that break every rule: vxd goes on, only their own device suffers, the reason is recorded, everything is given back.
@Suite(.serialized) struct HostileGuestTests {
  private func entries(_ folder: String) -> [String] {
    guard let directory = opendir("/proc/self/\(folder)") else { return [] }
    defer { closedir(directory) }
    var names: [String] = []
    while let entry = readdir(directory) {
      names.append(
        withUnsafePointer(to: &entry.pointee.d_name) {
          $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
        })
    }
    return names.filter { !$0.hasPrefix(".") }
  }

  /// Threads of the daemon's; the test runner has its own, which come and go.
  private func daemonThreads() -> Int {
    entries("task").filter { task in
      guard let file = fopen("/proc/self/task/\(task)/comm", "r") else { return false }
      defer { fclose(file) }
      var name = [CChar](repeating: 0, count: 32)
      return fgets(&name, 32, file) != nil && name.starts(with: "vxd".utf8.map { CChar(bitPattern: $0) })
    }.count
  }

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

  @Test func descriptorsAndThreadsReturnToTheStartValue() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    #expect(eventually { world.info("guests") == 0 && world.info("xenstoreWatches") ?? 0 > 0 })
    var (threads, descriptors) = (0, 0)
    for seed in UInt64(1)...8 {
      // The first guest makes what stays for good: the test's own connections.
      if seed == 2 { (threads, descriptors) = (daemonThreads(), entries("fd").count) }
      let domain = try world.domain(DomainID(10 + seed), name: "hostile")
      try world.toolstack.attach(disk: "xvde", image: world.image("\(seed).img"), to: domain.identifier)
      #expect(eventually { world.state("hostile", "xvde") == "ready" })
      let guest = HostileGuest(domain: domain, slot: SlotTable.slot(0), vcpu: 0, area: 4 << 20, seed: seed)
      for _ in 0..<40 { guest.act() }
      #expect(try world.toolstack.destroy(domain.identifier, disks: ["xvde"]))
      #expect(eventually { world.info("guests") == 0 && domain.usage == .init() })
    }
    #expect(eventually { daemonThreads() <= threads }, "\(daemonThreads()) threads, \(threads) before")
    #expect(
      eventually { entries("fd").count <= descriptors },
      "\(entries("fd").count) descriptors, \(descriptors) before")
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
    guard let ring = guest.driver.rings[0] as? SimulatedSplitRing else { return }
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
    try world.toolstack.attach(disk: "xvdf", image: world.folder.path + "/victim.img", to: 5)
    #expect(eventually { world.state("victim", "xvdf") == "ready" }, "seed \(seed): \(world.device("victim", "xvdf"))")
    #expect(try world.toolstack.destroy(5, disks: ["xvdf"]), "seed \(seed)")
    #expect(eventually { domain.usage == .init() }, "seed \(seed)")
  }
}
