import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// What a supervisor leaves, and what the next one makes of it.
@Suite struct SavedStateTests {
  private func world() throws -> (World, SimulatedDomain, StateFolder) {
    let world = try World()
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start { $0.stateFolder = folder }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    return (world, domain, folder)
  }

  private func block(_ byte: UInt8) -> [UInt8] { Array(repeating: byte, count: 4096) }

  @Test func guestGoesOnWithTheNextSupervisor() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    // Left behind: the server and its files; everything else is given back.
    #expect(domain.usage == SimulatedDomain.Usage(ioreqServers: 1))
    #expect(TemporaryFolder.names(folder.path).count == 2)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(world.eventKinds.contains(.deviceAdopted))
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { domain.usage == .init() })
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty })
  }

  /// What the driver read of its disk holds, also where the profile is another one by now.
  @Test func sizeOfBlocksStaysForADriverThatKnowsIt() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: #"{"version": 1, "disks": [{"guest": "*", "blockSize": 4096}]}"#) {
      $0.stateFolder = folder
    }
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    let guest = try world.boot(domain)
    #expect(guest.driver.registers.read(0x100 + 20) == 4096)
    world.stop()
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(guest.driver.registers.read(0x100 + 20) == 4096)
    #expect(try guest.write(block(1), sector: 8) == 0)
  }

  /// The earlier server cannot be mapped for a moment: it is not gone, vCPUs wait for it, and it is adopted with the next try.
  @Test(arguments: ["page", "range"]) func serverThatCannotBeAdoptedNowIsAdoptedLater(fails: String) throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    if fails == "page" {
      domain.pageFailures.store(1, ordering: .relaxed)
    } else {
      domain.rangeFailures.store(1, ordering: .relaxed)
    }
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.reasons(.guestFailed).contains { $0.contains("Cannot allocate memory") } })
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(domain.usage.ioreqServers == 1, "a second server would not answer who waits for the first")
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { domain.usage == .init() })
  }

  /// The daemon has no descriptor left for a moment: the guest is not taken for one without a server.
  @Test(arguments: [1, 2, 5]) func guestThatCannotBeReachedAtTheStartIsAdoptedLater(times: Int) throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    domain.openFailures.store(times, ordering: .relaxed)
    try world.start {
      $0.stateFolder = folder
      $0.xenstoreCheckMilliseconds = 20
    }
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(domain.usage.ioreqServers == 1)
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  /// Whoever could not adopt it leaves it to the next daemon: vCPUs may wait in it.
  @Test func serverThatCouldNotBeAdoptedIsLeftToTheNextDaemon() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    domain.pageFailures.store(.max, ordering: .relaxed)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "failed" })
    world.stop()
    #expect(domain.usage.ioreqServers == 1)
    domain.pageFailures.store(0, ordering: .relaxed)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  /// It cannot be adopted to the end: the guest's accesses must not wait for it for ever.
  @Test func serverThatCannotBeAdoptedIsGivenBackWithItsGuest() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    _ = try world.boot(domain)
    world.stop()
    domain.pageFailures.store(.max, ordering: .relaxed)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "failed" })
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    #expect(eventually { domain.usage == .init() })
  }

  /// Somebody has destroyed it: a new one serves the guest as well.
  @Test func serverThatIsGoneIsMadeAgain() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    let number = world.call("guest.list").arrayValue?.first?["ioreqServer"]?["id"]?.integerValue
    world.stop()
    try world.hypervisor.open(5).destroyIOReqServer(UInt16(try #require(number)))
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(domain.usage.ioreqServers == 1 && !world.eventKinds.contains(.guestFailed))
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  @Test func stateOfAnUnknownVersionMakesTheGuestResetItsDevice() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    let name = try #require(TemporaryFolder.names(folder.path).first { $0.hasSuffix(".device") })
    let descriptor = open(folder.path + "/" + name, O_WRONLY | O_CLOEXEC)
    var version: UInt32 = 99
    #expect(pwrite(descriptor, &version, 4, 8) == 4)
    close(descriptor)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "faulted" })
    #expect(
      world.device("web1", "xvde")["reason"]?.stringValue?.contains("version 99, and this vxd knows version 1") == true)
    #expect(guest.driver.status & 0x40 != 0)
    #expect(guest.driver.acknowledgeInterrupt() & 2 != 0)
    let again = try world.boot(domain)
    #expect(try again.read(sector: 0, count: 4096).bytes == block(1))
    #expect(eventually { world.state("web1", "xvde") == "connected" })
  }

  @Test(arguments: [0, 5, 100, 5000]) func cutStateIsRefusedAndTheDeviceServedAnew(length: Int) throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    _ = try world.boot(domain)
    world.stop()
    let name = try #require(TemporaryFolder.names(folder.path).first { $0.hasSuffix(".device") })
    #expect(truncate(folder.path + "/" + name, off_t(length)) == 0)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "xvde") == "faulted" })
    let again = try world.boot(domain)
    #expect(try again.write(block(1), sector: 0) == 0)
  }

  @Test func stateOfAnotherGuestWithTheSameNumberIsNotUsed() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    _ = try world.boot(domain)
    world.stop()
    // The guest ends while no vxd is there, and another one gets its number.
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    try world.toolstack.crash(5)
    let other = try SimulatedDomain(identifier: 5, memoryBytes: 16 << 20)
    try world.toolstack.create(other, name: "other", uuid: "11111111-0000-4000-8000-000000000005")
    try world.toolstack.attach(disk: "xvde", image: world.image("other.img"), to: 5)
    try world.start { $0.stateFolder = folder }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(other)
    #expect(try guest.write(block(2), sector: 0) == 0)
    #expect(eventually { world.state("other", "xvde") == "connected" })
    world.settle()
    #expect(!world.eventKinds.contains(.deviceAdopted))
  }

  /// The guest was restarted while no vxd was there: it has its UUID still, and its number again, and the rings of its earlier life are anything by
  /// now.
  @Test func stateOfAnEarlierLifeOfTheGuestIsNotUsed() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    world.stop()
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    try world.toolstack.crash(5)
    let again = try SimulatedDomain(identifier: 5, memoryBytes: 16 << 20)
    try world.toolstack.create(again, name: "web1")
    // What was memory of a ring is memory of a program, whose words look like requests.
    let place = again.memory.pointer(1 << 20)
    place.initializeMemory(as: UInt8.self, repeating: 1, count: 1 << 20)
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start { $0.stateFolder = folder }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    // A program that another test starts may hold the image's lock for a moment, and the start is tried again.
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    world.settle()
    #expect(!world.eventKinds.contains(.deviceAdopted))
    let words = UnsafeRawBufferPointer(start: place, count: 1 << 20)
    #expect(words.allSatisfy { $0 == 1 }, "memory of the guest's was written to")
    #expect(try world.boot(again).read(sector: 0, count: 4096).bytes == block(1))
  }

  @Test func whatNoEntrySpeaksOfIsEnded() throws {
    let (world, domain, folder) = try world()
    defer { world.end() }
    _ = try world.boot(domain)
    world.stop()
    try world.toolstack.removeEntry(disk: "xvde", of: 5)
    try world.start { $0.stateFolder = folder }
    #expect(eventually { domain.usage == .init() })
    #expect(eventually { TemporaryFolder.names(folder.path).isEmpty })
  }

  @Test func deviceWhoseStateCannotBeKeptIsServedAllTheSame() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    try world.start { $0.stateFolder = folder }
    #expect(rmdir(folder.path) == 0)
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    #expect(try guest.write(block(1), sector: 0) == 0)
    #expect(eventually { world.state("web1", "xvde") == "connected" })
    #expect(world.call("device.restart", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(1))
  }

  @Test func attachedSpareIsThereAgain() throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    let profiles = #"{"version": 1, "guests": [{"spareDisks": 1}]}"#
    try world.start(profiles: profiles) { $0.stateFolder = folder }
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    #expect(eventually { world.state("web1", "spare0") == "ready" })
    let guest = try world.boot(domain, slot: 7)
    let image = world.image("added.img", bytes: 2 << 20)
    #expect(world.call("device.attach", ["guest": "web1", "image": .string(image)])["accepted"] == true)
    #expect(eventually { guest.driver.registers.read(0x100, width: 8) == 4096 })
    #expect(try guest.write(block(7), sector: 0) == 0)
    world.stop()
    try world.start { $0.stateFolder = folder }
    #expect(eventually { world.state("web1", "spare0") == "connected" })
    #expect(guest.driver.registers.read(0x100, width: 8) == 4096)
    #expect(try guest.read(sector: 0, count: 4096).bytes == block(7))
  }
}
