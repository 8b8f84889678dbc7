package import Devices
package import EventLoop
package import Lifecycle
import Synchronization
package import Transport
package import Virtqueue

/// A running device: its workers on their threads, and what the transport and the supervisor see of it. Each device type adds to it what
/// is its own.
///
/// The transport's calls (`VirtioDevice`) come from the guest's thread and are handed to the data threads, which alone touch rings and
/// guest memory.
package class DeviceBackend: VirtioDevice, @unchecked Sendable {
  // Invariant behind @unchecked Sendable, for subclasses too: `negotiated` is touched by the guest's thread only; all other
  // properties are immutable or made for sharing.

  /// What a backend of any type is made of.
  package struct Components {
    package var identity: DeviceIdentity
    package var configuration: ConfigurationSpace
    /// How it is served, for people.
    package var mode: String
    package var threads: [LoopThread]
    package var workers: [any AnyDeviceWorker]
    /// For each queue of the device: which worker has it, and as which of its own.
    package var routes: [Route]
    package var rate: RateNode
    package var state: DeviceState?
    package var counters: [QueueCounters]
  }

  /// Where a queue is served.
  package struct Route: Sendable {
    package var worker: Int
    package var queue: Int
  }

  /// What its supervisor gives to a backend.
  package struct Context: Sendable {
    /// The device, for error messages and the threads' names.
    package var name: String
    package var source: any GuestMemorySource
    /// The device's node of the tree of limits.
    package var rate: RateNode
    /// Counters that go on from an earlier backend of the device.
    package var account: DeviceAccount
    /// Gives the device its saved state: a new one, or that of an earlier process when it fits.
    package var makeState: (@Sendable (DeviceState.Layout) throws(StartFault) -> DeviceState)?
    /// Called on the device's threads.
    package var report: @Sendable (DeviceReport) -> Void
    /// Names the device for the record of a death of the daemon; empty for none.
    package var label = ""
    /// An earlier process served the device, and this one has not served it yet.
    package var isResumed = false
    /// The device in names of files.
    package var fileName = "device"
    /// Where sockets and memories of console ports are; nil for none.
    package var consoleFolder: String?
    /// Whether the peer of a socket may see and use consoles.
    package var mayAttach: @Sendable (_ descriptor: Int32) -> Bool = { _ in true }
    /// Puts something between a disk's queue and its engine: faults in tests.
    package var decorate: @Sendable (any BlockEngine, _ queue: Int) -> any BlockEngine = { engine, _ in engine }
    /// Takes a line that the guest wrote, for the daemon's log.
    package var logLine: @Sendable (String) -> Void = { _ in }

    package init(
      name: String, source: any GuestMemorySource, rate: RateNode = RateNode(),
      account: DeviceAccount = DeviceAccount(),
      makeState: (@Sendable (DeviceState.Layout) throws(StartFault) -> DeviceState)? = nil,
      report: @escaping @Sendable (DeviceReport) -> Void
    ) {
      self.name = name
      self.source = source
      self.rate = rate
      self.account = account
      self.makeState = makeState
      self.report = report
    }
  }

  private let identity: DeviceIdentity
  package let configuration: ConfigurationSpace
  package let mode: String
  /// The saved state that the queues' positions are in; nil where nothing is to survive.
  package let state: DeviceState?
  /// The counters of each queue.
  package let counters: [QueueCounters]
  private let threads: [LoopThread]
  private let workers: [any AnyDeviceWorker]
  private let routes: [Route]
  private let rate: RateNode
  private let signals = Mutex<(any TransportSignals)?>(nil)
  /// Open when `stop` has come so far that nothing touches guest memory any more.
  private let isOver = Latch()

  // The guest's thread
  package private(set) var negotiated: FeatureBits = []

  /// Makes threads, and on the first of them the backend; nothing here blocks the caller.
  ///
  /// - Parameter completion: called on the device's first thread, or on the caller's when no thread could be made.
  /// - Returns: the threads, which the caller joins after `stop` or a failure.
  package static func start<Backend: DeviceBackend>(
    name: String, label: String, threads count: Int,
    make: @escaping @Sendable ([LoopThread]) throws(StartFault) -> Backend,
    completion: @escaping @Sendable (Result<Backend, StartFault>) -> Void
  ) -> [LoopThread] {
    var threads: [LoopThread] = []
    do throws(Errno) {
      for index in 0..<count {
        let thread = try LoopThread(name: index == 0 ? "vxd-\(name)" : "vxd-\(index)-\(name)", work: .guests)
        thread.label(label)
        threads.append(thread)
      }
    } catch {
      completion(.failure(.host(error)))
      return threads
    }
    let all = threads
    threads[0].loop.enqueue {
      do throws(StartFault) {
        completion(.success(try make(all)))
      } catch {
        completion(.failure(error))
      }
    }
    return threads
  }

  /// On the device's first thread.
  package init(_ components: Components) throws(StartFault) {
    identity = components.identity
    configuration = components.configuration
    mode = components.mode
    state = components.state
    counters = components.counters
    threads = components.threads
    workers = components.workers
    routes = components.routes
    rate = components.rate
    do throws(Errno) {
      for worker in workers { try Self.onThread(of: worker) { () throws(Errno) in try worker.open() } }
    } catch {
      throw .host(error)
    }
  }

  /// Runs `body` on the worker's thread, which may be the present one (the first of the device).
  private static func onThread(
    of worker: any AnyDeviceWorker, _ body: @escaping @Sendable () throws(Errno) -> Void
  ) throws(Errno) {
    guard !worker.thread.isCurrent else { return try body() }
    let failure = Mutex<Errno?>(nil)
    worker.thread.perform {
      do throws(Errno) { try body() } catch { failure.withLock { $0 = error } }
    }
    if let failure = failure.withLock({ $0 }) { throw failure }
  }

  // MARK: What others read

  package var deviceID: UInt32 { identity.deviceID }
  package var offeredFeatures: FeatureBits { identity.offeredFeatures }
  package var queueSizes: [UInt16] { identity.queueSizes }
  /// CPU time of the data threads in nanoseconds.
  package var cpuTime: UInt64 { threads.reduce(0) { $0 &+ $1.cpuTime } }
  package var threadCount: Int { threads.count }
  /// Age in milliseconds at which a request or a batch counts as stuck. Overridden where it is an option.
  package var stuckMilliseconds: UInt64 { 30_000 }
  /// Requests that can be under way, in all queues together.
  package var requestLimit: Int { queueSizes.reduce(0) { $0 + Int($1) } }

  /// What is special of the type, for operators; overridden where there is such a thing.
  package var facts: [Reading.Member] { [] }
  /// Overridden by consoles.
  package var ports: [BackendPort] { [] }
  /// Bytes of a disk.
  package var capacity: UInt64? { nil }
  /// Of a network device.
  package var isLinkUp: Bool? { nil }
  /// Why it cannot be what a spare disk is filled with; nil where it can.
  package var objectionAsSpare: String? { "only a disk can be attached" }

  package var readings: BackendReadings {
    BackendReadings(
      mode: mode, threadCount: threadCount, requestLimit: requestLimit, counters: counters, facts: facts, ports: ports,
      capacity: capacity, isLinkUp: isLinkUp, clocks: threads.map(\.clock))
  }

  // MARK: VirtioDevice, on the guest's thread

  package func accepts(_ features: FeatureBits) -> Bool { true }

  package func configurationWritten(offset: Int, bytes: [UInt8]) {}

  package var untilStopped: @Sendable () -> Void {
    { [isOver] in
      isOver.wait()
      // A latch lets one waiter through: others may ask too.
      isOver.open()
    }
  }

  /// The driver resets the device, or another begins with it; what it had written is void. Overridden where something is.
  package func forgetDriver() {}

  package func activate(
    features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool
  ) {
    negotiated = features
    self.signals.withLock { $0 = signals }
    var live: [Int: [LiveQueue]] = [:]
    for (index, layout) in layouts.enumerated() {
      guard let layout, let route = route(of: index) else { continue }
      live[route.worker, default: []].append(
        LiveQueue(number: route.queue, layout: layout, signals: signals.signals(of: index)))
    }
    for (worker, queues) in live { workers[worker].activate(queues, features: features, adopts: adopts) }
  }

  /// Where a queue of the device is served; overridden where that depends on what was negotiated.
  package func route(of queue: Int) -> Route? { routes.indices.contains(queue) ? routes[queue] : nil }

  package func resetQueue(_ queue: Int) {
    guard let route = route(of: queue) else { return }
    let worker = workers[route.worker]
    worker.thread.perform { worker.deactivate(route.queue) }
  }

  package func enableQueue(_ queue: Int, layout: QueueLayout) {
    guard let route = route(of: queue), let signals = signals.withLock({ $0 }) else { return }
    let live = LiveQueue(number: route.queue, layout: layout, signals: signals.signals(of: queue))
    workers[route.worker].activate([live], features: negotiated, adopts: false)
  }

  package func notify(queue: Int) {
    guard let route = route(of: queue) else { return }
    workers[route.worker].notify(route.queue)
  }

  package func reset() {
    signals.withLock { $0 = nil }
    negotiated = []
    // All at once, then a wait for each: the longest alone counts.
    let latches = workers.map { worker in
      let latch = Latch()
      worker.thread.loop.enqueue {
        worker.deactivate()
        latch.open()
      }
      return latch
    }
    for latch in latches { latch.wait() }
    // Last: nothing that the driver asked for is under way any more.
    forgetDriver()
  }

  /// Tells the driver that the configuration space has changed.
  package func announceConfiguration() { signals.withLock { $0 }?.interruptForConfiguration() }

  // MARK: For operators

  /// Tries what an error of the storage holds up again; overridden where something can be held.
  package func resume() {}

  /// Changes something while the device is served; overridden where something can be changed.
  ///
  /// - Parameter completion: called on any thread, once.
  package func adjust(_ adjustment: Adjustment, completion: @escaping @Sendable (Adjustment.Outcome) -> Void) {
    completion(.failed("devices of this type do not support this change"))
  }

  /// Limits of the device, for requests from now on.
  package func set(limits: RateLimits) {
    rate.set(limits)
    limitsChanged()
  }

  /// Limits of the device or of a node above it have changed: what waits may go earlier.
  package func limitsChanged() { for worker in workers { worker.refresh() } }

  // MARK: End

  /// The device ends for good: what outlives its backends is to go with this one. Called once it has stopped, on one of its threads, which
  /// may wait for other programs. Overridden where there is such a thing.
  package func retire() {}

  /// Ends the device: nothing touches guest memory any more when `completion` runs, and what it works with is closed when this object
  /// goes. Waits, on the device's threads, for what the kernel still works on. The caller joins the threads afterwards.
  package func stop(completion: @escaping @Sendable () -> Void) {
    signals.withLock { $0 = nil }
    // A reset of the driver's waits for the former alone: storage that hangs is not the guest's affair.
    let withdrawn = Countdown(left: workers.count) { [isOver] in isOver.open() }
    let closed = Countdown(left: workers.count, completion)
    for worker in workers {
      worker.thread.loop.enqueue {
        worker.withdraw()
        withdrawn.step()
        worker.close()
        closed.step()
      }
    }
  }
}
