import Devices
import Glibc
import Lifecycle
import SimulatedXen
import TestSupport
import Transport
import Virtqueue

/// A pair of network queues with its control queue, over a pair of sockets that is the tap: packets both ways, offload fields, buffers
/// and commands from the input.
enum NetTarget {
  private static let mac = MACAddress(value: 0x0216_3e01_0203)
  // Touched by libFuzzer's one thread.
  nonisolated(unsafe) private static let fixture = QueueFixture(size: 16, memoryBytes: 1 << 18, bucketShift: 14)
  private static let sockets: (tap: Int32, peer: Int32) = {
    var pair: [Int32] = [0, 0]
    guard socketpair(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_NONBLOCK.rawValue), 0, &pair) == 0 else {
      fatalError("no socket pair")
    }
    return (pair[0], pair[1])
  }()

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    var settings = NetPumpSettings(mac: mac)
    let choice = input.byte()
    if choice & 1 != 0 { settings.source.mac = nil }
    if choice & 2 != 0 { settings.source.addresses = [InternetAddress(version4: 0x0a00_0001)] }
    if choice & 16 != 0 { settings.source.vlans = [5, 4095] }
    settings.source.mayServe = choice & 32 != 0
    settings.mtu = choice & 4 != 0 ? 1500 : 9000
    settings.pairs = 4
    let rate = RateNode()
    if choice & 8 != 0 {
      var limits = RateLimits()
      limits.readBytes = 100_000
      limits.writeOperations = 1000
      rate.set(limits)
    }
    let features = FeatureBits(rawValue: input.number(bytes: 8)).subtracting([.ringPacked, .inOrder])
    let choices = NetChoices(mac: mac, offloads: features.intersection(.netGuestOffloads).rawValue)
    var pump = NetPump(
      tap: sockets.tap, source: fixture.pool, counters: (0..<3).map { _ in QueueCounters() }, settings: settings,
      rate: rate, choices: choices, isLinkUp: true, onChoices: { _ in true }, onAnnounced: {})
    let session = Session(features: features, locksMAC: settings.source.mac != nil)
    session.emptySockets()
    do throws(DeviceFault) {
      try session.activate(&pump)
      while !input.isEmpty { try session.step(&pump, &input) }
      try session.serve(&pump)
    } catch {
      precondition(!error.message.isEmpty)
    }
    for queue in 0..<3 { pump.deactivate(queue) }
  }

  /// The driver, and whoever is at the tap's other end.
  private final class Session {
    private let features: FeatureBits
    private let locksMAC: Bool
    private let signals: [any TransportSignals]
    private var rings: [DriverRing]
    private var isLinkUp = true

    init(features: FeatureBits, locksMAC: Bool) {
      self.features = features
      self.locksMAC = locksMAC
      let silent = Silent()
      signals = [silent, silent, silent]
      rings = (0..<3).map { DriverRing(fixture.domain.memory, area: 0x10000 + UInt64($0) * 0x8000) }
    }

    func activate(_ pump: inout NetPump, adopts: Bool = false) throws(DeviceFault) {
      for queue in 0..<3 {
        try pump.activate(
          queue,
          QueueActivation(
            layout: rings[queue].layout, maximumSize: 16, features: features, source: fixture.pool, adopts: adopts))
      }
    }

    func step(_ pump: inout NetPump, _ input: inout Input) throws(DeviceFault) {
      let action = input.byte()
      switch action & 7 {
      case 0: sendPacket(&input)
      case 1: offerBuffer(action, &input)
      case 2: receivePacket(action, &input)
      case 3: command(&input)
      case 4: rings[Int(action >> 3) % 3].offer(input.pieces())
      case 5:
        isLinkUp = action & 8 != 0
        pump.set(isLinkUp: isLinkUp)
      case 6 where action & 0x38 == 0:
        // Another backend goes on.
        for queue in 0..<3 { pump.deactivate(queue) }
        try activate(&pump, adopts: true)
      default: try serve(&pump)
      }
    }

    func serve(_ pump: inout NetPump) throws(DeviceFault) {
      for _ in 0..<4 {
        guard case .more = try pump.run(signals) else { break }
      }
      for ring in rings.indices { rings[ring].collect() }
      checkPackets()
      while pump.takeReport() != nil {}
    }

    /// Header and frame, in one piece or cut anywhere.
    private func sendPacket(_ input: inout Input) {
      let cut = Int(input.byte())
      let count = Int(input.byte()) + 12
      let packet = (0..<count).map { _ in input.byte() }
      let pieces = [packet.prefix(cut), packet.dropFirst(cut)].filter { !$0.isEmpty }
      rings[1].offer(pieces.map { .init(address: nil, length: UInt32($0.count), isWritable: false, bytes: Array($0)) })
    }

    private func offerBuffer(_ action: UInt8, _ input: inout Input) {
      let count = Int(action >> 3) % 3 + 1
      rings[0].offer(
        (0..<count).map { _ in
          // Large ones lie in memory that nothing else is in.
          let length = UInt32(input.number(bytes: 2))
          return .init(address: length > 0x300 ? 0x30000 : nil, length: length, isWritable: true)
        })
    }

    private func receivePacket(_ action: UInt8, _ input: inout Input) {
      let count = Int(input.byte()) << Int(action >> 3 & 7)
      var packet = (0..<min(count, 64)).map { _ in input.byte() }
      packet += [UInt8](repeating: 0x55, count: max(0, count - packet.count))
      _ = send(sockets.peer, packet, packet.count, Int32(MSG_NOSIGNAL))
    }

    private func command(_ input: inout Input) {
      let count = Int(input.byte())
      let bytes = (0..<count).map { _ in input.byte() }
      rings[2].offer([
        .init(address: nil, length: UInt32(count), isWritable: false, bytes: bytes),
        .init(address: nil, length: 1, isWritable: true),
      ])
    }

    /// Nothing comes out that the rules forbid.
    private func checkPackets() {
      var packet = [UInt8](repeating: 0, count: 70000)
      while true {
        let count = recv(sockets.peer, &packet, packet.count, 0)
        guard count > 0 else { return }
        precondition(count >= 12 + 14, "a packet without an Ethernet header")
        if locksMAC {
          let source = packet[18..<24].reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
          precondition(source == NetTarget.mac.value, "a packet from another hardware address")
        }
        if packet[0] & 1 != 0 {
          precondition(features.contains(.netChecksum), "a checksum that was not negotiated")
          let place = Int(packet[6]) + Int(packet[7]) << 8 + Int(packet[8]) + Int(packet[9]) << 8
          precondition(place + 2 <= count - 12, "a checksum outside of the packet")
        }
        let needed: FeatureBits? =
          switch packet[1] & 0x7f {
          case 0: []
          case 1: .netHostTSO4
          case 3: .netHostUFO
          case 4: .netHostTSO6
          case 5: .netHostUSO
          default: nil
          }
        guard let needed else { fatalError("a type of segmentation that does not exist") }
        precondition(features.isSuperset(of: needed), "a segmentation that was not negotiated")
      }
    }

    func emptySockets() {
      var packet = [UInt8](repeating: 0, count: 70000)
      for socket in [sockets.tap, sockets.peer] {
        while recv(socket, &packet, packet.count, 0) > 0 {}
      }
    }
  }

  private final class Silent: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }
}
