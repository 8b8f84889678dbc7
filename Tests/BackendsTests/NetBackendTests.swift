import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import Lifecycle
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Virtqueue

/// A network device whose tap is a socket pair: a packet with its header by each read and write, as a tap has it.
@Suite struct NetBackendTests {
  private static let mac = MACAddress(value: 0x0016_3e00_0001)
  private static let other: [UInt8] = [2, 0, 0, 0, 0, 9]

  /// The other end of the tap.
  private final class Wire {
    let near: Int32
    let far: Int32

    init() {
      var pair: [Int32] = [-1, -1]
      guard socketpair(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0 else {
        fatalError("no socket pair")
      }
      (near, far) = (pair[0], pair[1])
      for end in pair { _ = fcntl(end, F_SETFL, O_NONBLOCK) }
      var size: Int32 = 4 << 20
      setsockopt(far, SOL_SOCKET, SO_SNDBUF, &size, 4)
    }

    deinit {
      close(near)
      close(far)
    }

    func send(_ bytes: [UInt8]) -> Bool { write(far, bytes, bytes.count) == bytes.count }

    func receive(seconds: Int = 30) -> [UInt8]? {
      var wait = pollfd(fd: far, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, Int32(seconds * 1000)) == 1 else { return nil }
      var bytes = [UInt8](repeating: 0, count: 70000)
      let count = read(far, &bytes, bytes.count)
      return count > 0 ? Array(bytes[..<count]) : nil
    }
  }

  private func fixture(
    _ wire: Wire, wanted: FeatureBits? = nil, queueSize: UInt16 = 64, _ change: (inout NetSettings) -> Void = { _ in }
  ) throws -> DeviceFixture {
    var settings = NetSettings(attachment: .created(bridge: nil), tapName: "none", mac: Self.mac)
    change(&settings)
    let (final, end) = (settings, wire.near)
    let made = try DeviceFixture(deviceID: 1, wanted: wanted, queueSize: queueSize, queueCount: 3) {
      context, completion in
      // Each backend has a descriptor of its own, as each opens the tap anew.
      NetBackend.start(
        final, context,
        openTap: { _ throws(TapFault) in TapDevice(name: "none", queues: [fcntl(end, F_DUPFD_CLOEXEC, 0)]) }
      ) { completion($0.map { $0 }) }
    }
    // What is in the tap when a driver begins is not for it.
    made.settle()
    return made
  }

  private func frame(
    to destination: [UInt8] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff], from source: [UInt8], type: [UInt8] = [8, 0],
    _ payload: [UInt8]
  ) -> [UInt8] { destination + source + type + payload }

  private let header = [UInt8](repeating: 0, count: 12)

  private func transmit(_ fixture: DeviceFixture, _ packet: [UInt8]) {
    fixture.put(packet, at: fixture.buffers)
    _ = fixture.driver.add([.init(fixture.buffers, UInt32(packet.count), writable: false)], queue: 1)
    fixture.driver.notify(queue: 1)
  }

  /// - Parameter asks: the driver notifies only when the device wants it.
  private func command(_ fixture: DeviceFixture, _ bytes: [UInt8], asks: Bool = false) -> UInt8? {
    let address = fixture.buffers + 65536
    fixture.put(bytes, at: address)
    fixture.put([0xee], at: address + 16384)
    _ = fixture.driver.add(
      [.init(address, UInt32(bytes.count), writable: false), .init(address + 16384, 1, writable: true)], queue: 2)
    if asks { fixture.driver.notifyIfWanted(queue: 2) } else { fixture.driver.notify(queue: 2) }
    guard fixture.waitForUsed(2) != nil else { return nil }
    return fixture.bytes(at: address + 16384, count: 1)[0]
  }

  private func drops(_ fixture: DeviceFixture, _ reason: DropReason) -> UInt64 {
    fixture.account.all.reduce(0) { $0 + $1.counters.drops(reason).value }
  }

  private let ours = mac.bytes

  // MARK: Sending

