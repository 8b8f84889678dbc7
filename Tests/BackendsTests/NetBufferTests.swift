import Devices
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue

/// The buffers that the specification asks drivers for are enough (virtio 1.2, 5.1.6.3.1), for every combination that is offered, with a
/// driver that refills its queue as Linux does: when more than half of it, or of 64 buffers, are free.
@Suite struct NetBufferTests {
  struct Setting: CustomStringConvertible, Sendable {
    var merges: Bool
    var isLarge: Bool
    var mtu: Int
    var size: UInt16
    var buffer: Int
    var description: String { "merges \(merges), large \(isLarge), mtu \(mtu), \(size) buffers of \(buffer)" }
  }

  static let settings: [Setting] = [true, false].flatMap { merges in
    [true, false].flatMap { isLarge in
      [1500, 9000].flatMap { mtu in
        [UInt16(4), 16, 64, 256].flatMap { size in
          // With merging Linux and others offer what a frame of 1500 bytes needs, and any size is allowed that has room for the header.
          (merges ? [128, 1536] : [isLarge ? 65562 : 1526]).map {
            Setting(merges: merges, isLarge: isLarge, mtu: mtu, size: size, buffer: $0)
          }
        }
      }
    }
  }

  private final class Silent: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  @Test(arguments: settings) func buffersOfTheSmallestKindAreEnough(setting: Setting) throws {
    var pair: [Int32] = [-1, -1]
    try #require(socketpair(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_NONBLOCK.rawValue), 0, &pair) == 0)
    let (tap, far) = (pair[0], pair[1])
    defer {
      close(tap)
      close(far)
    }
    let domain = try SimulatedDomain(identifier: 3, memoryBytes: 32 << 20)
    let mac = MACAddress(value: 0x0016_3e00_0001)
    var options = NetPumpSettings(mac: mac)
    options.mtu = setting.mtu
    let large: FeatureBits = [.netGuestChecksum, .netGuestTSO4]
    let counters = QueueCounters()
    var pump = NetPump(
      tap: tap, source: FlatMemory(domain.memory), counters: [counters, QueueCounters()], settings: options,
      rate: RateNode(), choices: NetChoices(mac: mac, offloads: setting.isLarge ? large.rawValue : 0), isLinkUp: true,
      onChoices: { _ in true }, onAnnounced: {})
    let ring = SimulatedSplitRing(memory: domain.memory, area: 0x1000, size: setting.size, features: [])
    var layout = QueueLayout()
    (layout.size, layout.descriptorArea) = (setting.size, ring.descriptorArea)
    (layout.driverArea, layout.deviceArea) = (ring.driverArea, ring.deviceArea)
    var features: FeatureBits = setting.merges ? .netMergeable : []
    if setting.isLarge { features.formUnion(large) }
    try pump.activate(
      0,
      QueueActivation(
        layout: layout, maximumSize: setting.size, features: features, source: FlatMemory(domain.memory), adopts: false)
    )
    let signals: [any TransportSignals] = [Silent(), Silent(), Silent()]
    func run() throws {
      // What waits for buffers does so for a moment only.
      repeat { while case .more = try pump.run(signals) {} } while pump.nextTime != 0
    }
    var free = Int(setting.size)
    var offered = 0
    func refill() {
      guard free > min(64, Int(setting.size)) / 2 || free == Int(setting.size) else { return }
      while free > 0 {
        let place = (8 << 20) + offered % Int(setting.size) * setting.buffer
        _ = ring.add([.init(UInt64(place), UInt32(setting.buffer), writable: true)], indirect: false)
        offered += 1
        free -= 1
      }
    }
    refill()
    /// A frame that all buffers of the ring together, as the driver keeps it filled, have room for must arrive.
    let posted = Int(setting.size) - min(64, Int(setting.size)) / 2
    let room = setting.merges ? posted * setting.buffer : setting.buffer
    for turn in 0..<150 {
      let isBig = turn % 7 == 6
      let bytes = isBig ? (setting.isLarge ? 60000 : setting.mtu + 14) : 60 + turn * 9
      let packet =
        [UInt8](repeating: 0, count: 12) + mac.bytes + mac.bytes + [8, 0] + [UInt8](repeating: 7, count: bytes - 14)
      try #require(write(far, packet, packet.count) == packet.count)
      let before = counters.reads.value
      try run()
      while ring.takeUsed() != nil { free += 1 }
      refill()
      if packet.count <= room {
        #expect(counters.reads.value == before + 1, "\(setting), turn \(turn), \(bytes) bytes")
      }
    }
    #expect(counters.reads.value + counters.drops(.badBuffer).value == 150)
  }
}
