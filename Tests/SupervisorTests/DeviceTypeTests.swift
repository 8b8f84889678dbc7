import ControlAPI
import Devices
import EventLoop
import JSON
import Lifecycle
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@testable import DeviceHost
@testable import Supervisor

/// Another type of device, which only these tests know: its own files, and one line in a list.
@Suite struct DeviceTypeTests {
  struct BeaconSettings: DeviceSettings {
    static let type = VirtioType(name: "beacon", prefix: "beacon", number: 63)
    static let options = OptionTable<BeaconSettings>(
      [.number("brightness", 1...9, \.brightness, "how bright it is")] + commonRows)

    var restart = RestartPolicy()
    var slot: UInt8?
    var limits = RateLimits()
    var offered: FeatureBits?
    var transport: RegisterTransport?
    var brightness = 3

    init() {}

    init(options members: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault) {
      try Self.options.apply(members, to: &self, field)
    }

    var optionTexts: [(name: String, value: String)] { Self.options.texts(self) }

    func start(
      _ context: DeviceBackend.Context,
      completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
    ) -> [LoopThread] {
      DeviceBackend.start(
        name: context.name, label: context.label, threads: 1,
        make: { threads throws(StartFault) in try BeaconBackend(self, context, threads[0]) },
        completion: { (result: Result<BeaconBackend, StartFault>) in completion(result.map { $0 }) })
    }
  }

  /// Shines as entropy devices do.
  final class BeaconBackend: DeviceBackend, @unchecked Sendable {
    // Invariant behind @unchecked Sendable: immutable; see the superclass.
    private let settings: BeaconSettings

    init(_ settings: BeaconSettings, _ context: Context, _ thread: LoopThread) throws(StartFault) {
      let identity = DeviceIdentity(
        deviceID: BeaconSettings.type.number, offeredFeatures: EntropyPump.features, queueSizes: [64])
      let state = try context.makeState?(DeviceState.Layout(unjournaled: identity))
      let counters = context.account.queue(0).counters
      let worker = try Self.make { () throws in
        try DeviceWorker(
          EntropyPump(source: context.source, counters: counters, rate: context.rate), index: 0,
          queues: [.init(maximumSize: 64, counters: counters)], thread: thread, source: context.source,
          report: context.report)
      }
      self.settings = settings
      try super.init(
        Components(
          identity: identity, configuration: ConfigurationSpace([]), mode: "a beacon", threads: [thread],
          workers: [worker], routes: [Route(worker: 0, queue: 0)], rate: context.rate, state: state,
          counters: [counters]))
    }

    override var facts: [Reading.Member] { [.init("brightness", .value(.count(settings.brightness)))] }
  }

  private static let types = DeviceTypes.all + [BeaconSettings.self]

  private func profiles(_ text: String) throws -> Profiles {
    try Profiles(JSONText.parse(Array(text.utf8)), types: Self.types)
  }

