import Devices
import Engines
import Transport
import Virtqueue
import Xen

/// What brings requests to the kernel.
enum LoadEngine: String {
  case libaio
  case ioUring = "io_uring"
}

/// The block backend without its thread: a notification runs the queue there and then, on the thread of the guest.
///
/// What is left is the backend's own work per request: no wake-up, no other processor's cache lines.
final class InlineDevice: VirtioDevice, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the benchmark uses it from one thread.
  let deviceID: UInt32 = 2
  let offeredFeatures: FeatureBits
  let queueSizes: [UInt16] = [256]
  let configuration: ConfigurationSpace
  private let source: ForeignMappingPool
  private var pump: BlockPump
  private var signals: (any TransportSignals)?

  init(path: String, source: ForeignMappingPool, copies: Bool, slots: Int = 256, engine: LoadEngine) throws {
    self.source = source
    let image = try RawImage(path: path, holder: "bench", readOnly: false, discard: false)
    let engine: any BlockEngine =
      switch engine {
      case .libaio: try AIOEngine(image: image, depth: slots)
      case .ioUring: try IOUringEngine(image: image, depth: slots)
      }
    offeredFeatures = BlockConfiguration.features(engine.geometry)
    configuration = ConfigurationSpace(BlockConfiguration.bytes(engine.geometry))
    var settings = BlockPumpSettings()
    settings.copiesAlways = copies
    settings.bounceBytes = 1 << 20
    settings.pollsWhenIdle = false
    pump = try BlockPump(
      engine: engine, source: source, counters: QueueCounters(), settings: settings,
      storage: JournalStorage(slotCount: slots, chainLimit: BlockPump.chainLimit(queueSize: 256)))
  }

  func accepts(_ features: FeatureBits) -> Bool { true }

  func activate(features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool) {
    guard let layout = layouts.first ?? nil else { return }
    self.signals = signals
    do {
      try pump.activate(
        layout: layout, maximumSize: 256, features: features, source: source)
    } catch {
      fatalError("\(error)")
    }
  }

  func notify(queue: Int) { run() }

  func run() {
    guard let signals else { return }
    do {
      while case .more = try pump.run(signals: signals) {}
    } catch {
      fatalError("\(error)")
    }
  }

  func reset() { pump.deactivate() }
  func resetQueue(_ queue: Int) { pump.deactivate() }
  func enableQueue(_ queue: Int, layout: QueueLayout) {}
  func configurationWritten(offset: Int, bytes: [UInt8]) {}

  func finish() {
    signals = nil  // the transport, which holds this device
    pump.deactivate()
    pump.drain()
  }
}
