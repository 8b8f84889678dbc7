import Devices
import EventLoop
import Synchronization
import Transport
import Virtqueue

/// One virtqueue of a block backend with its engine, on one of the backend's data threads.
final class BlockQueue: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the properties below "data thread" are touched by the thread's loop only; all others
  // are immutable or made for sharing.

  /// What a queue tells its backend, from its data thread.
  struct Reports: Sendable {
    var fault: @Sendable (DeviceFault) -> Void
    /// The queue is held by an error (a negated errno), or goes on (0).
    var held: @Sendable (_ result: Int) -> Void
    /// The store is gone for good (a negated errno): the queue has stopped.
    var gone: @Sendable (_ result: Int) -> Void
  }

  let counters: BlockCounters
  let latencies: QueueLatencies
  let thread: LoopThread
  private let source: any GuestMemorySource
  private let maximumSize: UInt16
  private let reports: Reports
  private let kick: EventDescriptor
  /// Set while a kick is on its way: more of them cost no system call.
  private let kicked = Atomic<Bool>(false)

  // Data thread
  private let engine: any BlockEngine
  private var pump: BlockPump?
  private var signals: (any TransportSignals)?
  private var tokens: [EventLoop.Token] = []
  /// Listens to the queue's own channel while the queue is live.
  private var doorbellToken: EventLoop.Token?
  private var retryTimer: UInt64 = 0
  private var retryTime: UInt64 = 0
  private let journal: QueueJournal
  private var reportedHold = 0

  /// Made before the queue's thread serves anything of it, or on that thread.
  init(
    engine: any BlockEngine, settings: BlockSettings, thread: LoopThread, source: any GuestMemorySource,
    writeback: WritebackSwitch, storage: JournalStorage, rate: RateNode, account: QueueAccount, reports: Reports
  ) throws(Errno) {
    journal = storage.journal
    counters = account.counters
    latencies = account.latencies
    self.engine = engine
    self.thread = thread
    self.source = source
    self.reports = reports
    maximumSize = settings.queueSize
    kick = try EventDescriptor()
    // The layout of the idle queue is one that `validate` accepts.
    pump = try? BlockPump(
      engine: engine, source: source, counters: counters, settings: settings.pump, writeback: writeback,
      storage: storage, rate: rate, latencies: latencies)
  }

  /// Starts to listen; on the data thread.
  func open() throws(Errno) {
    tokens.append(
      try thread.loop.onReadable(kick.raw) { [unowned self] in
        kick.drain()
        kicked.store(false, ordering: .releasing)
        run()
      })
    tokens.append(
      try thread.loop.onReadable(engine.readiness) { [unowned self] in
        engine.acknowledgeReadiness()
        run()
      })
  }

  // MARK: From the backend, on any thread

  func wake() {
    if !kicked.exchange(true, ordering: .acquiringAndReleasing) { kick.signal() }
  }

  func activate(_ layout: QueueLayout, features: FeatureBits, signals: any TransportSignals, adopts: Bool = false) {
    thread.loop.enqueue { [self] in
      self.signals = signals
      listen(to: signals.doorbell)
      do throws(DeviceFault) {
        try pump?.activate(
          layout: layout, maximumSize: maximumSize, features: features, source: source, adopts: adopts)
      } catch {
        return fail(error)
      }
      // What was notified before the queue was live, or before this daemon was, must not be lost.
      run()
      signals.interruptForUsedBuffers()
    }
  }

  func set(capacity: UInt64, then done: @escaping @Sendable () -> Void) {
    thread.loop.enqueue { [self] in
      pump?.set(capacity: capacity)
      done()
    }
  }

  func resume() {
    thread.loop.enqueue { [self] in
      pump?.resume()
      // Said before the next try, which may end in another hold.
      reportHold()
      run()
    }
  }

  // MARK: Data thread

  private func listen(to doorbell: (any QueueDoorbell)?) {
    if let doorbellToken { thread.loop.remove(doorbellToken) }
    doorbellToken = nil
    guard let doorbell else { return }
    do throws(Errno) {
      doorbellToken = try thread.loop.onReadable(doorbell.descriptor) { [unowned self] in
        doorbell.acknowledge()
        counters.notifications.add(1)
        run()
      }
    } catch {
      fail(.memory)
    }
  }

  /// Takes the queue from the guest; on the data thread.
  func deactivate() {
    listen(to: nil)
    pump?.deactivate()
    journal.end()
    signals = nil
    reportHold()
  }

  /// Looks at the queue again: its limits have changed.
  func refresh() { thread.loop.enqueue { [self] in run() } }

  private func run() {
    do throws(DeviceFault) {
      if case .more? = try pump?.run(signals: signals ?? Self.silence) { wake() }
    } catch {
      fail(error)
    }
    if let gone = pump?.goneResult, gone != 0 {
      // What was under way stays in the journal for the next backend.
      listen(to: nil)
      pump?.deactivate()
      pump?.goneResult = 0
      signals = nil
      return reports.gone(gone)
    }
    reportHold()
    scheduleRetry()
  }

  private func fail(_ fault: DeviceFault) {
    // A channel of its own stays masked: events of a broken queue cost nothing more.
    listen(to: nil)
    pump?.deactivate()
    journal.markBroken()
    signals?.needReset()
    signals = nil
    reports.fault(fault)
  }

  private func reportHold() {
    let held = pump?.heldResult ?? 0
    guard held != reportedHold else { return }
    reportedHold = held
    reports.held(held)
  }

  private func scheduleRetry() {
    guard let time = pump?.nextTime, time != 0 else { return }
    if retryTimer != 0 {
      guard time < retryTime else { return }
      thread.loop.cancel(timer: retryTimer)
    }
    let now = engine.now
    let pause = time > now ? (time &- now) / 1_000_000 &+ 1 : 0
    retryTime = time
    retryTimer = thread.loop.schedule(afterMilliseconds: pause) { [weak self] in
      self?.retryTimer = 0
      self?.run()
    }
  }

  /// For completions that come while no driver is there: nobody is to be told.
  private final class Silence: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  private static let silence = Silence()

  /// Ends the queue; on the data thread, which waits for what the store still works on.
  func close() {
    listen(to: nil)
    signals = nil
    pump?.deactivate()
    engine.abandon()
    pump?.drain()
    pump = nil
    engine.close()
    if retryTimer != 0 { thread.loop.cancel(timer: retryTimer) }
    for token in tokens { thread.loop.remove(token) }
    tokens = []
  }
}
