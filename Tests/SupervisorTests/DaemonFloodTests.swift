import ControlAPI
import Devices
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

/// The real vxd beside guests that never let a queue run dry: what its neighbours, its operators and its host notice. What the flooded device
/// itself owes is in `FloodTests` of the backends.
@Suite(.serialized) struct DaemonFloodTests {
  enum Kind: String, CaseIterable, Sendable {
    case disk, entropy, console, network

    /// Where vxd puts it: what profiles declare comes from the last slot down, in their order.
    var slot: Int {
      switch self {
      case .disk: 0
      case .entropy: 7
      case .console: 6
      case .network: 5
      }
    }
    var deviceID: UInt32 {
      switch self {
      case .disk: 2
      case .entropy: 4
      case .console: 3
      case .network: 1
      }
    }
    var name: String {
      switch self {
      case .disk: "xvde"
      case .entropy: "rng0"
      case .console: "console0"
      case .network: "net0"
      }
    }
    /// Where taps can be made, a network device too.
    static var possible: [Kind] {
      let descriptor = getuid() == 0 ? open("/dev/net/tun", O_RDWR | O_CLOEXEC) : -1
      if descriptor >= 0 { close(descriptor) }
      return allCases.filter { $0 != .network || descriptor >= 0 }
    }
  }

  /// vCPUs of the guest: each has one access under way at a time.
  private enum VCPU {
    static let driver = 0
    static let other = 1
    static func flood(_ kind: Kind) -> Int { 2 + (Kind.allCases.firstIndex(of: kind) ?? 0) }
    static let count = 2 + Kind.allCases.count
  }

  /// The tap of its network device is a real one, whose name has the domain's number: not one that another run makes at the same time.
  private static let domain = DomainID(10_000 + getpid() % 20_000)

  private struct Driver {
    let driver: SimulatedDriver
    let flood: Flood
    let queue: Int
  }

  private func stage() throws -> (DaemonStage, flooded: SimulatedDomain, quiet: SimulatedDomain) {
    let network = Kind.possible.contains(.network) ? #", {"type": "network"}"# : ""
    let stage = try DaemonStage(
      profiles:
        #"{"version": 1, "guests": [{"guest": "flood", "devices": [{"type": "entropy"}, {"type": "console"}\#(network)]}]}"#
    )
    let flooded = try stage.guest(Self.domain, name: "flood", disks: ["xvde"], vcpus: VCPU.count)
    let quiet = try stage.guest(2, name: "quiet", disks: ["xvde"])
    let client = try ControlClient(path: stage.socket)
    for kind in Kind.possible {
      #expect(eventually { state(client, kind) == "ready" }, "\(kind): \(stage.daemon.report)")
    }
    return (stage, flooded, quiet)
  }

  private func state(_ client: ControlClient, _ kind: Kind) -> String? {
    try? client.call("device.get", ["guest": "flood", "device": .string(kind.name)])["state"]?.stringValue
  }

