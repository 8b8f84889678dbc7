package import Devices
package import EventLoop
import Synchronization
package import Transport
package import Virtqueue

/// A share of a device: some of its virtqueues, the pump that serves them, and the thread on which all that happens. What every device
/// type has in common lies here: wake-ups, channels, the timer, the life of queues, faults.
package final class DeviceWorker<Pump: DevicePump & ~Copyable>: AnyDeviceWorker, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the properties below "data thread" are touched by the thread's loop only; all others
  // are immutable or made for sharing.

  package let thread: LoopThread
  private let index: Int
  private let queues: [Queue]
  private let source: any GuestMemorySource
  private let report: @Sendable (DeviceReport) -> Void
  private let kick: EventDescriptor
  /// Set while a kick is on its way: more of them cost no system call.
  private let kicked = Atomic<Bool>(false)

  // Data thread
  private var pump: Pump?
  private var signals: [any TransportSignals]
  private var tokens: [EventLoop.Token] = []
  /// Listens to the own channel of each queue that is live and has one.
  private var doorbells: [(token: EventLoop.Token, bell: any QueueDoorbell)?]
  /// Those that have rung since the thread slept last, which tell of nothing more until they are rearmed.
  private var rung: [any QueueDoorbell] = []
  private var timer: UInt64 = 0
  private var timerTime: UInt64 = 0

  /// One of the worker's queues.
  package struct Queue: Sendable {
    package var maximumSize: UInt16
    package var counters: QueueCounters

    package init(maximumSize: UInt16, counters: QueueCounters) {
      self.maximumSize = maximumSize
      self.counters = counters
    }
  }

  /// Made before the worker's thread serves anything of it, or on that thread.
  ///
  /// - Parameter index: of the worker in its device.
  package init(
    _ pump: consuming Pump, index: Int, queues: [Queue], thread: LoopThread, source: any GuestMemorySource,
    report: @escaping @Sendable (DeviceReport) -> Void
  ) throws(Errno) {
    kick = try EventDescriptor()
    self.index = index
    self.queues = queues
    self.thread = thread
    self.source = source
    self.report = report
    signals = queues.map { _ in NullSignals.shared }
    doorbells = queues.map { _ in nil }
    self.pump = consume pump
  }

  package func open() throws(Errno) {
    tokens.append(
      try thread.loop.onReadable(kick.raw) { [unowned self] in
        kick.drain()
        // Not a mere store, which could become visible behind the look at the rings: a driver that still finds it set would have its
        // buffers overlooked. An exchange sees what was written before each wake-up that it takes in.
        _ = kicked.exchange(false, ordering: .acquiringAndReleasing)
        run()
      })
    for (index, descriptor) in (pump?.descriptors ?? []).enumerated() {
      let action = { [unowned self] in
        pump?.acknowledge(index)
        run()
      }
      let interrupts = index == 0 && pump?.interruptsSleep ?? false
      tokens.append(
        Pump.listensForEdges
          ? try thread.loop.onEdge(descriptor, action)
          : try thread.loop.onReadable(descriptor, alsoInterrupted: interrupts, action))
    }
  }

  // MARK: From the backend, on any thread

  package func notify(_ queue: Int) {
    queues[queue].counters.notifications.add(1)
    wake()
  }

  private func wake() {
    if !kicked.exchange(true, ordering: .acquiringAndReleasing) { kick.signal() }
  }

  package func activate(_ live: [LiveQueue], features: FeatureBits, adopts: Bool) {
    thread.loop.enqueue { [self] in
      do throws(DeviceFault) {
        for queue in live {
          signals[queue.number] = queue.signals
          listen(queue.number, to: queue.signals.doorbell)
          try pump?.activate(
            queue.number,
            QueueActivation(
              layout: queue.layout, maximumSize: queues[queue.number].maximumSize, features: features, source: source,
              adopts: adopts))
        }
      } catch {
        return fail(error)
      }
      // What was notified before the queues were live, or before this daemon was, must not be lost.
      run()
      for queue in live { queue.signals.interruptForUsedBuffers() }
    }
  }

  package func refresh() { thread.loop.enqueue { [self] in run() } }

  /// Changes something of the pump on its thread.
  ///
  /// - Parameter runs: whether the queues are to be looked at afterwards.
  package func change(runs: Bool = false, _ body: @escaping @Sendable (inout Pump) -> Void) {
    thread.loop.enqueue { [self] in
      pump?.perform(body)
      // Said before the next run, which may lead to the same state again.
      sayReports()
      if runs { run() }
    }
  }

  // MARK: Data thread

  private func listen(_ queue: Int, to doorbell: (any QueueDoorbell)?) {
    if let old = doorbells[queue] {
      thread.loop.remove(old.token)
      // Whoever listens next rearms it.
      rung.removeAll { $0 === old.bell }
    }
    doorbells[queue] = nil
    guard let doorbell else { return }
    let counters = queues[queue].counters
    do throws(Errno) {
      let token = try thread.loop.onReadable(doorbell.descriptor) { [unowned self] in
        doorbell.acknowledge()
        rung.append(doorbell)
        counters.notifications.add(1)
        run()
      }
      doorbells[queue] = (token, doorbell)
      // Whoever listened before may have read an event and not have come to rearm: the channel outlives backends.
      doorbell.rearm()
    } catch {
      fail(.memory)
    }
  }

  package func deactivate(_ queue: Int) {
    listen(queue, to: nil)
    pump?.deactivate(queue)
    pump?.end(queue)
    signals[queue] = NullSignals.shared
    sayReports()
  }

  package func deactivate() { for queue in queues.indices { deactivate(queue) } }

  private func run() {
    do throws(DeviceFault) {
      var budget = RunBudget(interruption: thread.loop.interruption)
      let outcome = try pump?.run(signals, &budget)
      // By the descriptor, which stands in a row with the thread's other ones, and jobs behind them.
      if budget.isSpent || outcome == .more { wake() } else { rearm() }
    } catch {
      fail(error)
    }
    sayReports()
    scheduleTimer()
  }

  /// The pump has nothing left to do: a system call for each channel that rang, which it would otherwise cost for each event.
  private func rearm() {
    guard !rung.isEmpty else { return }
    for bell in rung { bell.rearm() }
    rung.removeAll(keepingCapacity: true)
  }

  /// Ends all queues for now; what they hold is for another backend.
  private func rest() {
    for queue in queues.indices {
      listen(queue, to: nil)
      pump?.deactivate(queue)
    }
  }

  private func fail(_ fault: DeviceFault) {
    // A channel of its own stays masked: events of a broken queue cost nothing more.
    rest()
    for queue in queues.indices {
      pump?.markBroken(queue)
      signals[queue].needReset()
      signals[queue] = NullSignals.shared
    }
    report(.fault(fault))
  }

  private func sayReports() {
    while let said = pump?.takeReport() {
      switch said {
      case .held(0): report(.resumed(queue: index))
      case .held(let result): report(.held(queue: index, result))
      case .gone(let result):
        rest()
        signals = queues.map { _ in NullSignals.shared }
        return report(.storageGone(result))
      }
    }
  }

  private func scheduleTimer() {
    guard let time = pump?.nextTime, time != 0 else { return }
    if timer != 0 {
      guard time < timerTime else { return }
      thread.loop.cancel(timer: timer)
    }
    let now = EventLoop.now()
    let pause = time > now ? (time &- now) / 1_000_000 &+ 1 : 0
    timerTime = time
    timer = thread.loop.schedule(afterMilliseconds: pause) { [weak self] in
      self?.timer = 0
      self?.run()
    }
  }

  package func withdraw() {
    rest()
    signals = queues.map { _ in NullSignals.shared }
  }

  package func close() {
    withdraw()
    pump?.close()
    pump = nil
    if timer != 0 { thread.loop.cancel(timer: timer) }
    for token in tokens { thread.loop.remove(token) }
    tokens = []
  }
}

