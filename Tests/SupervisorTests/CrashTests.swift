import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Virtqueue
import Xen

/// vxd dies under load, again and again, and its guests notice a pause.
@Suite(.serialized) struct CrashTests {
  private final class Load: Sendable {
    let isOver = Atomic<Bool>(false)
    let answered = Atomic<UInt64>(0)
    let failure = Mutex<String?>(nil)
    let ended = Latch()
  }

  /// Runs a checking guest on a thread of its own.
  private func start(
    _ load: Load, _ domain: SimulatedDomain, slot: Int, isPCI: Bool = false, features: FeatureBits, seed: UInt64
  ) throws -> LoopThread {
    let thread = try LoopThread(name: "guest")
    thread.loop.enqueue {
      defer { load.ended.open() }
      do {
        let registers: any RegisterAccess =
          isPCI
          ? try PCIFunctionRegisters(domain: domain, function: PCIAddress(device: UInt8(16 + slot)))
          : TrappedRegisters(domain: domain, base: SlotTable.slot(slot).base)
        let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
        try driver.start(wanted: features, queueSize: 128)
        let guest = CheckingGuest(
          domain: domain, driver: driver, depth: 24, blocks: 512, area: driver.areaEnd, seed: seed)
        try guest.run {
          load.answered.store(guest.answered, ordering: .relaxed)
          return load.isOver.load(ordering: .relaxed)
        }
        load.answered.store(guest.answered, ordering: .relaxed)
      } catch {
        load.failure.withLock { $0 = "\(error)" }
      }
    }
    return thread
  }

  struct Form: Sendable, CustomStringConvertible {
    var name: String
    var features: FeatureBits
    var profile: String
    var kills: Int
    var isPCI = false
    var description: String { name }
  }

