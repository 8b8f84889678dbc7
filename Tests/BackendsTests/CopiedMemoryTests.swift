import Devices
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue

/// Devices whose guest's memory cannot be mapped, but for the rings: a host short of room for grants.
@Suite struct CopiedMemoryTests {
  private final class Silent: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  private static let data: UInt64 = 0x40000
  private let domain: SimulatedDomain
  private let source: FlatMemory
  private let signals: [any TransportSignals] = [Silent(), Silent(), Silent()]

  init() throws {
    domain = try SimulatedDomain(identifier: 3, memoryBytes: 2 << 20)
    source = FlatMemory(domain.memory, mapsData: false)
  }

  private func ring(_ index: UInt64, size: UInt16 = 64) -> SimulatedSplitRing {
    SimulatedSplitRing(memory: domain.memory, area: 0x100000 + index * 0x50000, size: size, features: [])
  }

  private func activation(_ ring: SimulatedSplitRing, _ features: FeatureBits) -> QueueActivation {
    var layout = QueueLayout()
    layout.size = ring.size
    layout.descriptorArea = ring.descriptorArea
    layout.driverArea = ring.driverArea
    layout.deviceArea = ring.deviceArea
    return QueueActivation(
      layout: layout, maximumSize: ring.size, features: features, source: source, adopts: false)
  }

  private func bytes(_ address: UInt64, _ count: Int) -> [UInt8] {
    Array(UnsafeRawBufferPointer(start: domain.memory.pointer(address), count: count))
  }

  @Test func entropyIsCopied() throws {
    var pump = EntropyPump(source: source, counters: QueueCounters(), rate: RateNode())
    let ring = ring(0)
    try pump.activate(0, activation(ring, []))
    _ = ring.add([.init(Self.data, 1000, writable: true)], indirect: false)
    _ = try pump.run(signals)
    #expect(ring.takeUsed()?.length == 1000)
    #expect(Set(bytes(Self.data, 1000)).count > 100)
  }

  @Test(arguments: [FeatureBits.netMergeable, []])
  func packetsAreCopiedBothWays(merging: FeatureBits) throws {
    var pair: [Int32] = [-1, -1]
    try #require(socketpair(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_NONBLOCK.rawValue), 0, &pair) == 0)
    let (tap, far) = (pair[0], pair[1])
    defer {
      close(tap)
      close(far)
    }
    let mac = MACAddress(value: 0x0016_3e00_0001)
    var pump = NetPump(
      tap: tap, source: source, counters: (0..<3).map { _ in QueueCounters() }, settings: NetPumpSettings(mac: mac),
      rate: RateNode(), choices: NetChoices(mac: mac, offloads: 0), isLinkUp: true, onChoices: { _ in true },
      onAnnounced: {})
    let rings = [ring(0), ring(1)]
    for queue in 0..<2 { try pump.activate(queue, activation(rings[queue], merging)) }
    let frame =
      [UInt8](repeating: 0, count: 12) + mac.bytes + mac.bytes + [8, 0]
      + (0..<1400).map { UInt8(truncatingIfNeeded: $0 / 3) }
    // Out, in two pieces.
    domain.memory.pointer(Self.data).copyMemory(from: frame, byteCount: frame.count)
    _ = rings[1].add(
      [.init(Self.data, 12, writable: false), .init(Self.data + 12, UInt32(frame.count - 12), writable: false)],
      indirect: false)
    _ = try pump.run(signals)
    var received = [UInt8](repeating: 0, count: 4096)
    #expect(read(far, &received, received.count) == frame.count)
    #expect(Array(received[..<frame.count]) == frame)
    #expect(rings[1].takeUsed() != nil)
    // In, over as many buffers as it takes.
    let size: UInt64 = merging.isEmpty ? 1526 : 600
    for index: UInt64 in 0..<8 {
      _ = rings[0].add([.init(Self.data + index * 2048, UInt32(size), writable: true)], indirect: false)
    }
    #expect(write(far, frame, frame.count) == frame.count)
    _ = try pump.run(signals)
    var whole: [UInt8] = []
    for index: UInt64 in 0..<8 {
      guard let used = rings[0].takeUsed() else { break }
      whole += bytes(Self.data + index * 2048, Int(used.length))
    }
    #expect(whole.count == frame.count)
    #expect(whole[10] == (merging.isEmpty ? 1 : 3) && Array(whole[12...]) == Array(frame[12...]))
    #expect(source.copied >= 2 * frame.count - 128)
  }
}