  @Test func newTypeIsDeclaredServedAndReportedLikeTheOthers() throws {
    let world = try World()
    defer { world.end() }
    let declared = try profiles(
      #"""
      {"version": 1, "guests": [{"devices": [{"type": "beacon", "brightness": 7, "limits": {"readOps": 9}}, {"type": "entropy"}]}]}
      """#)
    try world.start {
      $0.types = Self.types
      $0.profiles = declared
    }
    let domain = try world.domain(5, name: "web1")
    #expect(eventually { world.state("web1", "rng0") == "ready" && world.state("web1", "beacon0") == "ready" })
    let device = world.device("web1", "beacon0")
    #expect(device["type"] == "beacon" && device["kind"] == "beacon" && device["brightness"] == 7)
    #expect(device["mode"] == "a beacon" && device["store"] == device["mode"])
    #expect(device["limits"]?["readOps"] == 9)
    // What comes from the toolstack is known by virtio's number.
    try world.toolstack.attachGeneric(type: "virtio,device3f", device: 1, to: 5, options: #"{"brightness": 2}"#)
    #expect(eventually { world.state("web1", "beacon1") == "ready" })
    #expect(world.device("web1", "beacon1")["brightness"] == 2)
    // A driver works, and operators see to it as to any other.
    let registers = TrappedRegisters(domain: domain, base: SlotTable.slot(7).base, vcpu: 0)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
    try driver.start(deviceID: 63, wanted: [.eventIndex], queueSize: 16)
    #expect(eventually { world.state("web1", "beacon0") == "connected" })
    #expect(world.call("device.link", ["guest": "web1", "device": "beacon0", "up": false])["code"] == -32006)
    #expect(world.call("device.resize", ["guest": "web1", "device": "beacon0"])["code"] != nil)
    #expect(world.call("device.pause", ["guest": "web1", "device": "beacon0"])["accepted"] == true)
    #expect(eventually { world.state("web1", "beacon0") == "paused" })
    #expect(world.call("device.resume", ["guest": "web1", "device": "beacon0"])["accepted"] == true)
    #expect(eventually { world.state("web1", "beacon0") == "connected" })
  }

  @Test func mistakesInItsOptionsAreNamedLikeTheOthers() {
    func message(_ device: String) -> String? {
      do throws(SettingFault) {
        _ = try Profiles(
          (try? JSONText.parse(Array(#"{"version": 1, "guests": [{"devices": [\#(device)]}]}"#.utf8))) ?? .null,
          types: Self.types)
        return nil
      } catch {
        return error.message
      }
    }
    #expect(message(#"{"type": "beacon", "brightness": 1}"#) == nil)
    #expect(
      message(#"{"type": "beacon", "brightness": 10}"#)
        == "guests[0].devices[0].brightness: expected a whole number from 1 to 9, not 10")
    #expect(
      message(#"{"type": "beacon", "brightnes": 1}"#)?.hasPrefix(
        #"guests[0].devices[0].brightnes: unknown option; did you mean "brightness"?"#) == true)
    #expect(
      message(#"{"type": "lamp"}"#)
        == #"guests[0].devices[0].type: expected one of network, console, entropy, beacon, not "lamp""#)
  }

  /// Stands for a device whose start and end wait for another program: entropy devices, and a gate at which everything waits that such
  /// a program would hold up.
  struct SlowSettings: DeviceSettings {
    static let type = VirtioType(name: "slow", prefix: "slow", number: 62)
    /// Closed where a latch stands in it. One test uses it.
    static let gate = Mutex<Latch?>(nil)
    /// What has been held up so far.
    static let held = Mutex<[String]>([])

    static func pass(_ what: String) {
      held.withLock { $0.append(what) }
      gate.withLock { $0 }?.wait()
    }

    var restart = RestartPolicy()
    var slot: UInt8?
    var limits = RateLimits()
    var offered: FeatureBits?
    var transport: RegisterTransport?

    init(options members: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault) {}
    var optionTexts: [(name: String, value: String)] { [] }

    func start(
      _ context: DeviceBackend.Context,
      completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
    ) -> [LoopThread] {
      DeviceBackend.start(
        name: context.name, label: context.label, threads: 1,
        make: { threads throws(StartFault) in
          Self.pass("start")
          return try BeaconBackend(BeaconSettings(), context, threads[0])
        }, completion: { (result: Result<BeaconBackend, StartFault>) in completion(result.map { $0 }) })
    }

    func removeTraces(_ device: DeviceTraces) { Self.pass("removeTraces") }
    static func removeOrphans(where isOrphan: (DomainID) -> Bool) { pass("removeOrphans") }
  }

  /// Other programs (Open vSwitch's) are waited for as a device is opened, as what it leaves is removed, and as what an earlier daemon left is:
  /// never by the supervisor's thread, which serves everybody.
  @Test func supervisorWaitsForNoOtherProgram() throws {
    let world = try World()
    defer { world.end() }
    let types = DeviceTypes.all + [SlowSettings.self]
    let text = #"{"version": 1, "guests": [{"guest": "slow", "devices": [{"type": "slow"}]}]}"#
    let declared = try Profiles(JSONText.parse(Array(text.utf8)), types: types)
    /// While something waits at the gate, another guest comes and is served.
    func whileHeldUp(_ what: String, _ disk: DomainID, _ cause: () throws -> Void) throws {
      let gate = Latch()
      SlowSettings.gate.withLock { $0 = gate }
      defer {
        SlowSettings.gate.withLock { $0 = nil }
        gate.open()
      }
      try cause()
      try #require(eventually { SlowSettings.held.withLock { $0.contains(what) } }, "\(what) does not happen")
      _ = try world.domain(disk, name: "quick\(disk)")
      try world.toolstack.attach(disk: "xvde", image: world.image("\(disk)"), to: disk)
      #expect(
        world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: disk), "\(what) holds the supervisor up")
      #expect(eventually { world.state("quick\(disk)", "xvde") == "ready" })
    }
    try whileHeldUp("removeOrphans", 10) {
      try world.start {
        $0.types = types
        $0.profiles = declared
      }
    }
    try whileHeldUp("start", 11) { _ = try world.domain(5, name: "slow") }
    #expect(eventually { world.state("slow", "slow0") == "ready" })
    try whileHeldUp("removeTraces", 12) { _ = try world.toolstack.destroy(5, disks: []) }
    #expect(eventually { world.info("guests") == 3 })
  }

  /// vxctl names types by virtio's registry; everything that is served is in it, under the same number.
  @Test func typesAreThoseOfTheRegistry() {
    for type in DeviceTypes.all where type.canBeDeclared {
      #expect(VirtioType.generic.contains(type.type))
    }
    #expect(Set(VirtioType.generic.map(\.prefix)).count == VirtioType.generic.count)
    #expect(Set(VirtioType.generic.map(\.number)).count == VirtioType.generic.count)
    #expect(VirtioType(name: "x", prefix: "x", number: 26).entryType == "virtio,device1a")
  }
}
