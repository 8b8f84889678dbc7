import EventLoop
import Glibc
import Lifecycle
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@testable import Supervisor

/// Devices whose place QEMU has too, at moments at which they are not simply there.
extension PCIScanTests {
  private static let spare = PCIAddress(device: 18)

  /// What an earlier daemon left, without a supervisor: the guest's buses as a daemon restores them.
  private func restored(_ world: World) throws -> (GuestBuses, StateFolder, DeviceKey) {
    let folder = try StateFolder(path: world.folder.path + "/state")
    let saved = try #require(folder.guest(5))
    var settings = SupervisorSettings()
    settings.stateFolder = folder
    let host = BusHost(
      hypervisor: world.hypervisor, settings: settings, grantBudget: GrantBudget(limit: 16), report: { _ in })
    var facts = GuestFacts(domain: 5, isDriverDomain: false, type: "hvm", transport: .pci)
    facts.started = saved.started
    let buses = try GuestBuses(facts, host)
    #expect(try buses.restore(folder, uuid: saved.uuid).isEmpty)
    let key = try #require(buses.unclaimed.first { $0.bus.place(of: $0.key) == .pci(device: 5) }?.key)
    return (buses, folder, key)
  }

  private func whatQEMUHas(_ buses: GuestBuses) -> [Displacement] { buses.learn([Self.disputed]) }

  /// The earlier daemon's server is adopted only after QEMU has answered: the claim of the refused function goes all the same.
  @Test func claimIsGivenBackWhenTheServerIsAdoptedLater() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    world.stop()
    #expect(domain.claimedFunctions == [Self.disputed, Self.ours])
    let (buses, _, key) = try restored(world)
    let disputed = whatQEMUHas(buses)
    #expect(disputed.map(\.key) == [key] && disputed.allSatisfy(\.isPresent))
    let done = Latch()
    let (made, server) = (buses.made, try #require(buses.server))
    let jobs = made.map { $0.remove(key) }
    buses.thread.run { here in
      #expect(made.flatMap { $0.answerScan(without: disputed, here) }.map(\.key) == [key])
      for job in jobs { job(here) }
      #expect(server.start(uuid: nil, here) == .serverStarted)
      done.open()
    }
    done.wait()
    #expect(domain.claimedFunctions == [Self.ours])
    buses.thread.run { here in server.close(here) }
    buses.thread.stopAndJoin()
  }

  /// It was restored and taken out before its entry was read: it begins as a new device, whose driver need not reset it.
  @Test func restoredDeviceThatMadeWayBeginsAnew() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    world.stop()
    let (buses, folder, key) = try restored(world)
    let disputed = whatQEMUHas(buses)
    let done = Latch()
    let (made, server) = (buses.made, try #require(buses.server))
    let jobs = made.map { $0.remove(key) }
    buses.thread.run { here in
      #expect(server.start(uuid: nil, here) == .serverStarted)
      _ = made.map { $0.answerScan(without: disputed, here) }
      for job in jobs { job(here) }
      done.open()
    }
    done.wait()
    #expect(domain.claimedFunctions == [Self.ours])
    let bus = try #require(made.first)
    let (earlier, state) = buses.earlier(key, on: bus, ["state": "4"], frontend: nil)
    #expect(earlier == .nothing && state == nil)
    #expect(!folder.contents.devices.contains(key))
    buses.thread.run { here in server.close(here) }
    buses.thread.stopAndJoin()
  }

  /// QEMU's answer comes while the image is being opened: the device never gets into the place.
  @Test func deviceThatIsBeingOpenedNeverGetsThere() throws {
    let world = try World()
    defer { world.end() }
    let (opens, goesOn) = (Latch(), Latch())
    let folder = world.folder.path
    try world.start(profiles: Self.profile) {
      $0.qemuFolder = folder
      $0.xenstoreCheckMilliseconds = 600_000
      $0.decorate = { engine, _ in
        opens.open()
        goesOn.wait()
        return engine
      }
    }
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvdf", image: world.image("xvdf"), to: 5)
    opens.wait()
    world.withSupervisor { supervisor in
      guard let guest = supervisor.table.guests[5] else { return }
      for device in guest.buses.learn([PCIScanTests.disputed]) {
        #expect(!device.isPresent)
        supervisor.displace(device)
      }
    }
    #expect(world.state("web1", "xvdf") == "failed")
    goesOn.open()
    world.settle()
    #expect(domain.claimedFunctions.isEmpty && world.state("web1", "xvdf") == "failed")
    #expect(domain.functionClaims == 0)
  }

