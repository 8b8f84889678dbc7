package import Devices
package import Engines
package import EventLoop
import Synchronization
package import Transport
package import Virtqueue

/// A running block device: its store, its queues on their threads, and what the transport sees of it.
///
/// The transport's calls (`VirtioDevice`) come from the guest's ioreq thread and are handed to the queues' threads, which alone
/// touch rings, engines and guest memory.
package final class BlockBackend: VirtioDevice, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `negotiated` is touched by the ioreq thread only; all others are
  // immutable or made for sharing.

  package let deviceID: UInt32 = 2
  package let offeredFeatures: FeatureBits
  package let queueSizes: [UInt16]
  package let configuration: ConfigurationSpace
  package let geometry: BlockGeometry
  package let settings: BlockSettings
  /// How data gets to the store, for people.
  package let mode: String
  /// Whether data goes past the page cache.
  package let isDirect: Bool

  private let queues: [BlockQueue]
  private let threads: [LoopThread]
  private let store: BlockStore
  private let bytes: Atomic<UInt64>
  private let writeback = WritebackSwitch()
  private let signals = Mutex<(any TransportSignals)?>(nil)
  private let rate: RateNode
  /// The saved state that the queues' journals are in; nil where nothing is to survive.
  package let state: DeviceState?

  // Ioreq thread
  private var negotiated: FeatureBits = []

  /// Opens the store and builds the device on threads of its own; nothing here blocks the caller.
  ///
  /// - Parameters:
  ///   - name: the device, for error messages and the threads' names.
  ///   - rate: the device's node of the budget tree.
  ///   - account: counters that go on from an earlier backend of the device.
  ///   - makeState: gives the device its saved state: a new one, or that of an earlier process when it fits.
  ///   - decorate: puts something between a queue and its engine: faults in tests.
  ///   - report: called on the device's threads.
  ///   - completion: called on the device's first thread, or on the caller's when no thread could be made.
  /// - Returns: the threads, which the caller joins after `stop` or a failure.
  package static func start(
    _ settings: BlockSettings, name: String, source: any GuestMemorySource, rate: RateNode = RateNode(),
    account: DeviceAccount = DeviceAccount(),
    makeState: (@Sendable (DeviceState.Shape) throws(StartFault) -> DeviceState)? = nil,
    decorate: @escaping @Sendable (any BlockEngine, _ queue: Int) -> any BlockEngine = { engine, _ in engine },
    report: @escaping @Sendable (BlockReport) -> Void,
    completion: @escaping @Sendable (Result<BlockBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    var threads: [LoopThread] = []
    do throws(Errno) {
      for index in 0..<max(1, min(settings.threads, settings.queues)) {
        threads.append(try LoopThread(name: index == 0 ? "vxd-\(name)" : "vxd-\(index)-\(name)"))
      }
    } catch {
      completion(.failure(.host(error)))
      return threads
    }
    let all = threads
    threads[0].loop.enqueue {
      do throws(StartFault) {
        completion(
          .success(try BlockBackend(settings, name, all, source, rate, account, makeState, decorate, report)))
      } catch {
        completion(.failure(error))
      }
    }
    return threads
  }

  private init(
    _ settings: BlockSettings, _ name: String, _ threads: [LoopThread], _ source: any GuestMemorySource,
    _ rate: RateNode, _ account: DeviceAccount,
    _ makeState: ((DeviceState.Shape) throws(StartFault) -> DeviceState)?,
    _ decorate: (any BlockEngine, Int) -> any BlockEngine, _ report: @escaping @Sendable (BlockReport) -> Void
  ) throws(StartFault) {
    self.settings = settings
    self.threads = threads
    self.rate = rate
    let notice: NBDEngine.Notice = { report($0.map(BlockReport.storeLost) ?? .storeBack) }
    var engines: [any BlockEngine] = []
    let opened: BlockStore
    do throws(ImageFault) {
      opened = try BlockStore.open(settings, name: name, notice: notice)
      for index in 0..<opened.queueCount(settings) {
        engines.append(decorate(try opened.engine(queue: index, settings, notice: notice), index))
      }
    } catch {
      throw .image(error)
    }
    store = opened
    mode = opened.mode
    isDirect = opened.isDirect
    geometry = engines[0].geometry
    bytes = Atomic(geometry.capacity)
    queueSizes = engines.map { _ in settings.queueSize }
    offeredFeatures =
      settings.offered
      ?? BlockConfiguration.features(geometry, queues: engines.count, cache: settings.cache).union(
        settings.ringFeatures)
    configuration = ConfigurationSpace(
      BlockConfiguration.bytes(geometry, queues: engines.count, cache: settings.cache))
    let shape = DeviceState.Shape(
      profile: DeviceProfile(deviceID: deviceID, offeredFeatures: offeredFeatures, queueSizes: queueSizes),
      slotCount: settings.slots, chainLimit: BlockPump.chainLimit(queueSize: settings.queueSize))
    state = try makeState?(shape)
    var queues: [BlockQueue] = []
    do throws(Errno) {
      for (index, engine) in engines.enumerated() {
        let reports = BlockQueue.Reports(
          fault: { report(.fault($0)) }, held: { report($0 == 0 ? .resumed(queue: index) : .held(queue: index, $0)) },
          gone: { report(.storeGone($0)) })
        let storage =
          state?.storage(index) ?? JournalStorage(slotCount: shape.slotCount, chainLimit: shape.chainLimit)
        queues.append(
          try BlockQueue(
            engine: engine, settings: settings, thread: threads[index % threads.count], source: source,
            writeback: writeback, storage: storage, rate: rate, account: account.queue(index), reports: reports))
      }
    } catch {
      throw .host(error)
    }
    self.queues = queues
    do throws(Errno) {
      for queue in queues { try Self.onThread(of: queue) { () throws(Errno) in try queue.open() } }
    } catch {
      throw .host(error)
    }
  }

  /// Runs `body` on the queue's thread, which may be the present one (the first of the device).
  private static func onThread(of queue: BlockQueue, _ body: @escaping @Sendable () throws(Errno) -> Void) throws(Errno)
  {
    guard !queue.thread.isCurrent else { return try body() }
    let failure = Mutex<Errno?>(nil)
    queue.thread.perform {
      do throws(Errno) { try body() } catch { failure.withLock { $0 = error } }
    }
    if let failure = failure.withLock({ $0 }) { throw failure }
  }

  // MARK: What others read

  /// Bytes of the disk as they are now.
  package var capacity: UInt64 { bytes.load(ordering: .relaxed) }
  /// The counters of each queue.
  package var counters: [BlockCounters] { queues.map(\.counters) }
  /// The histograms of each queue.
  package var latencies: [QueueLatencies] { queues.map(\.latencies) }
  /// CPU time of the data threads in nanoseconds.
  package var cpuTime: UInt64 { threads.reduce(0) { $0 &+ $1.cpuTime } }
  package var threadCount: Int { threads.count }
  /// Requests that can be under way, in all queues together.
  package var requestLimit: Int { settings.slots * queues.count }

  // MARK: VirtioDevice, on the ioreq thread

  package func accepts(_ features: FeatureBits) -> Bool { BlockConfiguration.accepts(features) }

  package func activate(
    features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool
  ) {
    negotiated = features
    self.signals.withLock { $0 = signals }
    for (index, (queue, layout)) in zip(queues, layouts).enumerated() {
      guard let layout else { continue }
      queue.activate(layout, features: features, signals: signals.signals(of: index), adopts: adopts)
    }
  }

  package func resetQueue(_ queue: Int) {
    guard queues.indices.contains(queue) else { return }
    let target = queues[queue]
    target.thread.perform { target.deactivate() }
  }

  package func enableQueue(_ queue: Int, layout: QueueLayout) {
    guard queues.indices.contains(queue), let signals = signals.withLock({ $0 }) else { return }
    queues[queue].activate(layout, features: negotiated, signals: signals.signals(of: queue))
  }

  package func notify(queue: Int) {
    queues[queue].counters.notifications.add(1)
    queues[queue].wake()
  }

  package func reset() {
    signals.withLock { $0 = nil }
    negotiated = []
    setWriteback(true)
    // All at once, then a wait for each: the longest alone counts.
    let latches = queues.map { queue in
      let latch = Latch()
      queue.thread.loop.enqueue {
        queue.deactivate()
        latch.open()
      }
      return latch
    }
    for latch in latches { latch.wait() }
  }

  package func configurationWritten(offset: Int, bytes: [UInt8]) {
    let index = BlockConfiguration.writebackOffset - offset
    // Nothing else in the space is the driver's to write (virtio 1.2, 5.2.5).
    guard negotiated.contains(.blockConfigureWriteback), bytes.indices.contains(index) else { return }
    setWriteback(bytes[index] != 0)
  }

  private func setWriteback(_ value: Bool) {
    guard offeredFeatures.contains(.blockConfigureWriteback), value != writeback.isOn else { return }
    writeback.isOn = value
    configuration.update { $0[BlockConfiguration.writebackOffset] = value ? 1 : 0 }
  }

  // MARK: For operators

  /// Limits of the device, for requests from now on.
  package func set(limits: RateLimits) {
    rate.set(limits)
    limitsChanged()
  }

  /// Limits of the device or of a node above it have changed: what waits may go earlier.
  package func limitsChanged() { for queue in queues { queue.refresh() } }

  /// Goes on after a hold.
  package func resume() { for queue in queues { queue.resume() } }

  /// Follows the store's size, or grows a regular file first, and tells the driver.
  ///
  /// - Parameter completion: called on the device's first thread.
  package func resize(to bytes: UInt64?, completion: @escaping @Sendable (Result<UInt64, ImageFault>) -> Void) {
    threads[0].loop.enqueue { [self] in
      do throws(ImageFault) {
        let size = try store.resize(to: bytes)
        let last = Countdown(left: queues.count) { [self] in
          announce(size)
          completion(.success(size))
        }
        for queue in queues { queue.set(capacity: size) { last.step() } }
      } catch {
        completion(.failure(error))
      }
    }
  }

  private func announce(_ size: UInt64) {
    bytes.store(size, ordering: .relaxed)
    configuration.update { BlockConfiguration.set(capacity: size, in: &$0) }
    signals.withLock { $0 }?.interruptForConfiguration()
  }

  // MARK: End

  /// Ends the device: nothing touches guest memory any more when `completion` runs, and the store is closed when this object
  /// goes. Waits, on the device's threads, for what the kernel still works on. The caller joins the threads afterwards.
  package func stop(completion: @escaping @Sendable () -> Void) {
    signals.withLock { $0 = nil }
    let last = Countdown(left: queues.count, completion)
    for queue in queues {
      queue.thread.loop.enqueue {
        queue.close()
        last.step()
      }
    }
  }
}
