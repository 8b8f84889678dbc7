import ControlAPI
import Devices
import Lifecycle
import SimulatedXen
import TestSupport
import Testing

@testable import Supervisor

/// Limits hold for the guest's requests, by whatever way they were said, and requests that wait go as soon as a limit is lifted.
@Suite struct LimitsTests {
  /// How a limit of 512 bytes a second came to be: the second of two writes of 64 KiB waits for two minutes.
  enum Way: String, CaseIterable, Sendable {
    case device, guest, daemon, reload, reloadOfTheGuest, reloadOfTheDaemon, firstStart, adoption
  }

  private static let slow: JSONValue = ["writeBytes": 512]
  private static let none: JSONValue = ["writeBytes": 0]
  private static func profiles(of way: Way) -> String {
    switch way {
    case .reload, .firstStart, .adoption: #"{"version": 1, "disks": [{"limits": {"writeBytes": 512}}]}"#
    case .reloadOfTheGuest: #"{"version": 1, "guests": [{"guest": "web1", "limits": {"writeBytes": 512}}]}"#
    case .reloadOfTheDaemon: #"{"version": 1, "daemon": {"limits": {"writeBytes": 512}}}"#
    case .device, .guest, .daemon: #"{"version": 1}"#
    }
  }

  private let device: JSONValue = ["guest": "web1", "device": "xvde"]

  private func set(_ limits: JSONValue, _ way: Way, _ world: World, _ actions: SupervisorControl.Actions) throws {
    switch way {
    case .device, .firstStart, .adoption:
      let answer = world.call("device.limit", ["guest": "web1", "device": "xvde", "limits": limits])
      #expect(answer["accepted"] == true, "\(answer)")
    case .guest: #expect(world.call("guest.limit", ["guest": "web1", "limits": limits])["accepted"] == true)
    case .daemon: #expect(world.call("daemon.limit", ["limits": limits])["accepted"] == true)
    case .reload, .reloadOfTheGuest, .reloadOfTheDaemon:
      let text = limits == Self.slow ? Self.profiles(of: way) : #"{"version": 1}"#
      actions.use(try Profiles(try JSONText.parse(Array(text.utf8))))
    }
  }

  @Test(arguments: Way.allCases) func requestsWaitForALimitUntilItIsLifted(way: Way) throws {
    let world = try World()
    defer { world.end() }
    let folder = try StateFolder(path: world.folder.path + "/state")
    let actions = SupervisorControl.Actions()
    let isFromTheStart = way == .firstStart || way == .adoption
    let profiles = isFromTheStart ? Self.profiles(of: way) : #"{"version": 1}"#
    try world.start(profiles: profiles, actions: actions) { $0.stateFolder = folder }
    let domain = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    if way == .adoption {
      world.stop()
      try world.start(profiles: profiles, actions: actions) { $0.stateFolder = folder }
      #expect(eventually { world.state("web1", "xvde") == "connected" })
    }
    if !isFromTheStart {
      try set(Self.slow, way, world, actions)
      world.settle()
    }
    let data = guest.dataAddress
    for index in 0..<2 {
      let header = data + (1 << 20) + UInt64(index) * 64
      guest.putHeader(at: header, type: 1, sector: 0)
      let chain: [SimulatedDriver.Buffer] = [
        .init(header, 16, writable: false), .init(data, 65536, writable: false), .init(header + 16, 1, writable: true),
      ]
      #expect(guest.driver.add(chain) != nil)
    }
    guest.driver.notify(queue: 0)
    // The first pays for itself afterwards.
    _ = try guest.waitForUsed()
    #expect(eventually { world.call("device.get", device)["counters"]?["throttled"]?.integerValue ?? 0 > 0 })
    #expect(guest.driver.takeUsed(queue: 0) == nil)
    let limits = world.call("guest.list").arrayValue?.first?["limits"]
    #expect(
      (limits?["writeBytes"] == 512) == (way == .guest || way == .reloadOfTheGuest), "\(String(describing: limits))")
    #expect(
      world.reasons(.deviceLimited).count == (way == .device || way == .reload ? 1 : 0),
      "\(world.reasons(.deviceLimited))")
    try set(Self.none, way, world, actions)
    _ = try guest.waitForUsed()
  }

  /// One that is refused its place by the bus, and starts when there is one.
  @Test func limitsOfADeviceThatWasRefusedItsPlaceHold() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      slots: 1,
      profiles:
        #"{"version": 1, "guests": [{"guest": "web1", "spareDisks": 1}], "disks": [{"device": "spare0", "limits": {"writeBytes": 512}, "restart": "never"}]}"#
    )
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(eventually { ["ready", "failed"].contains(world.state("web1", "xvde")) })
    #expect(eventually { world.state("web1", "spare0") == "failed" || world.state("web1", "xvde") == "failed" })
    let refused = world.device("web1", "spare0")
    #expect(refused["limits"]?["writeBytes"] == 512 && refused["restartPolicy"] == "never", "\(refused)")
  }

  /// Two clients change different limits of a device before the supervisor looks: neither undoes the other's.
  @Test func changesOfSeveralClientsAddUp() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(eventually { world.state("web1", "xvde") == "ready" })
    world.whileTheSupervisorWaits {
      for limits in [["readOps": 5], ["writeOps": 7]] as [JSONValue] {
        _ = world.call("device.limit", ["guest": "web1", "device": "xvde", "limits": limits])
        _ = world.call("guest.limit", ["guest": "web1", "limits": limits])
        _ = world.call("daemon.limit", ["limits": limits])
      }
    }
    world.settle()
    for limits in [
      world.device("web1", "xvde")["limits"], world.call("guest.list").arrayValue?.first?["limits"],
      world.call("system.info")["limits"],
    ] { #expect(limits?["readOps"] == 5 && limits?["writeOps"] == 7, "\(String(describing: limits))") }
  }
}
