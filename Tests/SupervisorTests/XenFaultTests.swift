import EventLoop
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// What guest and operator see when Xen's own services fail.
@Suite struct XenFaultTests {
  private func world(_ disks: [String] = ["xvde"], vcpus: Int = 1) throws -> (World, SimulatedDomain) {
    let world = try World()
    let domain = try world.domain(5, name: "web1", vcpus: vcpus)
    for disk in disks { try world.toolstack.attach(disk: disk, image: world.image("\(disk).img"), to: 5) }
    try world.start()
    for disk in disks { #expect(eventually { world.state("web1", disk) == "ready" }) }
    return (world, domain)
  }

  private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

  /// ENOMEM on a mapping: the request of that buffer fails, the ring goes on, the next request is served.
  @Test func failedMappingFailsOneRequestAndNoMore() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    // A bucket that nothing has touched yet, so that its mapping fails.
    let far: UInt64 = 12 << 20
    domain.mapFailures.store(2, ordering: .relaxed)
    let failed = try guest.request(type: 1, sector: 0, data: [.init(far, 4096, writable: false)])
    #expect(failed.status == 1)
    domain.mapFailures.store(0, ordering: .relaxed)
    let served = try guest.request(type: 1, sector: 0, data: [.init(far, 4096, writable: false)])
    #expect(served.status == 0)
    #expect(eventually { world.device("web1", "xvde")["counters"]?["failed"] == 1 })
    #expect(eventually { world.state("web1", "xvde") == "connected" })
  }

  /// Without memory for its rings the device asks for a reset, and works after it.
  @Test func ringsThatCannotBeMappedNeedAReset() throws {
    let (world, domain) = try world()
    defer { world.end() }
    domain.mapFailures.store(3, ordering: .relaxed)
    let guest = try world.boot(domain)
    guest.driver.notify()
    #expect(eventually { world.state("web1", "xvde") == "faulted" })
    #expect(world.device("web1", "xvde")["reason"]?.stringValue?.contains("not mapped") == true)
    domain.mapFailures.store(0, ordering: .relaxed)
    let again = try world.boot(domain)
    #expect(try again.write(block(2), sector: 0) == 0)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
  }

  /// An event channel's event that gets lost: the vCPU goes on with the next event of any vCPU.
  @Test func lostEventIsMadeGoodByTheNext() throws {
    let (world, domain) = try world(vcpus: 2)
    defer { world.end() }
    let base = SlotTable.slot(0).base
    let waiting = try LoopThread(name: "vcpu0")
    defer { waiting.stopAndJoin() }
    let done = Latch()
    domain.lostEvents.store(1, ordering: .relaxed)
    waiting.loop.enqueue {
      _ = domain.access(vcpu: 0, address: base, size: 4)
      done.open()
    }
    #expect(eventually { domain.lostEvents.load(ordering: .relaxed) == 0 })
    #expect(domain.access(vcpu: 1, address: base, size: 4) & 0xffff_ffff == 0x7472_6976)
    #expect(done.wait(seconds: 30))
  }

