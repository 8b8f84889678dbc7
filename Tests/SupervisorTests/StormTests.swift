import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// Many guests at once.
@Suite(.serialized) struct StormTests {
  /// Threads of the storm's guests and devices. Other suites run beside this one, with threads of other names.
  private static func threads() -> [String] {
    TemporaryFolder.names("/proc/self/task").compactMap { task in
      guard let file = fopen("/proc/self/task/\(task)/comm", "re") else { return nil }
      defer { fclose(file) }
      var name = [CChar](repeating: 0, count: 32)
      guard fgets(&name, 32, file) != nil else { return nil }
      return String(decoding: name.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }.filter { $0.hasPrefix("vxd-storm") || $0.hasPrefix("vxd-guest-1") && $0.count == "vxd-guest-1000".count }
  }

  /// Descriptors of files in a folder.
  private static func descriptors(_ folder: String) -> Int {
    TemporaryFolder.names("/proc/self/fd").filter { number in
      var path = [CChar](repeating: 0, count: 4096)
      let count = readlink("/proc/self/fd/\(number)", &path, path.count)
      return String(decoding: path.prefix(max(count, 0)).map { UInt8(bitPattern: $0) }, as: UTF8.self)
        .hasPrefix(folder + "/")
    }.count
  }

  /// 200 guests with 4 disks each appear while nobody looks, and vanish at once.
  @Test func twoHundredGuestsWithFourDisksComeAndGoAtOnce() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let guests: [DomainID] = Array(1000..<(testsAreSlow ? 1020 : 1200))
    let disks = ["xvde", "xvdf", "xvdg", "xvdh"]
    let watches = world.info("xenstoreWatches")
    world.stop()
    let nodes = world.toolstack.backendNodes
    var domains: [SimulatedDomain] = []
    for identifier in guests {
      let domain = try SimulatedDomain(identifier: identifier, memoryBytes: 1 << 20)
      try world.toolstack.create(domain, name: "storm\(identifier)")
      domains.append(domain)
      for disk in disks {
        try world.toolstack.attach(
          disk: disk, image: world.image("\(identifier)\(disk)", bytes: 1 << 20), to: identifier)
      }
    }
    // They all appear at once; small queues, since the host has 65536 aio operations as it comes.
    try world.start(profiles: #"{"version": 1, "disks": [{"queueSize": 32}]}"#)
    for identifier in guests {
      for disk in disks {
        #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: identifier, seconds: 60))
      }
    }
    #expect(Self.threads().count == guests.count * 5 && Self.descriptors(world.folder.path) >= guests.count * 4)
    #expect(world.info("ioreqServers") == Int64(guests.count))
    #expect(world.info("devices") == Int64(guests.count * 4))
    world.settle()
    #expect(world.info("devicesInTrouble") == 0)
    try world.toolstack.removeAllEntries()
    #expect(eventually(seconds: 60) { world.info("guests") == 0 })
    // A thread that ends may hold the last reference to its guest's handle for a moment longer.
    #expect(eventually { domains.allSatisfy { $0.usage == .init() } })
    #expect(world.info("xenstoreWatches") == watches)
    #expect(world.info("mappedPages") == 0)
    for identifier in guests { try world.toolstack.crash(identifier) }
    world.stop()
    domains = []
    // A thread that is joined is in /proc for a moment longer.
    #expect(eventually { Self.threads().isEmpty }, "\(Self.threads())")
    #expect(Self.descriptors(world.folder.path) == 0)
    #expect(world.toolstack.backendNodes == nodes)
  }

  @Test func rebootAndRenameAndCoalescedEventsLeaveOneDeviceEach() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    var identifier: DomainID = 32750  // the numbers wrap at 32752
    for round in 0..<6 {
      let domain = try world.domain(identifier, name: "web1")
      try world.toolstack.attach(disk: "xvde", image: world.image(), to: identifier)
      // Spurious events: nothing follows from them.
      for _ in 0..<20 { try world.toolstack.set("feature", "\(round)", disk: "xvde", of: identifier) }
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: identifier))
      try world.toolstack.rename(identifier, "web\(round)")
      #expect(eventually { world.state("web\(round)", "xvde") == "ready" })
      #expect(world.info("devices") == 1)
      #expect(try world.toolstack.destroy(identifier, disks: ["xvde"]))
      #expect(eventually { domain.usage == .init() && world.info("guests") == 0 })
      identifier = identifier == 32751 ? 1 : identifier + 1
    }
  }
}
