import ControlAPI
import DeviceHost
import EventLoop
import Lifecycle
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@testable import Supervisor

/// A transport is a `GuestBus` and a line in a list: here is the smallest one, and what it gets for nothing.
@Suite struct GuestBusTests {
  /// A device whose driver is the test.
  final class Wire: DeviceTransport {
    private let status = Atomic<UInt32>(0)
    private let device = Mutex<(any VirtioDevice)?>(nil)
    let interruptGauge = Gauge()
    private let changed: @Sendable (DeviceStatus) -> Void

    init(_ device: any VirtioDevice, _ changed: @escaping @Sendable (DeviceStatus) -> Void) {
      self.changed = changed
      self.device.withLock { $0 = device }
    }

    var currentStatus: DeviceStatus { DeviceStatus(rawValue: status.load(ordering: .acquiring)) }
    var isPlugged: Bool { device.withLock { $0 != nil } }

    func plug(_ device: any VirtioDevice) -> Bool {
      self.device.withLock { $0 = device }
      return true
    }

    func unplug() { device.withLock { $0 = nil } }

    func drive(_ new: DeviceStatus) {
      status.store(new.rawValue, ordering: .releasing)
      changed(new)
    }

    func remove() {
      let old = device.withLock { device in
        defer { device = nil }
        return device
      }
      old?.reset()
    }

    func interruptForUsedBuffers() { interruptGauge.add(1) }
    func interruptForConfiguration() { interruptGauge.add(1) }
    func needReset() { status.bitwiseOr(DeviceStatus.needsReset.rawValue, ordering: .acquiringAndReleasing) }
  }

  /// All wires of a test, for its driver.
  static let wires = Mutex<[DeviceKey: Wire]>([:])

  final class WireBus: GuestBus {
    static let name = "wire"
    static let style = BusStyle.registers
    static let hasServer = false
    static let hostNodes: [String] = []
    let guestNeeds = "a wire"
    static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool { guest.type == "wired" }

    private let host: BusHost
    private let memory: ForeignMappingPool
    private let thread: GuestThread
    private let wires = Mutex<[DeviceKey: Wire]>([:])

    init(_ ground: GuestGround) throws(XenError) {
      host = ground.host
      thread = ground.thread
      memory = ForeignMappingPool(
        guest: try host.hypervisor.open(ground.facts.domain), bucketShift: 16, budgetBytes: 1 << 20)
    }

    func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
      (.nothing, nil)
    }
    func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {}
    func vacate(_ key: DeviceKey) {}
    func forget(_ key: DeviceKey) { wires.withLock { $0[key] = nil } }
    func memory(of key: DeviceKey) -> (any GuestMemorySource)? { memory }
    func place(of key: DeviceKey) -> DevicePlace { .mmio(base: 0, index: 0, sharedInterrupt: 0) }
    func transport(of key: DeviceKey) -> (any DeviceTransport)? { wires.withLock { $0[key] } }
    func facts(of key: DeviceKey) -> DeviceFacts { DeviceFacts() }

    func insert(
      _ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool, _ here: OnGuestThread
    ) -> BusEvent {
      thread.loop.checkIsolated()
      let wire = Wire(backend, host.statusReporter(key))
      wires.withLock { $0[key] = wire }
      GuestBusTests.wires.withLock { $0[key] = wire }
      return .device(key, .plugged(id, Driver(wire.currentStatus)))
    }

    func remove(_ key: DeviceKey) -> @Sendable (OnGuestThread) -> Void {
      { [self] _ in
        thread.loop.checkIsolated()
        wires.withLock { $0[key] }?.remove()
      }
    }
  }

  /// Also that what a bus does to the guest runs on the guest's thread: `WireBus` ends the process elsewhere.
  @Test func newTransportServesDevicesLikeTheOthers() throws {
    let world = try World()
    defer { world.end() }
    try world.start { $0.buses.insert(WireBus.self, at: 0) }
    let domain = try world.domain(77, name: "wired", type: "wired")
    let other = try world.domain(78, name: "other")
    for identifier: DomainID in [77, 78] {
      try world.toolstack.attach(disk: "xvde", image: world.image("\(identifier)"), to: identifier)
      #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: identifier))
    }
    #expect(world.device("wired", "xvde")["transport"] == "wire")
    #expect(world.call("guest.list").arrayValue?.first { $0["name"] == "wired" }?["guestNeeds"] == "a wire")
    #expect(world.device("other", "xvde")["transport"] == "mmio")
    #expect(try world.boot(other).write([UInt8](repeating: 1, count: 512), sector: 0) == 0)
    let key = try #require(Self.wires.withLock { $0.keys.first { $0.domain == 77 } })
    let wire = try #require(Self.wires.withLock { $0[key] })
    wire.drive([.acknowledge, .driver, .featuresOK, .driverOK])
    #expect(world.toolstack.wait(for: "4", of: "state", disk: "xvde", domain: 77))
    #expect(eventually { world.state("wired", "xvde") == "connected" })
    // Operators see to it as to any other.
    #expect(world.call("device.pause", ["guest": "wired", "device": "xvde"])["accepted"] == true)
    #expect(eventually { world.state("wired", "xvde") == "paused" && !wire.isPlugged })
    #expect(world.call("device.resume", ["guest": "wired", "device": "xvde"])["accepted"] == true)
    #expect(eventually { world.state("wired", "xvde") == "connected" && wire.isPlugged })
    wire.drive([])
    #expect(eventually { world.state("wired", "xvde") == "ready" })
    #expect(try world.toolstack.destroy(77, disks: ["xvde"]))
    #expect(eventually { world.state("wired", "xvde") == nil && domain.usage == .init() })
    Self.wires.withLock { $0[key] = nil }
  }
}