  /// Boots a driver on a device of the guest's and lets it flood, with memory of its own for each type.
  private func flood(_ kind: Kind, _ domain: SimulatedDomain) throws -> Driver {
    let base = SlotTable.slot(kind.slot).base
    let area = UInt64(2 + 6 * (Kind.allCases.firstIndex(of: kind) ?? 0)) << 20
    let driver = SimulatedDriver(
      registers: TrappedRegisters(domain: domain, base: base, vcpu: VCPU.driver), memory: domain.memory, area: area)
    let queues: [Kind: (count: Int, flooded: Int)] = [
      .disk: (1, 0), .entropy: (1, 0), .console: (2, 1), .network: (3, 1),
    ]
    let (count, queue) = queues[kind] ?? (1, 0)
    try driver.start(
      deviceID: kind.deviceID, wanted: [.eventIndex, .indirectDescriptors, .netMAC], queueSize: 64, queueCount: count)
    let place = (driver.areaEnd + 4095) & ~4095
    let memory = driver.memory.pointer(place)
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: 8192)
    var chain: [SimulatedDriver.Buffer]
    switch kind {
    case .disk:
      chain = [
        .init(place, 16, writable: false), .init(place + 4096, 512, writable: true),
        .init(place + 64, 1, writable: true),
      ]
    case .entropy: chain = [.init(place, 64, writable: true)]
    case .console: chain = [.init(place, 64, writable: false)]
    case .network:
      // From the device's own address.
      let own = (0..<6).map { UInt8(driver.registers.read(0x100 + UInt64($0), width: 1)) }
      let frame = [UInt8](repeating: 0, count: 12) + [UInt8](repeating: 0xff, count: 6) + own + [8, 0, 1, 2]
      memory.copyMemory(from: frame, byteCount: frame.count)
      chain = [.init(place, UInt32(frame.count), writable: false)]
    }
    let registers = TrappedRegisters(domain: domain, base: base, vcpu: VCPU.flood(kind))
    nonisolated(unsafe) let bell = registers
    let flood = Flood(driver.rings[queue], chain) { bell.write(0x050, UInt32(queue)) }
    driver.notify(queue: queue)
    return Driver(driver: driver, flood: flood, queue: queue)
  }

  private func median(_ numbers: [Int]) -> Int { numbers.sorted()[numbers.count / 2] }

  /// The stated factor, in the flood's own steps, so that no busy machine matters: while a request of the neighbour's, or a call of the control
  /// socket, is answered, the flood gets through so many of its runs at most, as it does in a few slices of a processor.
  private static let runs = 64

  @Test(arguments: Kind.possible)
  func neighboursAndTheControlSocketAreAnsweredAndMemoryStaysFlatBesideAFlood(kind: Kind) throws {
    let (stage, flooded, quiet) = try stage()
    let client = try ControlClient(path: stage.socket)
    let registers = TrappedRegisters(domain: quiet, base: SlotTable.slot(0).base)
    let quietDriver = SimulatedDriver(registers: registers, memory: quiet.memory, area: 1 << 20)
    try quietDriver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
    let neighbour = SimulatedBlockGuest(domain: quiet, driver: quietDriver)
    let load = try flood(kind, flooded)
    var hasEnded = false
    defer { if !hasEnded { load.flood.stop() } }
    let enough = testsAreSlow ? 1000 : 20_000
    #expect(eventually { load.flood.answered > enough }, "\(stage.daemon.report)")

    // Neighbours and operators.
    var requests: [Int] = []
    var calls: [Int] = []
    for round in 0..<100 {
      let before = load.flood.answered
      #expect(try neighbour.read(sector: UInt64(round) * 8, count: 4096).status == 0)
      let between = load.flood.answered
      #expect(try client.call("device.list").arrayValue?.count ?? 0 >= 4)
      requests.append(between - before)
      calls.append(load.flood.answered - between)
    }
    let limit = Self.runs * RunBudget.chains
    #expect(
      median(requests) <= limit, "the neighbour waits for \(median(requests)) chains, at most \(requests.max() ?? 0)")
    #expect(median(calls) <= limit, "the control socket waits for \(median(calls)) chains, at most \(calls.max() ?? 0)")

    // Memory, threads and descriptors.
    let before = (stage.daemon.residentKilobytes, stage.daemon.threads.count, stage.daemon.descriptorCount)
    let goal = load.flood.answered + 5 * enough
    #expect(eventually(seconds: 60) { load.flood.answered > goal }, "\(stage.daemon.report)")
    let after = (stage.daemon.residentKilobytes, stage.daemon.threads.count, stage.daemon.descriptorCount)
    // Sanitizers keep what was freed, and shadows of it.
    #expect(testsAreSlow || after.0 <= before.0 + 1024, "\(before.0) KiB have become \(after.0) KiB")
    #expect(after.1 == before.1 && after.2 == before.2, "\(before) \(after)")

    // Limits, ballooning, reset.
    let parameters: (Int64) -> JSONValue = { rate in
      [
        "guest": "flood", "device": .string(kind.name),
        "limits": ["readOps": .integer(rate), "writeOps": .integer(rate)],
      ]
    }
    #expect(try client.call("device.limit", parameters(100))["accepted"] == true)
    #expect(
      eventually {
        (try? client.call("device.get", ["guest": "flood", "device": .string(kind.name)]))?["limits"]?["readOps"] == 100
      })
    #expect(try client.call("device.limit", parameters(0))["accepted"] == true)
    for _ in 0..<10 { flooded.sendInvalidate(vcpu: VCPU.other) }
    let still = load.flood.answered
    #expect(eventually { load.flood.answered > still + enough }, "\(stage.daemon.report)")
    let hand = TrappedRegisters(
      domain: flooded, base: SlotTable.slot(kind.slot).base, vcpu: VCPU.other)
    hand.write(0x070, 0)
    #expect(hand.read(0x070) == 0)
    load.flood.stop()
    hasEnded = true
    #expect(try neighbour.read(sector: 0, count: 4096).status == 0)
    #expect(try stage.toolstack.destroy(Self.domain, disks: ["xvde"]))
    #expect(eventually { flooded.usage == .init() }, "\(flooded.usage)")
  }

  /// All of the guest's devices at once: the daemon ends in good order, and the next one goes on; then they are all taken away.
  @Test func daemonEndsUnderFloodsOfAllTypesAndTheNextOneGoesOn() throws {
    let (stage, flooded, _) = try stage()
    let loads = try Kind.possible.map { try flood($0, flooded) }
    var hasEnded = false
    defer { if !hasEnded { for load in loads { load.flood.stop() } } }
    func expectProgress(_ when: String) {
      for (kind, load) in zip(Kind.possible, loads) {
        let before = load.flood.answered
        #expect(eventually { load.flood.answered > before + 500 }, "\(when), \(kind): \(stage.daemon.report)")
      }
    }
    expectProgress("before")
    for round in 0..<3 {
      #expect(stage.daemon.terminate() == 0, "\(stage.daemon.report)")
      try stage.daemon.start()
      expectProgress("round \(round)")
    }
    #expect(try stage.toolstack.destroy(Self.domain, disks: ["xvde"]))
    #expect(eventually { flooded.usage == .init() }, "\(flooded.usage)")
    for load in loads { load.flood.stop() }
    hasEnded = true
  }
}
