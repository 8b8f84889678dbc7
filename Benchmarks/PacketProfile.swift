import Devices
import EventLoop
import Glibc
import SimulatedXen
import Transport
import Virtqueue
import Xen

/// A fixed number of packets through a network device's pump, on one thread, for callgrind to count: see `profile`.
///
///     vxd-bench packets send|receive BYTES BATCH PACKETS
///
/// - `BATCH`: packets that wait each time that the pump is run.
enum PacketProfile {
  private static let bufferBytes: UInt32 = 1536
  private static let receiveBuffers = 128
  private static let mac = MACAddress(value: 0x0016_3e00_0001)

  static func run(_ arguments: [String]) throws {
    guard arguments.count == 4, let bytes = Int(arguments[1]), let batch = Int(arguments[2]),
      let packets = Int(arguments[3]), (60...60000).contains(bytes), (1...32).contains(batch)
    else {
      print("usage: vxd-bench packets send|receive BYTES BATCH PACKETS")
      exit(2)
    }
    // Each packet whole, as a tap's queue; the other end is the network.
    var pair: [Int32] = [-1, -1]
    guard socketpair(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_NONBLOCK.rawValue), 0, &pair) == 0 else {
      throw Errno.last
    }
    let domain = try SimulatedDomain(identifier: 1, memoryBytes: 16 << 20)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    let handle = try hypervisor.open(1)
    let pool = ForeignMappingPool(guest: handle, budgetBytes: 1 << 30, isStable: true)
    let device = InlinePackets(tap: pair[0], source: pool, mac: mac)
    let transport = MMIOTransport(device: device, line: SlotTable.slot(0).line(of: handle), onStatus: { _ in })
    let driver = SimulatedDriver(registers: DirectRegisters(transport), memory: domain.memory, area: 1 << 20)
    try driver.start(deviceID: 1, wanted: device.offeredFeatures, queueCount: 2)
    var frame = [UInt8](repeating: 0, count: NetConfiguration.headerBytes + bytes)
    // The source address is the guest's own.
    let source = NetConfiguration.headerBytes + 6
    frame.replaceSubrange(source..<source + 6, with: mac.bytes)
    let turns = packets / batch
    if arguments[0] == "send" {
      for _ in 0..<turns + 40 { send(driver, device, network: pair[1], frame, batch) }
    } else {
      for index in 0..<receiveBuffers { offer(driver, index) }
      for _ in 0..<turns + 40 { receive(driver, device, network: pair[1], frame, batch) }
    }
    transport.remove()
    device.finish()
    pool.close()
    for end in pair { close(end) }
  }

  private static let data: UInt64 = 4 << 20

  private static func send(
    _ driver: SimulatedDriver, _ device: InlinePackets, network: Int32, _ frame: [UInt8], _ batch: Int
  ) {
    for index in 0..<batch {
      let place = data + UInt64(index) << 16
      driver.memory.pointer(place).copyMemory(from: frame, byteCount: frame.count)
      _ = driver.add([.init(place, UInt32(frame.count), writable: false)], queue: 1)
    }
    driver.notify(queue: 1)
    var drain = frame
    var done = 0
    while done < batch {
      guard driver.takeUsed(queue: 1) != nil else {
        while read(network, &drain, drain.count) > 0 {}
        device.run()
        continue
      }
      done += 1
    }
    while read(network, &drain, drain.count) > 0 {}
  }

  private static func offer(_ driver: SimulatedDriver, _ index: Int) {
    _ = driver.add([.init(data + UInt64(index) << 12, bufferBytes, writable: true)], queue: 0)
  }

  private static func receive(
    _ driver: SimulatedDriver, _ device: InlinePackets, network: Int32, _ frame: [UInt8], _ batch: Int
  ) {
    let buffers = (frame.count + Int(bufferBytes) - 1) / Int(bufferBytes) * batch
    for _ in 0..<batch {
      guard write(network, frame, frame.count) == frame.count else { fatalError("\(Errno.last)") }
    }
    device.run()
    var done = 0
    while done < buffers, driver.takeUsed(queue: 0) != nil { done += 1 }
    guard done == buffers else { fatalError("a packet is missing") }
    for index in 0..<buffers { offer(driver, index) }
  }
}

/// A queue pair without its thread: see `InlineDevice`.
private final class InlinePackets: VirtioDevice, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the benchmark uses it from one thread.
  let deviceID: UInt32 = 1
  let offeredFeatures: FeatureBits = [
    .version1, .eventIndex, .indirectDescriptors, .netMergeable, .netChecksum, .netGuestChecksum, .netGuestTSO4,
    .netGuestTSO6, .netHostTSO4, .netHostTSO6,
  ]
  let queueSizes: [UInt16] = [256, 256]
  let configuration = ConfigurationSpace([UInt8](repeating: 0, count: 12))
  private let source: ForeignMappingPool
  private var pump: NetPump
  private var signals: [any TransportSignals] = []

  init(tap: Int32, source: ForeignMappingPool, mac: MACAddress) {
    self.source = source
    let large: FeatureBits = [.netGuestChecksum, .netGuestTSO4, .netGuestTSO6]
    var settings = NetPumpSettings(mac: mac)
    // What it finds by watching depends on the machine's speed.
    settings.pollsWhenIdle = false
    pump = NetPump(
      tap: tap, source: source, counters: [QueueCounters(), QueueCounters()], settings: settings,
      rate: RateNode(), choices: NetChoices(mac: mac, offloads: large.rawValue), isLinkUp: true,
      onChoices: { _ in true }, onAnnounced: {})
  }

  func accepts(_ features: FeatureBits) -> Bool { true }

  func activate(features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool) {
    self.signals = [signals, signals]
    for (index, layout) in layouts.enumerated() {
      guard let layout else { continue }
      do {
        try pump.activate(
          index,
          QueueActivation(layout: layout, maximumSize: 256, features: features, source: source, adopts: false))
      } catch {
        fatalError("\(error)")
      }
    }
  }

  func notify(queue: Int) { run() }

  func run() {
    guard !signals.isEmpty else { return }
    do {
      while case .more = try pump.run(signals) {}
    } catch {
      fatalError("\(error)")
    }
  }

  func reset() { for queue in 0..<2 { pump.deactivate(queue) } }
  func resetQueue(_ queue: Int) { pump.deactivate(queue) }
  func enableQueue(_ queue: Int, layout: QueueLayout) {}
  func configurationWritten(offset: Int, bytes: [UInt8]) {}

  func finish() {
    reset()
    signals = []  // the transport, which holds this device
  }
}
