import Devices
import Lifecycle
import SimulatedXen
import TestSupport
import Transport
import Virtqueue

/// A console device with three ports: control messages, output and input in chains of any shape, and other ends that take and give what
/// the input says.
enum ConsoleTarget {
  private static let portCount = 3
  private static let queueCount = 2 * portCount + 2
  // Touched by libFuzzer's one thread.
  nonisolated(unsafe) private static let fixture = QueueFixture(size: 16, memoryBytes: 1 << 19, bucketShift: 14)

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let choice = input.byte()
    let channels = (0..<portCount).map { Channel(drops: choice >> UInt8($0) & 1 == 1, follows: $0 == 2) }
    let rate = RateNode()
    if choice & 8 != 0 {
      var limits = RateLimits()
      limits.writeBytes = 100_000
      rate.set(limits)
    }
    let notes = UnsafeMutableRawBufferPointer.allocate(byteCount: 64, alignment: 8)
    notes.initializeMemory(as: UInt8.self, repeating: 0)
    if choice & 16 != 0 { notes.storeBytes(of: input.number(bytes: 8), as: UInt64.self) }
    defer { notes.deallocate() }
    var pump = ConsolePump(
      ports: channels.enumerated().map {
        .init(
          channel: $0.element, name: $0.offset == 0 ? "" : "port\($0.offset)", isConsole: $0.offset < 2,
          inputCounters: QueueCounters(), outputCounters: QueueCounters())
      }, controlCounters: (QueueCounters(), QueueCounters()), source: fixture.pool, rate: rate, notes: notes,
      board: ConsolePortBoard(), onSize: { _ in }, onOpen: { _ in })
    let features: FeatureBits = choice & 32 != 0 ? [] : [.consoleMultiport, .consoleSize]
    let session = Session(features: choice & 64 != 0 ? features.union(.eventIndex) : features, channels: channels)
    do throws(DeviceFault) {
      try session.activate(&pump, adopts: choice & 128 != 0)
      while !input.isEmpty { try session.step(&pump, &input) }
      try session.serve(&pump)
    } catch {
      precondition(!error.message.isEmpty)
    }
    for queue in 0..<queueCount {
      pump.deactivate(queue)
      pump.end(queue)
    }
    pump.close()
    precondition(channels.allSatisfy(\.isClosed))
  }

  private final class Session {
    private let features: FeatureBits
    private let channels: [Channel]
    private let signals: [any TransportSignals]
    private var rings: [DriverRing]

    init(features: FeatureBits, channels: [Channel]) {
      self.features = features
      self.channels = channels
      let silent = Silent()
      signals = (0..<queueCount).map { _ in silent }
      rings = (0..<queueCount).map { DriverRing(fixture.domain.memory, area: 0x10000 + UInt64($0) * 0x8000) }
    }

    func activate(_ pump: inout ConsolePump, adopts: Bool) throws(DeviceFault) {
      for queue in 0..<queueCount {
        try pump.activate(
          queue,
          QueueActivation(
            layout: rings[queue].layout, maximumSize: 16, features: features, source: fixture.pool, adopts: adopts))
      }
    }

    func step(_ pump: inout ConsolePump, _ input: inout Input) throws(DeviceFault) {
      let action = input.byte()
      let port = Int(action >> 3) % portCount
      switch action & 7 {
      case 0:
        // A control message: to a port that there is or nearly, or to any.
        let number = action >> 3
        let head = number < 31 ? [number, 0, 0, 0] : (0..<4).map { _ in input.byte() }
        let bytes = head + [input.byte(), 0, input.byte(), 0]
        rings[3].offer([.init(address: nil, length: 8, isWritable: false, bytes: bytes)])
      case 1: rings[2].offer([.init(address: nil, length: UInt32(input.byte()), isWritable: true)])
      case 2, 3: rings[Int(action >> 3) % queueCount].offer(input.pieces())
      case 4:
        channels[port].waiting += Int(input.byte())
        channels[port].isOpen = action & 0x80 == 0
      case 5:
        channels[port].room = Int(input.byte()) << 4
        channels[port].size = TerminalSize(columns: UInt16(input.byte()), rows: UInt16(input.byte()))
      case 6 where action & 0x38 == 0:
        // Another backend goes on.
        for queue in 0..<queueCount { pump.deactivate(queue) }
        try activate(&pump, adopts: true)
      case 6: pump.writeEmergency(action)
      default: try serve(&pump)
      }
    }

    func serve(_ pump: inout ConsolePump) throws(DeviceFault) {
      for _ in 0..<4 {
        guard case .more = try pump.run(signals) else { break }
      }
      for ring in rings.indices { rings[ring].collect() }
    }
  }

  /// The other end of a port.
  private final class Channel: ConsoleChannel {
    var room = 1 << 16
    var waiting = 0
    var isOpen = true
    var size: TerminalSize?
    private(set) var isClosed = false
    let dropsOutput: Bool
    let followsGuest: Bool

    init(drops: Bool, follows: Bool) { (dropsOutput, followsGuest) = (drops, follows) }

    func take(_ bytes: UnsafeRawBufferPointer) -> Int {
      let count = min(bytes.count, room)
      room -= count
      return count
    }

    func give(_ buffer: UnsafeMutableRawBufferPointer) -> Int {
      let count = min(buffer.count, waiting)
      for index in 0..<count { buffer[index] = UInt8(truncatingIfNeeded: index) }
      waiting -= count
      return count
    }

    var hasInput: Bool { waiting > 0 }
    func close() { isClosed = true }
  }

  private final class Silent: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }
}