/// A queue of a worker that goes live.
package struct LiveQueue: Sendable {
  /// Within the worker.
  package var number: Int
  package var layout: QueueLayout
  package var signals: any TransportSignals

  package init(number: Int, layout: QueueLayout, signals: any TransportSignals) {
    self.number = number
    self.layout = layout
    self.signals = signals
  }
}

/// A worker, whatever its pump is.
package protocol AnyDeviceWorker: AnyObject, Sendable {
  var thread: LoopThread { get }
  /// Starts to listen; on the data thread.
  func open() throws(Errno)
  /// The driver notified a queue. On any thread.
  func notify(_ queue: Int)
  /// The driver's queues go live, all of them before any is served: what is said on one may concern another. On any thread.
  func activate(_ live: [LiveQueue], features: FeatureBits, adopts: Bool)
  /// Looks at the queues again: limits have changed. On any thread.
  func refresh()
  /// Takes a queue, or all, from the guest. On the data thread.
  func deactivate(_ queue: Int)
  func deactivate()
  /// Leaves the guest alone: nothing writes to its memory or tells it of anything any more. On the data thread, which waits for what the
  /// host moves into or out of that memory itself.
  func withdraw()
  /// Ends the worker; on the data thread, which waits for all that the host still works on.
  func close()
}

/// For queues that no driver has: nobody is to be told.
private final class NullSignals: TransportSignals {
  static let shared = NullSignals()
  func interruptForUsedBuffers() {}
  func interruptForConfiguration() {}
  func needReset() {}
}