  static let forms: [Form] = [
    Form(name: "split", features: [.indirectDescriptors, .eventIndex, .blockFlush], profile: "", kills: 100),
    Form(name: "split, direct descriptors, no event index", features: [.blockFlush], profile: "", kills: 30),
    Form(
      name: "packed", features: [.ringPacked, .indirectDescriptors, .eventIndex, .blockFlush],
      profile: #", "packed": true"#, kills: 40),
    Form(
      name: "packed, direct descriptors", features: [.ringPacked, .blockFlush], profile: #", "packed": true"#, kills: 30
    ),
    Form(
      name: "in order", features: [.inOrder, .indirectDescriptors, .eventIndex, .blockFlush],
      profile: #", "inOrder": true"#, kills: 30),
    Form(
      name: "io_uring", features: [.indirectDescriptors, .eventIndex, .blockFlush], profile: #", "engine": "io_uring""#,
      kills: 40),
    Form(
      name: "io_uring, buffered", features: [.indirectDescriptors, .eventIndex, .blockFlush],
      profile: #", "engine": "io_uring", "direct": false"#, kills: 30),
    Form(
      name: "PCI", features: [.indirectDescriptors, .eventIndex, .blockFlush], profile: "", kills: 60, isPCI: true),
  ]

  /// So many times more kills than are part of each run: VXD_KILLS=n, and VXD_SEED=n for other places of the load.
  private static let times = number("VXD_KILLS").map { max(1, Int($0)) } ?? 1
  private static let seed = number("VXD_SEED")

  private static func number(_ variable: String) -> UInt64? {
    getenv(variable).flatMap { UInt64(String(cString: $0)) }
  }

  @Test(arguments: forms) func guestNoticesAPauseWhenTheDaemonIsKilled(form: Form) throws {
    var random = SeededGenerator(seed: Self.seed ?? UInt64(form.kills))
    let seed = random.next()
    let guests = #"[{"guest": "*", "transport": "\#(form.isPCI ? "pci" : "mmio")"}]"#
    let stage = try DaemonStage(
      profiles: #"{"version": 1, "disks": [{"guest": "*"\#(form.profile)}], "guests": \#(guests)}"#)
    let domain = try stage.guest(1, name: "alpha", disks: ["xvde"])
    let load = Load()
    let thread = try start(
      load, domain, slot: 0, isPCI: form.isPCI, features: form.features, seed: seed)
    let kills = testsAreSlow ? 5 : form.kills * Self.times
    for round in 0..<kills {
      // Sometimes in the middle of the start, sometimes after some work.
      if round % 4 != 3 {
        let before = load.answered.load(ordering: .relaxed)
        let goal = before + 1 + UInt64(random.next() % 400)
        let goesOn = eventually {
          load.answered.load(ordering: .relaxed) >= goal || load.failure.withLock { $0 != nil }
        }
        #expect(goesOn, "seed \(seed), round \(round): the guest is stuck: \(stage.daemon.report)")
      } else {
        usleep(UInt32(random.next() % 30_000))  // a moment of the start: chance decides which
      }
      if let failure = load.failure.withLock({ $0 }) {
        Issue.record("seed \(seed), round \(round): \(failure)\n\(stage.daemon.report)")
        break
      }
      stage.daemon.kill()
      try stage.daemon.start()
    }
    #expect(
      load.failure.withLock { $0 != nil } || eventually { stage.isServing(1) },
      "\(stage.daemon.report)")
    load.isOver.store(true, ordering: .relaxed)
    load.ended.wait()
    thread.stopAndJoin()
    #expect(load.failure.withLock { $0 } == nil, "seed \(seed): \(stage.daemon.report)")
    #expect(load.answered.load(ordering: .relaxed) > UInt64(kills) * 10)
    #expect(!stage.daemon.log.contains("Sanitizer"), "\(stage.daemon.report)")
    #expect(try stage.toolstack.destroy(1, disks: ["xvde"]))
    #expect(eventually { domain.usage == SimulatedDomain.Usage() }, "\(domain.usage)")
    #expect(eventually { TemporaryFolder.names(stage.state).isEmpty }, "\(TemporaryFolder.names(stage.state))")
  }

  // MARK: Who is behind it

  /// The state that a device has for operators, from the real daemon.
  private func device(_ stage: DaemonStage, _ name: String) -> JSONValue? {
    guard let client = try? ControlClient(path: stage.socket) else { return nil }
    return try? client.call("device.get", ["guest": "alpha", "device": .string(name)])
  }

  /// Three deaths by a fault in the same device's thread: the next daemon does not start it until an operator says so, and serves the
  /// others. Deaths for another reason do not count.
  @Test func deviceBehindThreeDeathsIsNotStartedAgain() throws {
    let stage = try DaemonStage()
    let domain = try stage.guest(1, name: "alpha", disks: ["xvde", "xvdf"])
    let load = Load()
    let thread = try start(load, domain, slot: 0, features: [.indirectDescriptors], seed: 11)
    defer {
      load.isOver.store(true, ordering: .relaxed)
      load.ended.wait()
      thread.stopAndJoin()
      #expect(load.failure.withLock { $0 } == nil)
    }
    // One in the main thread, and one that is no fault: neither makes anybody suspect.
    for death in 0..<5 {
      #expect(
        eventually(seconds: 20) { device(stage, "xvde")?["state"] == "connected" }, "\(death): \(stage.daemon.log)")
      #expect(eventually(seconds: 20) { device(stage, "xvdf")?["state"] == "ready" })
      switch death {
      case 0: #expect(stage.daemon.strike(SIGSEGV, thread: "vxd"))
      case 3: stage.daemon.kill()
      default: #expect(stage.daemon.strike(death == 1 ? SIGILL : SIGSEGV, thread: "vxd-alpha/xvde"))
      }
      try stage.daemon.start()
    }
    #expect(eventually(seconds: 20) { device(stage, "xvde")?["state"] == "quarantined" }, "\(stage.daemon.log)")
    #expect(device(stage, "xvde")?["reason"]?.stringValue?.contains("each of the last 3 crashes of vxd") == true)
    #expect(eventually(seconds: 20) { device(stage, "xvdf")?["state"] == "ready" })
    #expect(stage.daemon.log.contains("died of signal 11, at work for 1-virtio_disk-"))
    let answered = load.answered.load(ordering: .relaxed)
    let client = try ControlClient(path: stage.socket)
    #expect(try client.call("device.restart", ["guest": "alpha", "device": "xvde"])["accepted"] == true)
    #expect(eventually(seconds: 20) { load.answered.load(ordering: .relaxed) > answered + 100 })
    // The operator's word holds also when the daemon is killed.
    stage.daemon.kill()
    try stage.daemon.start()
    #expect(eventually(seconds: 20) { device(stage, "xvde")?["state"] == "connected" }, "\(stage.daemon.log)")
  }
}