  /// The device has another place by the time that its displacement from the first one arrives.
  @Test func displacementIsOfAPlace() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    world.withSupervisor { supervisor in
      let key = supervisor.table.guests[5]?.devices.keys.first { $0.device == 51_792 /* xvdf */ }
      guard let key else {
        Issue.record("no device")
        return
      }
      supervisor.displace(Displacement(key: key, place: Self.spare, reason: "QEMU's", isPresent: true))
    }
    world.settle()
    #expect(world.state("web1", "xvdf") == "ready")
    #expect(domain.claimedFunctions == [Self.disputed, Self.ours])
  }

  /// A device with a slot of its own in which QEMU had something: what QEMU does not repeat does not refuse it for ever.
  @Test(arguments: [true, false]) func oldKnowledgeEndsWithAQEMUThatDoesNotAnswer(isThere: Bool) throws {
    let world = try World()
    defer { world.end() }
    let path = world.folder.path + "/qmp-libxenstat-5"
    let domain = try start(world, tick: 20)
    let first = try monitor(world, slot: 5)
    #expect(identity(domain, Self.disputed) == 0xffff_ffff)
    #expect(eventually { world.state("web1", "xvdf") == "failed" })
    first.end()
    unlink(path)
    let hung = isThere ? try monitor(world, slot: nil) : nil
    _ = world.call("device.restart", ["guest": "web1", "device": "xvdf"])
    hung?.isAsked.wait()
    #expect(
      eventually {
        _ = world.call("device.restart", ["guest": "web1", "device": "xvdf"])
        return world.state("web1", "xvdf") == "ready"
      })
    #expect(domain.claimedFunctions == [Self.disputed, Self.ours])
    unlink(path)
    hung?.end()
  }

  /// A place may be in two files when a daemon dies: of a device that was just taken away, and of one that got its place.
  @Test func ofTwoFilesOfAPlaceTheOneInUseHolds() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    let folder = try StateFolder(path: world.folder.path + "/state")
    let keys = [51_792, 51_808].map { DeviceKey(kind: .disk, domain: 5, device: $0) }
    let (used, other) = (folder.devicePath(keys[0]), folder.devicePath(keys[1]))
    // As it was before a driver came.
    #expect(try ChildProcess.run("/bin/cp", [used, used + ".unused"]).status == 0)
    try drive(domain, Self.disputed, disk: "xvdf", world)
    world.stop()
    rename(used + ".unused", other)
    let (buses, _, key) = try restored(world)
    #expect(key.device == 51_792)
    #expect(buses.unclaimed.filter { $0.bus.place(of: $0.key) == .pci(device: 5) }.count == 1)
    #expect(access(other, F_OK) != 0 && access(used, F_OK) == 0)
    buses.thread.stopAndJoin()
  }

  /// A device without a backend is restarted before the guest's thread has taken it out of QEMU's place.
  @Test func deviceGetsAnotherPlaceBeforeItHasLeftTheFirst() throws {
    let world = try World()
    defer { world.end() }
    let domain = try start(world)
    _ = world.call("device.pause", ["guest": "web1", "device": "xvde"])
    #expect(eventually { world.state("web1", "xvde") == "paused" })
    world.settle()
    let goesOn = Latch()
    world.withSupervisor { supervisor in
      guard let guest = supervisor.table.guests[5] else { return }
      guest.buses.thread.run { _ in goesOn.wait() }
      for device in guest.buses.learn([PCIScanTests.ours]) {
        #expect(device.isPresent)
        supervisor.displace(device)
      }
    }
    #expect(world.state("web1", "xvde") == "failed")
    _ = world.call("device.restart", ["guest": "web1", "device": "xvde"])
    #expect(eventually { world.state("web1", "xvde") == "restarting" })
    goesOn.open()
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    #expect(domain.claimedFunctions == [Self.disputed, PCIAddress(device: 17)])
    // The next daemon puts it where it is.
    world.stop()
    try start(world, by: Self.profile)
    #expect(eventually { world.state("web1", "xvde") == "ready" && world.state("web1", "xvdf") == "ready" })
    #expect(domain.claimedFunctions == [Self.disputed, PCIAddress(device: 17)])
  }
}
