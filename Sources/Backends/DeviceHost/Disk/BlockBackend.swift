package import Devices
package import Engines
package import EventLoop
package import Lifecycle
package import Transport
package import Virtqueue

/// A running block device: its storage, and for each queue an engine and a pump.
package final class BlockBackend: DeviceBackend, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: immutable, or made for sharing; see the superclass.

  package let geometry: BlockGeometry
  package let settings: BlockSettings
  package override var stuckMilliseconds: UInt64 { settings.stuckMilliseconds }
  /// Whether data goes past the page cache.
  package let isDirect: Bool
  /// What brings requests to the kernel: io_uring or libaio; nil where neither does.
  package let engineName: String?
  /// The histograms of each queue.
  package let latencies: [QueueLatencies]
  private let queues: [DeviceWorker<BlockPump>]
  private let storage: BlockStorage
  private let bytes: Gauge
  private let writeback: WritebackSwitch
  private let flushFault: FlushFault

  /// Opens the storage and builds the device on threads of its own, see `DeviceBackend.start`.
  ///
  /// - Parameter decorate: puts something between a queue and its engine: faults in tests.
  package static func start(
    _ settings: BlockSettings, _ context: Context,
    decorate: @escaping @Sendable (any BlockEngine, _ queue: Int) -> any BlockEngine = { engine, _ in engine },
    completion: @escaping @Sendable (Result<BlockBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    start(
      name: context.name, label: context.label, threads: max(1, min(settings.threads, settings.queues)),
      make: { threads throws(StartFault) in try BlockBackend(settings, context, threads, decorate) },
      completion: completion)
  }

  private init(
    _ settings: BlockSettings, _ context: Context, _ threads: [LoopThread],
    _ decorate: (any BlockEngine, Int) -> any BlockEngine
  ) throws(StartFault) {
    let report = context.report
    let notice: NBDEngine.Notice = { report($0.map(DeviceReport.storageLost) ?? .storageBack) }
    var engines: [any BlockEngine] = []
    let left = settings.engine == .ioUring ? LeftRequests(isLikely: context.isResumed) : .none
    var opened: BlockStorage
    do throws(ImageFault) {
      opened = try BlockStorage.open(settings, name: context.name, notice: notice, after: left)
      for index in 0..<opened.queueCount(settings) {
        engines.append(decorate(try opened.engine(queue: index, settings, notice: notice), index))
      }
    } catch {
      throw .image(error)
    }
    let geometry = engines[0].geometry
    let identity = DeviceIdentity(
      deviceID: 2,
      offeredFeatures: settings.offered
        ?? BlockConfiguration.features(geometry, queues: engines.count, cache: settings.cache).union(
          settings.ringFeatures),
      queueSizes: engines.map { _ in settings.queueSize })
    let layout = DeviceState.Layout(
      identity: identity, slotCount: settings.slots,
      chainLimit: settings.longestChain ?? BlockPump.chainLimit(queueSize: settings.queueSize))
    let state = try context.makeState?(layout)
    let writeback = WritebackSwitch()
    let flushFault = FlushFault(
      earlier: state.map { Int($0.notes.load(as: Int64.self)) } ?? 0,
      keep: { result in state?.notes.storeBytes(of: Int64(result), as: Int64.self) })
    let accounts = engines.indices.map { context.account.queue($0) }
    var queues: [DeviceWorker<BlockPump>] = []
    for (index, engine) in engines.enumerated() {
      let storage = state?.storage(index) ?? JournalStorage(slotCount: layout.slotCount, chainLimit: layout.chainLimit)
      queues.append(
        try Self.makeQueue(
          index, engine, settings, context, threads[index % threads.count], writeback, flushFault, storage,
          accounts[index]))
    }
    storage = opened
    isDirect = opened.isDirect
    engineName = opened.engineName?.rawValue
    self.geometry = geometry
    self.settings = settings
    self.writeback = writeback
    self.flushFault = flushFault
    self.queues = queues
    bytes = Gauge(geometry.capacity)
    latencies = accounts.map(\.latencies)
    try super.init(
      Components(
        identity: identity,
        configuration: ConfigurationSpace(
          BlockConfiguration.bytes(
            geometry, queues: engines.count, cache: settings.cache, queueSize: settings.queueSize)),
        mode: opened.mode, threads: threads, workers: queues,
        routes: engines.indices.map { Route(worker: $0, queue: 0) }, rate: context.rate, state: state,
        counters: accounts.map(\.counters)))
  }

  private static func makeQueue(
    _ index: Int, _ engine: any BlockEngine, _ settings: BlockSettings, _ context: Context,
    _ thread: LoopThread, _ writeback: WritebackSwitch, _ flushFault: FlushFault, _ storage: JournalStorage,
    _ account: QueueAccount
  ) throws(StartFault) -> DeviceWorker<BlockPump> {
    try make {
      let pump = try BlockPump(
        engine: engine, source: context.source, counters: account.counters, settings: settings.pump,
        writeback: writeback, flushFault: flushFault, storage: storage, rate: context.rate,
        latencies: account.latencies)
      return try DeviceWorker(
        pump, index: index,
        queues: [.init(maximumSize: settings.queueSize, counters: account.counters)],
        thread: thread, source: context.source, report: context.report)
    }
  }

  // MARK: What others read

  /// Bytes of the disk as they are now.
  package override var capacity: UInt64? { bytes.value }
  package override var facts: [Reading.Member] {
    let engine = engineName.map { [Reading.Member("engine", .string($0))] } ?? []
    return [.init("bytes", .count(bytes)), .init("directIO", .bool(isDirect))] + engine
      + [.init("cache", .string(settings.cache.rawValue))]
  }
  package override var objectionAsSpare: String? {
    geometry.logicalBlock <= 512
      ? nil : "'\(settings.path)' has blocks of \(geometry.logicalBlock) bytes; a spare disk has 512"
  }
  package override var requestLimit: Int { settings.slots * queues.count }

  // MARK: VirtioDevice, on the guest's thread

  /// The driver sets FEATURES_OK: what the space says from then on is for those.
  package override func accepts(_ features: FeatureBits) -> Bool {
    if BlockConfiguration.isHeldToWriteThrough(features) { setWriteback(false) }
    return true
  }

  package override func forgetDriver() {
    setWriteback(true)
    flushFault.forget()
  }

  package override func activate(
    features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool
  ) {
    // What was written by a driver that has no say in it is void.
    if !features.contains(.blockConfigureWriteback) { setWriteback(true) }
    super.activate(features: features, layouts: layouts, signals: signals, adopts: adopts)
  }

  package override func configurationWritten(offset: Int, bytes: [UInt8]) {
    let index = BlockConfiguration.writebackOffset - offset
    // Nothing else in the space is the driver's to write (virtio 1.2, 5.2.5).
    // A driver may choose before it sets DRIVER_OK (3.1.1, step 7), when nothing is negotiated yet here.
    guard negotiated.isEmpty || negotiated.contains(.blockConfigureWriteback), bytes.indices.contains(index) else {
      return
    }
    setWriteback(bytes[index] != 0)
  }

  private func setWriteback(_ value: Bool) {
    guard offeredFeatures.contains(.blockConfigureWriteback), value != writeback.isOn else { return }
    // Write-through for good where the driver cannot flush.
    if value, BlockConfiguration.isHeldToWriteThrough(negotiated) { return }
    writeback.isOn = value
    configuration.update { $0[BlockConfiguration.writebackOffset] = value ? 1 : 0 }
  }

  // MARK: For operators

  package override func adjust(_ adjustment: Adjustment, completion: @escaping @Sendable (Adjustment.Outcome) -> Void) {
    guard case .resize(let bytes) = adjustment else { return super.adjust(adjustment, completion: completion) }
    resize(to: bytes) { result in
      switch result {
      case .success(let size): completion(.done("\(size) bytes"))
      case .failure(let fault): completion(.failed(fault.message))
      }
    }
  }

  package override func resume() { for queue in queues { queue.change(runs: true) { $0.resume() } } }

  /// Follows the storage's size, or grows a regular file first, and tells the driver.
  ///
  /// - Parameter completion: called on the device's first thread.
  package func resize(to bytes: UInt64?, completion: @escaping @Sendable (Result<UInt64, ImageFault>) -> Void) {
    queues[0].thread.loop.enqueue { [self] in
      do throws(ImageFault) {
        let size = try storage.resize(to: bytes)
        let last = Countdown(left: queues.count) { [self] in
          announce(size)
          completion(.success(size))
        }
        for queue in queues {
          queue.change { pump in
            pump.set(capacity: size)
            last.step()
          }
        }
      } catch {
        completion(.failure(error))
      }
    }
  }

  private func announce(_ size: UInt64) {
    bytes.set(size)
    configuration.update { BlockConfiguration.set(capacity: size, in: &$0) }
    announceConfiguration()
  }
}