  @Test func packetLeavesAsItWasWrittenInHowManyBuffersEver() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    let packet = header + frame(from: ours, (0..<1400).map { UInt8(truncatingIfNeeded: $0) })
    transmit(fixture, packet)
    #expect(wire.receive() == packet)
    #expect(fixture.waitForUsed(1) != nil)
    // In pieces whose borders lie anywhere.
    fixture.put(packet, at: fixture.buffers)
    let borders = [0, 5, 12, 13, 27, 200, packet.count]
    let pieces = zip(borders, borders.dropFirst()).map { first, end in
      SimulatedDriver.Buffer(fixture.buffers + UInt64(first), UInt32(end - first), writable: false)
    }
    _ = fixture.driver.add(pieces, indirect: true, queue: 1)
    fixture.driver.notify(queue: 1)
    #expect(wire.receive() == packet)
    #expect(eventually { fixture.account.queue(1).counters.writes.value == 2 })
  }

  @Test func foreignHardwareAddressIsDroppedAndCounted() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    transmit(fixture, header + frame(from: Self.other, [1, 2, 3]))
    #expect(fixture.waitForUsed(1) != nil)
    #expect(wire.receive(seconds: 0) == nil)
    #expect(drops(fixture, .foreignMAC) == 1)
  }

  /// Internet addresses that are locked: 10.0.0.2 and fd00::2.
  @Test func onlyTheGuestsOwnAddressesLeaveIt() throws {
    let wire = Wire()
    let fixture = try fixture(wire) {
      $0.vlans = [5]
      $0.addresses = [InternetAddress(version4: 0x0a00_0002), InternetAddress(version6: 0xfd00 << 48, 2)]
    }
    defer { fixture.stop() }
    let zeros = [UInt8](repeating: 0, count: 64)
    func four(_ source: [UInt8], to target: [UInt8] = [10, 0, 0, 1], port: UInt8 = 80) -> [UInt8] {
      [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0] + source + target + [0, 68, 0, port] + zeros.prefix(16)
    }
    func six(_ source: [UInt8], next: UInt8 = 17, type: UInt8 = 0, target: [UInt8] = []) -> [UInt8] {
      [0x60, 0, 0, 0, 0, 24, next, 64] + source + zeros.prefix(16) + [type, 0, 0, 0, 0, 0, 0, 0] + target + zeros
    }
    func arp(_ hardware: [UInt8], _ sender: [UInt8]) -> [UInt8] {
      [0, 1, 8, 0, 6, 4, 0, 1] + hardware + sender + zeros.prefix(6) + [10, 0, 0, 1]
    }
    let own6: [UInt8] = [0xfd] + zeros.prefix(14) + [2]
    let other6: [UInt8] = [0xfd] + zeros.prefix(14) + [3]
    let link6: [UInt8] = [0xfe, 0x80] + zeros.prefix(6) + [0x02, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 1]
    let cases: [(type: [UInt8], payload: [UInt8], dropped: DropReason?)] = [
      ([8, 0], four([10, 0, 0, 2]), nil), ([8, 0], four([10, 0, 0, 3]), .foreignIP),
      ([8, 0], four([0, 0, 0, 0], to: [255, 255, 255, 255], port: 67), nil),
      ([8, 0], four([0, 0, 0, 0], to: [255, 255, 255, 255], port: 53), .foreignIP),
      ([8, 0], [0x45, 0, 0], .malformed), ([8, 6], arp(ours, [10, 0, 0, 2]), nil),
      ([8, 6], arp(ours, [0, 0, 0, 0]), nil),
      ([8, 6], arp(ours, [10, 0, 0, 3]), .foreignIP), ([8, 6], arp(Self.other, [10, 0, 0, 2]), .foreignMAC),
      ([8, 6], [0, 1], .malformed), ([0x86, 0xdd], six(own6), nil), ([0x86, 0xdd], six(other6), .foreignIP),
      ([0x86, 0xdd], six(link6), nil), ([0x86, 0xdd], six(Array(zeros.prefix(16))), nil),
      ([0x86, 0xdd], six(own6, next: 58, type: 136, target: own6), nil),
      ([0x86, 0xdd], six(own6, next: 58, type: 136, target: other6), .foreignIP), ([0x86, 0xdd], [0x60], .malformed),
      ([0x81, 0, 0, 5, 8, 0], four([10, 0, 0, 2]), nil), ([0x81, 0, 0, 5, 8, 0], four([10, 0, 0, 3]), .foreignIP),
      ([0x81, 0, 0, 5, 0x81, 0, 0, 5, 0x81, 0, 0, 5, 8, 0], four([10, 0, 0, 2]), .malformed),
      ([0x12, 0x34], Array(zeros), .foreignIP),
    ]
    for (index, (type, payload, dropped)) in cases.enumerated() {
      let packet = header + frame(from: ours, type: type, payload)
      let before = dropped.map { drops(fixture, $0) }
      transmit(fixture, packet)
      #expect(fixture.waitForUsed(1) != nil)
      if let dropped, let before {
        #expect(drops(fixture, dropped) == before + 1, "case \(index)")
        #expect(wire.receive(seconds: 0) == nil, "case \(index)")
      } else {
        #expect(wire.receive() == packet, "case \(index)")
      }
    }
  }

  /// More pieces than the pump has vectors for must not hold its thread.
  @Test func manySmallBuffersAreServedAsFarAsTheyGo() throws {
    let wire = Wire()
    let fixture = try fixture(wire, queueSize: 64)
    defer { fixture.stop() }
    for _ in 0..<40 {
      let pieces = (0..<60).map { SimulatedDriver.Buffer(fixture.buffers + UInt64($0) * 32, 20, writable: true) }
      _ = fixture.driver.add(pieces, indirect: true, queue: 0)
    }
    fixture.driver.notify(queue: 0)
    let packet = header + frame(from: Self.other, Array(repeating: 3, count: 100))
    #expect(wire.send(packet))
    #expect(fixture.waitForUsed(0)?.length == UInt32(packet.count))
    #expect(command(fixture, [0, 1, 1]) == 0)
  }

  @Test func offloadsThatWereNotNegotiatedAreRefused() throws {
    let wire = Wire()
    let fixture = try fixture(wire, wanted: [.netMAC, .netControlQueue])
    defer { fixture.stop() }
    for (flags, type): (UInt8, UInt8) in [(1, 0), (0, 1), (1, 4), (0, 9), (0, 0x80)] {
      var packet = header + frame(from: ours, [1, 2, 3])
      (packet[0], packet[1]) = (flags, type)
      transmit(fixture, packet)
      #expect(fixture.waitForUsed(1) != nil)
    }
    #expect(drops(fixture, .malformed) == 5)
    #expect(wire.receive(seconds: 0) == nil)
  }

  @Test func packetsThatMakeNoSenseAreDroppedAndTheQueueGoesOn() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    transmit(fixture, header)
    #expect(fixture.waitForUsed(1) != nil)
    // Not in the guest's memory.
    _ = fixture.driver.add([.init(1 << 40, 100, writable: false)], queue: 1)
    fixture.driver.notify(queue: 1)
    #expect(fixture.waitForUsed(1) != nil)
    // A buffer for the device to write.
    _ = fixture.driver.add([.init(fixture.buffers, 100, writable: true)], queue: 1)
    fixture.driver.notify(queue: 1)
    #expect(fixture.waitForUsed(1) != nil)
    #expect(drops(fixture, .malformed) == 2 && drops(fixture, .badBuffer) == 1)
    let packet = header + frame(from: ours, [7])
    transmit(fixture, packet)
    #expect(wire.receive() == packet)
    fixture.settle()
    #expect(fixture.faults.all.isEmpty)
  }

  @Test func rateLimitHoldsPacketsBackInTheGuestsQueue() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    var limits = RateLimits()
    limits.writeOperations = 100
    limits.burstMilliseconds = 10
    fixture.backend.set(limits: limits)
    let packet = header + frame(from: ours, [7])
    fixture.put(packet, at: fixture.buffers)
    let start = EventLoop.now()
    for _ in 0..<40 {
      _ = fixture.driver.add([.init(fixture.buffers, UInt32(packet.count), writable: false)], queue: 1)
    }
    fixture.driver.notify(queue: 1)
    for _ in 0..<40 { #expect(wire.receive() == packet) }
    #expect(EventLoop.now() - start > 300_000_000)
  }

  // MARK: Receiving

  private func offer(_ fixture: DeviceFixture, count: Int, bytes: Int) {
    for index in 0..<count {
      _ = fixture.driver.add(
        [.init(fixture.buffers + UInt64(index * bytes), UInt32(bytes), writable: true)], queue: 0)
    }
    fixture.driver.notify(queue: 0)
  }

  @Test func largePacketIsMergedOverAsManyBuffersAsItNeeds() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    offer(fixture, count: 60, bytes: 1536)
    let packet = header + frame(from: Self.other, (0..<5000).map { UInt8(truncatingIfNeeded: $0 / 7) })
    // Less than the largest packet is there: nothing may be lost by reading too early.
    #expect(wire.send(packet))
    var received: [UInt8] = []
    for index in 0..<4 {
      let used = fixture.waitForUsed(0)
      #expect(used != nil)
      received += fixture.bytes(at: fixture.buffers + UInt64(index * 1536), count: Int(used?.length ?? 0))
    }
    #expect(received.count == packet.count)
    #expect(Array(received[..<10]) == Array(packet[..<10]) && Array(received[12...]) == Array(packet[12...]))
    #expect(received[10] == 4 && received[11] == 0)
  }

  /// Many small packets make the device expect more of them; a large one among them is no smaller for that.
  @Test(arguments: 0..<12) func packetsOfAllSizesArriveWholeAndInOrder(seed: Int) throws {
    var random = SeededGenerator(seed: UInt64(seed))
    let wire = Wire()
    let fixture = try fixture(wire, queueSize: 256)
    defer { fixture.stop() }
    let size = [300, 1536, 2048, 4096][seed % 4]
    var offered: [Int] = []
    func offer(_ slot: Int) {
      _ = fixture.driver.add(
        [.init(fixture.buffers + UInt64(slot * size), UInt32(size), writable: true)], queue: 0)
      offered.append(slot)
    }
    for slot in 0..<250 { offer(slot) }
    fixture.driver.notify(queue: 0)
    func next() -> [UInt8]? {
      guard let used = fixture.waitForUsed(0) else { return nil }
      let slot = offered.removeFirst()
      let bytes = fixture.bytes(at: fixture.buffers + UInt64(slot * size), count: Int(used.length))
      offer(slot)
      fixture.driver.notifyIfWanted(queue: 0)
      return bytes
    }
    for turn in 0..<80 {
      let packets = (0..<Int.random(in: 1...4, using: &random)).map { index -> [UInt8] in
        let bytes =
          switch Int.random(in: 0..<10, using: &random) {
          case 0: Int.random(in: 1400...60000, using: &random)
          case 1: 1500
          default: Int.random(in: 46...200, using: &random)
          }
        return header
          + frame(from: Self.other, (0..<bytes).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ turn &+ index) })
      }
      for packet in packets { #expect(wire.send(packet)) }
      for packet in packets {
        var received = try #require(next(), "seed \(seed), turn \(turn)")
        let count = Int(received[10]) | Int(received[11]) << 8
        for _ in 1..<max(1, count) { received += try #require(next(), "seed \(seed), turn \(turn)") }
        let isWhole = received.count == packet.count && received[12...] == packet[12...]
        #expect(isWhole, "seed \(seed), turn \(turn): \(received.count) of \(packet.count) bytes")
        guard isWhole else { return }
      }
    }
    #expect(drops(fixture, .badBuffer) == 0)
  }

  /// What the driver offers behind its first buffers is guessed: a guess that it belies costs it the packet.
  @Test func tinyBuffersBehindLargeOnesCostThePacketAndNothingElse() throws {
    let wire = Wire()
    let fixture = try fixture(wire, queueSize: 1024) { $0.queueSize = 1024 }
    defer { fixture.stop() }
    let small = header + frame(from: Self.other, Array(repeating: 3, count: 100))
    let large = header + frame(from: Self.other, Array(repeating: 4, count: 60000))
    let place = fixture.buffers
    for _ in 0..<60 { _ = fixture.driver.add([.init(place, 2048, writable: true)], queue: 0) }
    for _ in 0..<900 { _ = fixture.driver.add([.init(place, 12, writable: true)], queue: 0) }
    fixture.driver.notify(queue: 0)
    for _ in 0..<50 {
      #expect(wire.send(small))
      #expect(fixture.waitForUsed(0)?.length == UInt32(small.count))
    }
    // Its first part has ten buffers of 2048 bytes, the rest would need three thousand of the others.
    #expect(wire.send(large))
    #expect(eventually { drops(fixture, .badBuffer) > 0 })
    #expect(wire.send(small))
    #expect(fixture.waitForUsed(0) != nil)
    fixture.settle()
    #expect(fixture.faults.all.isEmpty)
  }

  @Test func packetWaitsUntilThereAreBuffersForIt() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    let packet = header + frame(from: Self.other, Array(repeating: 3, count: 100))
    #expect(wire.send(packet))
    fixture.settle()
    #expect(fixture.driver.takeUsed(queue: 0) == nil)
    // An interrupt is asked for as a driver does that finds nothing.
    #expect(!fixture.driver.armInterrupt(queue: 0))
    _ = fixture.driver.add([.init(fixture.buffers, 1536, writable: true)], queue: 0)
    fixture.driver.notifyIfWanted(queue: 0)
    #expect(fixture.waitForUsed(0)?.length == UInt32(packet.count))
  }

  @Test func receiveFilterIsWhatTheDriverChose() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    offer(fixture, count: 60, bytes: 1536)
    #expect(command(fixture, [0, 0, 0]) == 0)  // not promiscuous
    #expect(command(fixture, [1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 5, 1, 0, 0, 0, 0x33, 0x33, 0, 0, 0, 1]) == 0)
    #expect(command(fixture, [2, 0, 7, 0]) == 0)  // VLAN 7
    let tag: [UInt8] = [0x81, 0]
    for (destination, type, passes): ([UInt8], [UInt8], Bool) in [
      (ours, [8, 0], true), ([2, 0, 0, 0, 0, 5], [8, 0], true), ([2, 0, 0, 0, 0, 6], [8, 0], false),
      ([0x33, 0x33, 0, 0, 0, 1], [8, 0], true), ([0x33, 0x33, 0, 0, 0, 2], [8, 0], false),
      ([0xff, 0xff, 0xff, 0xff, 0xff, 0xff], [8, 0], true), (ours, tag + [0, 7, 8, 0], true),
      (ours, tag + [0, 8, 8, 0], false),
    ] {
      let packet = header + frame(to: destination, from: Self.other, type: type, [1, 2, 3, 4, 5, 6])
      let before = drops(fixture, .filtered)
      #expect(wire.send(packet))
      if passes {
        #expect(fixture.waitForUsed(0)?.length == UInt32(packet.count), "\(destination) \(type)")
      } else {
        #expect(eventually { drops(fixture, .filtered) == before + 1 }, "\(destination) \(type)")
      }
    }
  }

  @Test(
    arguments: [
      [0], [0, 0], [0, 0, 2], [0, 9, 1], [1, 0, 255, 255, 255, 255], [1, 0, 1, 0, 0, 0, 1, 2],
      [1, 1, 1, 2, 3, 4, 5, 6],
      [2, 0, 0, 16], [4, 0, 1, 0], [5, 0, 0, 0, 0, 0, 0, 0, 0, 128], [99, 1, 2, 3],
    ] as [[UInt8]]) func commandThatMakesNoSenseIsAnsweredWithAnError(bytes: [UInt8]) throws
  {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    #expect(command(fixture, bytes) == 1)
    #expect(command(fixture, [0, 1, 1]) == 0)
  }

  /// More than the device pays for at once, each with the answer to the one before.
  @Test func commandsBeyondTheirRateAreAllAnswered() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    for number in 0..<300 {
      guard command(fixture, [0, 1, UInt8(number & 1)], asks: true) == 0 else {
        Issue.record("command \(number) is not answered")
        return
      }
    }
  }

  // MARK: Life

  @Test func anotherBackendGoesOnWithWhatTheDriverHasAndChose() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    offer(fixture, count: 60, bytes: 1536)
    #expect(command(fixture, [0, 0, 0]) == 0)
    let packet = header + frame(from: ours, [7])
    transmit(fixture, packet)
    #expect(wire.receive() == packet)
    #expect(fixture.waitForUsed(1) != nil)
    let incoming = header + frame(to: ours, from: Self.other, [1])
    try fixture.exchange {
      // While nobody serves: the driver goes on making packets, and the network too.
      fixture.put(packet, at: fixture.buffers + 131072)
      _ = fixture.driver.add([.init(fixture.buffers + 131072, UInt32(packet.count), writable: false)], queue: 1)
      #expect(wire.send(header + frame(to: [2, 0, 0, 0, 0, 6], from: Self.other, [1])))
      #expect(wire.send(incoming))
    }
    #expect(wire.receive() == packet)
    #expect(fixture.waitForUsed(0)?.length == UInt32(incoming.count))
    #expect(drops(fixture, .filtered) == 1)
    // A driver that begins anew is promiscuous again, as one that cannot say otherwise.
    #expect(fixture.driver.registers.read(0x106) & 2 == 2)  // announce
    #expect(command(fixture, [3, 0]) == 0)
    #expect(fixture.driver.registers.read(0x106) & 2 == 0)
  }

  @Test func linkThatIsDownStaysDownWithAnotherBackend() throws {
    let wire = Wire()
    let fixture = try fixture(wire)
    defer { fixture.stop() }
    #expect(fixture.driver.registers.read(0x106) & 1 == 1)
    let answer = Mutex<[Adjustment.Outcome]>([])
    fixture.backend.adjust(.link(isUp: false)) { outcome in answer.withLock { $0.append(outcome) } }
    #expect(answer.withLock { $0 } == [.done("down")] && fixture.backend.isLinkUp == false)
    // What it cannot do it says, once.
    fixture.backend.adjust(.resize(bytes: nil)) { outcome in answer.withLock { $0.append(outcome) } }
    #expect(answer.withLock { $0.count } == 2)
    #expect(fixture.driver.registers.read(0x106) & 1 == 0)
    // The data thread learns of it a little later.
    func isDropped() -> Bool {
      let before = drops(fixture, .linkDown)
      transmit(fixture, header + frame(from: ours, [1]))
      return fixture.waitForUsed(1) != nil && drops(fixture, .linkDown) == before + 1
    }
    #expect(eventually { isDropped() })
    while wire.receive(seconds: 0) != nil {}
    try fixture.exchange()
    #expect(isDropped())
    #expect(fixture.driver.registers.read(0x106) & 1 == 0)
    fixture.backend.adjust(.link(isUp: true)) { _ in }
    #expect(eventually { !isDropped() })
    while wire.receive(seconds: 0) != nil {}
    let packet = header + frame(from: ours, [2])
    transmit(fixture, packet)
    #expect(wire.receive() == packet)
  }

  /// Chains of every shape, wherever their buffers lie, and packets of every size from outside.
  @Test(arguments: 0..<30) func noChainOfAHostileGuestEndsMoreThanItsOwnDevice(seed: Int) throws {
    var random = SeededGenerator(seed: UInt64(seed))
    let wire = Wire()
    let fixture = try fixture(wire, wanted: seed % 3 == 0 ? [.netMAC, .netControlQueue, .netControlReceive] : nil)
    defer { fixture.stop() }
    for _ in 0..<150 {
      let queue = Int.random(in: 0...2, using: &random)
      let buffers = (0..<Int.random(in: 1...6, using: &random)).map { _ -> SimulatedDriver.Buffer in
        let addresses: [UInt64] = [fixture.buffers, 0, 1 << 40, UInt64.max - 8, fixture.buffers + 4090]
        let lengths: [UInt32] = [0, 1, 11, 12, 26, 1514, 65562, UInt32.max]
        return .init(
          addresses.randomElement(using: &random) ?? 0, lengths.randomElement(using: &random) ?? 0,
          writable: queue == 0 ? Int.random(in: 0...9, using: &random) > 0 : Int.random(in: 0...9, using: &random) == 0)
      }
      let noise = (0..<200).map { _ in UInt8.random(in: 0...255, using: &random) }
      fixture.put(noise, at: fixture.buffers)
      _ = fixture.driver.add(buffers, indirect: Bool.random(using: &random), queue: queue)
      fixture.driver.notify(queue: queue)
      if Int.random(in: 0...4, using: &random) == 0 {
        _ = wire.send(Array(repeating: 5, count: Int.random(in: 1...3000, using: &random)))
      }
      while fixture.driver.takeUsed(queue: queue) != nil {}
    }
    // A reset is answered whatever has gone before, and the device serves again.
    fixture.driver.reset()
    try fixture.driver.start(deviceID: 1, wanted: fixture.backend.offeredFeatures, queueSize: 64, queueCount: 3)
    while wire.receive(seconds: 0) != nil {}
    let packet = header + frame(from: ours, [9])
    transmit(fixture, packet)
    #expect(wire.receive() == packet, "seed \(seed)")
  }
}
