import ControlAPI
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Virtqueue
import Xen

@Suite struct LifecycleTests {
  private let block = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 13) }

  @Test func diskIsServedFromCreationToDestruction() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let watches = world.server.watchCount
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    #expect(world.info("ioreqServers") == 1)
    let guest = try world.boot(domain)
    #expect(world.toolstack.wait(for: "4", of: "state", disk: "xvde", domain: 5))
    #expect(try guest.write(block, sector: 8) == 0)
    #expect(try guest.flush() == 0)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(eventually { world.device("web1", "xvde")["counters"]?["writes"]?.integerValue == 1 })
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { world.info("guests") == 0 })
    #expect(eventually { domain.usage == .init() })
    #expect(world.info("mappedPages") == 0)
    world.settle()
    #expect(world.server.watchCount == watches)
    #expect(
      world.eventKinds == [
        .guestAppeared, .deviceReady, .deviceConnected, .deviceClosing, .deviceGone, .guestGone,
      ])
  }

  @Test func twoGuestsWithTwoDisksEachAreServedAtOnce() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    var guests: [(DomainID, [SimulatedBlockGuest])] = []
    for identifier: DomainID in [3, 4] {
      let domain = try world.domain(identifier, name: "guest\(identifier)")
      for disk in ["xvde", "xvdf"] {
        try world.toolstack.attach(disk: disk, image: world.image("\(identifier)\(disk)"), to: identifier)
      }
      for disk in ["xvde", "xvdf"] {
        #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: identifier))
      }
      guests.append(
        (identifier, [try world.boot(domain, slot: 0, area: 1 << 20), try world.boot(domain, slot: 1, area: 4 << 20)]))
      #expect(domain.usage.ioreqServers == 1)
    }
    #expect(world.info("devices") == 4)
    #expect(world.info("ioreqServers") == 2)
    for (identifier, disks) in guests {
      for (index, disk) in disks.enumerated() {
        let bytes = block.map { $0 &+ UInt8(identifier) &+ UInt8(index) }
        #expect(try disk.write(bytes, sector: 0) == 0)
      }
    }
    for (identifier, disks) in guests {
      for (index, disk) in disks.enumerated() {
        let bytes = block.map { $0 &+ UInt8(identifier) &+ UInt8(index) }
        #expect(try disk.read(sector: 0, count: 4096).bytes == bytes)
      }
    }
    #expect(try world.toolstack.destroy(3, disks: ["xvde", "xvdf"]))
    #expect(try guests[1].1[1].flush() == 0)
    #expect(try world.toolstack.destroy(4, disks: ["xvde", "xvdf"]))
    #expect(eventually { world.info("guests") == 0 })
  }

  @Test func guestThatIsThereAlreadyIsAdopted() throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(9, name: "early")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 9)
    try world.start()
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 9))
    let guest = try world.boot(domain)
    #expect(try guest.write(block, sector: 0) == 0)
    // The daemon ends while the guest lives on, and starts again: the guest's driver is loaded anew.
    #expect(world.toolstack.wait(for: "4", of: "state", disk: "xvde", domain: 9))
    world.stop()
    #expect(eventually { domain.usage == .init() })
    #expect(world.toolstack.value("state", disk: "xvde", of: 9) == "4")
    try world.start()
    #expect(eventually { world.state("early", "xvde") == "ready" })
    let again = try world.boot(domain)
    #expect(try again.read(sector: 0, count: 4096).bytes == block)
    #expect(try world.toolstack.destroy(9, disks: ["xvde"]))
  }

  @Test func lowerDomainNumberThanAnEarlierGuestsIsServed() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    for identifier: DomainID in [32750, 1, 700, 2] {
      let domain = try world.domain(identifier, name: "guest")
      try world.toolstack.attach(disk: "xvde", image: world.image(), to: identifier)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: identifier))
      #expect(try world.boot(domain).write(block, sector: 0) == 0)
      #expect(try world.toolstack.destroy(identifier, disks: ["xvde"]))
    }
  }

  @Test func guestThatDiesWithoutItsToolstackLeavesNothing() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    #expect(try guest.write(block, sector: 0) == 0)
    try world.toolstack.crash(5)
    #expect(eventually { world.info("guests") == 0 })
    #expect(eventually { domain.usage == .init() })
  }

  @Test func entryThatIsRemovedWithoutCeremonyIsReleased() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    #expect(eventually { domain.usage == .init() && world.info("guests") == 0 })
    // And comes back.
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
  }

  @Test func oneDiskMayGoWhileTheOtherIsUsed() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    for disk in ["xvde", "xvdf"] { try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5) }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvdf", domain: 5))
    let guest = try world.boot(domain, slot: 1)
    try world.toolstack.set("state", "5", disk: "xvde", of: 5)
    #expect(world.toolstack.wait(for: "6", of: "state", disk: "xvde", domain: 5))
    #expect(try guest.write(block, sector: 0) == 0)
    #expect(domain.access(vcpu: 0, address: SlotTable.slot(0).base + 8, size: 4) == 0)
  }

  @Test func guestThatBreaksItsQueueHarmsNobodyElse() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "bad")
    for disk in ["xvde", "xvdf"] { try world.toolstack.attach(disk: disk, image: world.image(disk), to: 5) }
    let other = try world.domain(6, name: "good")
    try world.toolstack.attach(disk: "xvde", image: world.image("good"), to: 6)
    for (disk, identifier) in [("xvde", DomainID(5)), ("xvdf", 5), ("xvde", 6)] {
      #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: identifier))
    }
    let bad = try world.boot(domain, slot: 0)
    let sibling = try world.boot(domain, slot: 1, area: 4 << 20)
    let neighbour = try world.boot(other)
    bad.driver.jumpAvailable(to: 50000)
    bad.driver.notify()
    #expect(eventually { world.state("bad", "xvde") == "faulted" })
    #expect(world.device("bad", "xvde")["reason"]?.stringValue?.contains("50000 ahead") == true)
    #expect(bad.driver.status & 0x40 != 0)
    #expect(try sibling.write(block, sector: 0) == 0)
    #expect(try neighbour.write(block, sector: 0) == 0)
    bad.driver.reset()
    #expect(eventually { world.state("bad", "xvde") == "ready" })
    try bad.driver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
    #expect(try bad.write(block, sector: 0) == 0)
  }

  /// Reports of the driver's status are merged, so the newest may be known before an older fault is: it is that which counts.
  @Test func faultThatIsHeardOfAfterTheDriverBeganAnewIsHistory() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    try world.whileTheSupervisorWaits {
      let features: FeatureBits = [.indirectDescriptors, .eventIndex]
      // A report of the status is on its way from here on.
      try guest.driver.start(wanted: features, queueSize: 64)
      guest.driver.jumpAvailable(to: 50000)
      guest.driver.notify()
      #expect(eventually { guest.driver.status & 0x40 != 0 })
      try guest.driver.start(wanted: features, queueSize: 64)
      #expect(try guest.write(block, sector: 0) == 0)
    }
    #expect(eventually { world.reasons(.deviceFaulted).count == 1 })
    world.settle()
    #expect(world.state("web1", "xvde") == "connected")
  }

  /// A guest that resets its device without end fills neither the log nor the supervisor's mailbox.
  @Test func resetStormIsAnsweredAndNotLoggedWithoutEnd() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    for _ in 0..<300 {
      guest.driver.reset()
      try guest.driver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
    }
    #expect(try guest.write(block, sector: 0) == 0)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    world.settle()
    #expect(world.eventKinds.filter { $0 == .deviceReset || $0 == .deviceConnected }.count <= 20)
  }

  @Test func nothingOfFiftyGuestsIsLeft() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    for identifier: DomainID in 1...3 {
      // Warm-up: threads and descriptors that come with first use.
      _ = try world.domain(identifier, name: "warm")
      try world.toolstack.attach(disk: "xvde", image: world.image("\(identifier)"), to: identifier)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: identifier))
      #expect(try world.toolstack.destroy(identifier, disks: ["xvde"]))
    }
    var domains: [SimulatedDomain] = []
    for identifier: DomainID in 100..<150 {
      domains.append(try world.domain(identifier, name: "guest\(identifier)"))
      for disk in ["xvde", "xvdf"] {
        try world.toolstack.attach(disk: disk, image: world.image("\(identifier)\(disk)"), to: identifier)
      }
    }
    for identifier: DomainID in 100..<150 {
      for disk in ["xvde", "xvdf"] {
        #expect(world.toolstack.wait(for: "2", of: "state", disk: disk, domain: identifier, seconds: 60))
      }
    }
    #expect(world.info("ioreqServers") == 50)
    for identifier: DomainID in 100..<150 {
      #expect(try world.toolstack.destroy(identifier, disks: ["xvde", "xvdf"], seconds: 60))
    }
    #expect(eventually { world.info("guests") == 0 })
    for domain in domains { #expect(eventually { domain.usage == .init() }) }
  }
}
