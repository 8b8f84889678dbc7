import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import TestSupport
import Testing
import Virtqueue

/// A network device whose driver wants fewer notifications, and what it is told of its link's speed.
@Suite struct NetCoalescingTests {
  private static let mac = MACAddress(value: 0x0016_3e00_0001)

  /// A device whose tap is a socket pair, with its driver.
  private final class Stage {
    let fixture: DeviceFixture
    private let far: Int32

    init(speed: UInt32? = nil) throws {
      var pair: [Int32] = [-1, -1]
      try #require(socketpair(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0)
      for end in pair { _ = fcntl(end, F_SETFL, O_NONBLOCK) }
      let near = pair[0]
      far = pair[1]
      var settings = NetSettings(attachment: .created(bridge: nil), tapName: "none", mac: mac)
      settings.speed = speed
      let final = settings
      fixture = try DeviceFixture(deviceID: 1, queueSize: 64, queueCount: 3) { context, completion in
        NetBackend.start(
          final, context,
          openTap: { _ throws(TapFault) in TapDevice(name: "none", queues: [fcntl(near, F_DUPFD_CLOEXEC, 0)]) }
        ) { completion($0.map { $0 }) }
      }
      fixture.settle()
      // A driver whose buffers are used up is notified at once: this one always has more of them.
      for _ in 0..<20 { offer() }
    }

    private func offer() {
      _ = fixture.driver.add([.init(fixture.buffers + 131_072, 2048, writable: true)], queue: 0)
    }

    deinit { close(far) }

    var interrupts: UInt64 { fixture.account.queue(0).counters.interrupts.value }
    var sentInterrupts: UInt64 { fixture.account.queue(1).counters.interrupts.value }

    /// A packet for the guest, and a buffer for it.
    func receive(_ count: Int = 1) {
      for _ in 0..<count { offer() }
      fixture.driver.notify(queue: 0)
      let packet =
        [UInt8](repeating: 0, count: 12) + [UInt8](repeating: 0xff, count: 6) + Array(repeating: 2, count: 50)
      for _ in 0..<count { #expect(write(far, packet, packet.count) == packet.count) }
    }

    func send(_ count: Int = 1) {
      fixture.put(
        [UInt8](repeating: 0, count: 12) + [UInt8](repeating: 0xff, count: 6) + mac.bytes + [8, 0], at: fixture.buffers)
      for _ in 0..<count { _ = fixture.driver.add([.init(fixture.buffers, 60, writable: false)], queue: 1) }
      fixture.driver.notify(queue: 1)
      var bytes = [UInt8](repeating: 0, count: 2048)
      while read(far, &bytes, bytes.count) > 0 {}
    }

    /// - Parameter direction: 0 to send, 1 to receive.
    func limit(_ direction: UInt8, packets: UInt32, microseconds: UInt32) -> UInt8? {
      command([6, direction] + word(packets) + word(microseconds))
    }

    func command(_ bytes: [UInt8]) -> UInt8? {
      let address = fixture.buffers + 65536
      fixture.put(bytes, at: address)
      fixture.put([0xee], at: address + 16384)
      _ = fixture.driver.add(
        [.init(address, UInt32(bytes.count), writable: false), .init(address + 16384, 1, writable: true)], queue: 2)
      fixture.driver.notify(queue: 2)
      guard fixture.waitForUsed(2) != nil else { return nil }
      return fixture.bytes(at: address + 16384, count: 1)[0]
    }

    private func word(_ value: UInt32) -> [UInt8] {
      (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(8 * $0)) }
    }

    /// Nanoseconds until the driver is interrupted for one packet.
    func delay() -> UInt64 {
      while fixture.driver.takeUsed(queue: 0) != nil {}
      #expect(!fixture.driver.armInterrupt(queue: 0))
      let (before, start) = (interrupts, EventLoop.now())
      receive()
      #expect(eventually { interrupts > before })
      return EventLoop.now() - start
    }
  }

  @Test func guestIsToldTheSpeedOfItsLinkWhereThatIsKnown() throws {
    for (speed, word, duplex) in [(nil, UInt32.max, UInt32(0xff)), (25000, 25000, 1)] as [(UInt32?, UInt32, UInt32)] {
      let stage = try Stage(speed: speed)
      defer { stage.fixture.stop() }
      #expect(stage.fixture.driver.registers.read(0x10c) == word)
      #expect(stage.fixture.driver.registers.read(0x110) & 0xff == duplex)
    }
  }