  @Test func guestsGoOnWithoutXenstoredAndNewOnesComeWhenItIsBack() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    let watches = world.info("xenstoreWatches")
    world.server.setDown(true)
    #expect(eventually { world.call("system.info")["xenstoreConnected"] == false })
    #expect(try guest.write(block(2), sector: 8) == 0)
    #expect(try guest.read(sector: 8, count: 4096).bytes == block(2))
    world.server.setDown(false)
    #expect(eventually { world.call("system.info")["xenstoreConnected"] == true })
    #expect(world.info("xenstoreWatches") == watches)
    let toolstack = try SimulatedToolstack(server: world.server, hypervisor: world.hypervisor)
    let second = try SimulatedDomain(identifier: 6, memoryBytes: 16 << 20)
    try toolstack.create(second, name: "web2")
    try toolstack.attach(disk: "xvde", image: world.image("second.img"), to: 6)
    #expect(eventually { world.state("web2", "xvde") == "ready" })
    #expect(world.state("web1", "xvde") == "connected")
    #expect(try toolstack.destroy(6, disks: ["xvde"]))
  }

  /// As xenstored's: what others do elsewhere in the tree disturbs no transaction.
  @Test func transactionsOfTheSimulatedXenstoreConflictWhereTheyMeet() throws {
    let world = try World()
    defer { world.end() }
    let (first, second) = (try XenStore(socketPath: world.server.path), try XenStore(socketPath: world.server.path))
    try first.transaction { transaction throws(XenError) in
      try first.write("/a/x", "1", in: transaction)
      try second.write("/b/y", "1")
    }
    #expect(first.read("/a/x") == "1" && first.read("/b/y") == "1")
    for path in ["/b/y", "/b", "/b/y/z"] {
      var tries = 0
      try first.transaction { transaction throws(XenError) in
        tries += 1
        _ = first.read("/b/y", in: transaction)
        _ = first.list("/b", in: transaction)
        _ = first.read("/b/y/z", in: transaction)
        if tries == 1 { try second.write(path, "2") }
        try first.write("/a/x", "2", in: transaction)
      }
      #expect(tries == 2, "\(path)")
    }
  }

  @Test func conflictsOfTransactionsAreTriedAgain() throws {
    let (world, domain) = try world()
    defer { world.end() }
    _ = domain
    let second = try world.domain(6, name: "web2")
    _ = second
    // Attached first, so that the conflicts hit vxd's transactions and not the toolstack's.
    try world.whileTheSupervisorWaits {
      try world.toolstack.attach(disk: "xvde", image: world.image("second.img"), to: 6)
      world.server.failTransactions(5)
    }
    #expect(eventually { world.state("web2", "xvde") == "ready" })
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 6))
    #expect(world.server.conflictsLeft == 0)
  }

  /// A store that does not answer, as the watchdog tells it: device, queue, age, layer.
  @Test(.enabled(if: StorageDaemon.isInstalled, "qemu-storage-daemon is not installed"))
  func frozenStoreIsReportedAndTheGuestGoesOnWhenItThaws() throws {
    let world = try World()
    defer { world.end() }
    let domain = try world.domain(5, name: "web1")
    let daemon = try StorageDaemon(folder: world.folder, image: world.image("nbd.img"))
    defer { daemon.stop() }
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: #"{"version": 1, "disks": [{"stuckSeconds": 1, "nbd": "\#(daemon.address)"}]}"#)
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    daemon.pause()
    guest.putHeader(at: 8 << 20, type: 4, sector: 0)
    #expect(guest.driver.add([.init(8 << 20, 16, writable: false), .init(9 << 20, 1, writable: true)]) != nil)
    guest.driver.notify()
    #expect(eventually { world.eventKinds.contains(.deviceStuck) })
    let stuck = world.device("web1", "xvde")["stuck"]
    #expect(stuck?["queue"] == 0)
    #expect(stuck?["layer"] == "engine")
    #expect(stuck?["milliseconds"]?.integerValue ?? 0 >= 1000)
    daemon.resume()
    _ = try guest.waitForUsed()
    #expect(eventually { world.eventKinds.contains(.deviceUnstuck) })
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  /// A hold and its end, as an operator sees and does them.
  @Test func resumeOfADeviceThatIsNotHeldSaysSo() throws {
    let (world, domain) = try world()
    defer { world.end() }
    _ = domain
    let answer = world.call("device.resume", ["guest": "web1", "device": "xvde"])
    #expect(answer["message"]?.stringValue == "'web1/xvde' is ready")
  }

  @Test func resizeByTheControlSocketReachesTheGuest() throws {
    let (world, domain) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(world.call("device.resize", ["guest": "web1", "device": "xvde", "bytes": 8_388_608])["accepted"] == true)
    #expect(eventually { guest.driver.registers.read(0x100, width: 8) == 16384 })
    #expect(eventually { world.eventKinds.contains(.deviceResized) })
    #expect(eventually { world.device("web1", "xvde")["bytes"] == 8_388_608 })
    #expect(world.call("device.resize", ["guest": "web1", "device": "xvde", "bytes": 512])["accepted"] == true)
    #expect(eventually { world.eventKinds.contains(.deviceNotResized) })
    let refused = world.call("device.resize", ["guest": "web1", "device": "xvde", "bytes": 1000])
    #expect(refused["message"]?.stringValue == "'bytes' must be a positive multiple of 512, not 1000")
  }
}