  @Test func notificationsAreKeptBackAsLongAsTheDriverSays() throws {
    let stage = try Stage()
    defer { stage.fixture.stop() }
    #expect(stage.limit(1, packets: 0, microseconds: 8000) == 0)
    #expect(stage.delay() >= 8_000_000)
    // Beyond the longest that there is, it is that.
    #expect(stage.limit(1, packets: 0, microseconds: .max) == 0)
    #expect(stage.delay() >= 10_000_000)
    // Another backend, and another vxd, knows.
    try stage.fixture.exchange()
    stage.fixture.settle()
    #expect(stage.delay() >= 10_000_000)
  }

  @Test func asManyPacketsAsTheDriverSaysEndTheDelay() throws {
    let stage = try Stage()
    defer { stage.fixture.stop() }
    #expect(stage.limit(1, packets: 16, microseconds: 10_000) == 0)
    #expect(!stage.fixture.driver.armInterrupt(queue: 0))
    let before = stage.interrupts
    // All of them in one batch.
    let blocked = Latch()
    stage.fixture.enqueue { blocked.wait() }
    stage.receive(16)
    blocked.open()
    #expect(eventually { stage.interrupts == before + 1 })
    #expect(stage.limit(0, packets: 4, microseconds: 10_000) == 0)
    #expect(!stage.fixture.driver.armInterrupt(queue: 1))
    let sent = stage.sentInterrupts
    stage.send(4)
    #expect(eventually { stage.sentInterrupts == sent + 1 })
  }

  @Test func resetEndsIt() throws {
    let stage = try Stage()
    defer { stage.fixture.stop() }
    func saved() -> NetChoices? {
      stage.fixture.backend.state.flatMap { NetChoices(from: $0.notes, maximumPairs: 1) }
    }
    #expect(stage.limit(0, packets: 7, microseconds: 70) == 0 && stage.limit(1, packets: 8, microseconds: 80) == 0)
    #expect(saved()?.transmitLimits == NotificationLimits(packets: 7, microseconds: 70))
    #expect(saved()?.receiveLimits == NotificationLimits(packets: 8, microseconds: 80))
    stage.fixture.driver.reset()
    try stage.fixture.driver.start(
      deviceID: 1, wanted: stage.fixture.backend.offeredFeatures, queueSize: 64, queueCount: 3)
    // Any command saves what there is then.
    #expect(stage.command([0, 0, 0]) == 0)
    #expect(saved()?.transmitLimits == NotificationLimits() && saved()?.receiveLimits == NotificationLimits())
  }

  @Test(arguments: [
    [6], [6, 2] + Array(repeating: 0, count: 8), [6, 0, 1, 0, 0, 0], [6, 1] + Array(repeating: 0, count: 9),
  ])
  func commandThatMakesNoSenseIsRefused(bytes: [UInt8]) throws {
    let stage = try Stage()
    defer { stage.fixture.stop() }
    #expect(stage.command(bytes) == 1)
  }

  /// The driver sleeps until it is interrupted, in both directions, while it changes its mind.
  @Test(arguments: 0..<10) func noNotificationIsLost(seed: Int) throws {
    var random = SeededGenerator(seed: UInt64(seed))
    let stage = try Stage()
    defer { stage.fixture.stop() }
    for _ in 0..<60 {
      if Int.random(in: 0..<6, using: &random) == 0 {
        let answer = stage.limit(
          UInt8.random(in: 0...1, using: &random), packets: UInt32.random(in: 0...8, using: &random),
          microseconds: UInt32.random(in: 0...2000, using: &random))
        #expect(answer == 0, "seed \(seed)")
      }
      if Int.random(in: 0..<20, using: &random) == 0 { try stage.fixture.exchange() }
      let (received, sent) = (Int.random(in: 1...12, using: &random), Int.random(in: 1...12, using: &random))
      stage.receive(received)
      stage.send(sent)
      for _ in 0..<received { #expect(stage.fixture.waitForUsed(0) != nil, "seed \(seed)") }
      for _ in 0..<sent { #expect(stage.fixture.waitForUsed(1) != nil, "seed \(seed)") }
    }
  }
}
