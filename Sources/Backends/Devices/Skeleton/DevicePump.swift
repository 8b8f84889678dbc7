package import Transport
package import Virtqueue

/// What a device type is to the common skeleton: the data path of some of its virtqueues, on one thread.
///
/// The skeleton (`DeviceWorker` in DeviceHost) owns the thread, the wake-ups, the timer, the channels and the life cycle, and calls this.
/// Queues are numbered from 0 within the pump. Everything here is called on the data thread.
package protocol DevicePump: ~Copyable, SendableMetatype {
  /// Descriptors that wake the pump besides the driver's notifications: an engine's completions, a tap. They stay the same.
  var descriptors: [Int32] { get }
  /// Whether it is told of a descriptor once for each change of it, rather than for as long as it is readable: for a pump that leaves
  /// something there while it waits for the driver. It takes all there is otherwise, or asks to be called again.
  static var listensForEdges: Bool { get }
  /// Whether what the first of `descriptors` tells of may also end the thread's sleep (EINTR) without that being reported.
  var interruptsSleep: Bool { get }
  /// One of `descriptors` is readable; `run` follows.
  mutating func acknowledge(_ descriptor: Int)
  /// The driver's queue goes live.
  mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault)
  /// Ends the queue's present life: from now on none of its memory is touched. What is to survive, for another backend, stays.
  mutating func deactivate(_ queue: Int)
  /// The driver took the queue back: nothing of it is to survive. Behind `deactivate`.
  mutating func end(_ queue: Int)
  /// The driver broke the queue: only a reset helps. Behind `deactivate`.
  mutating func markBroken(_ queue: Int)
  /// Serves the queues: after a notification, a readable descriptor, an outcome of `more`, or when `nextTime` has come.
  ///
  /// - Parameters:
  ///   - signals: of each queue.
  ///   - budget: what it may do; it is run again when that is spent.
  mutating func run(
    _ signals: borrowing [any TransportSignals], _ budget: inout RunBudget
  ) throws(DeviceFault) -> PumpOutcome
  /// When `run` has something to do without being woken, in monotonic nanoseconds; 0 for never.
  var nextTime: UInt64 { get }
  /// What there is to say besides faults; asked after each `run` until it is nil.
  mutating func takeReport() -> PumpReport?
  /// The end; waits for what the host still works on. Nothing else is called afterwards.
  mutating func close()
}

/// What `run` asks of its caller.
package enum PumpOutcome {
  /// Nothing to do until the next notification or readable descriptor.
  case idle
  /// There is more to do than one run does: run again soon.
  case more
}

/// What a pump has to say.
package enum PumpReport: Equatable, Sendable {
  /// It is held by an error of its store (a negated errno), or goes on (0).
  case held(Int)
  /// What it works with is gone for good (a negated errno): it has to be stopped, and only another backend helps.
  case gone(Int)
}

/// A queue as the transport hands it over.
package struct QueueActivation {
  package var layout: QueueLayout
  package var maximumSize: UInt16
  package var features: FeatureBits
  package var source: any GuestMemorySource
  /// Go on where an earlier backend or process was stopped.
  package var adopts: Bool

  package init(
    layout: QueueLayout, maximumSize: UInt16, features: FeatureBits, source: any GuestMemorySource, adopts: Bool
  ) {
    self.layout = layout
    self.maximumSize = maximumSize
    self.features = features
    self.source = source
    self.adopts = adopts
  }
}

extension DevicePump where Self: ~Copyable {
  package var descriptors: [Int32] { [] }
  package static var listensForEdges: Bool { false }
  package var interruptsSleep: Bool { false }
  package mutating func acknowledge(_ descriptor: Int) {}
  package mutating func end(_ queue: Int) {}
  package mutating func markBroken(_ queue: Int) {}
  package mutating func takeReport() -> PumpReport? { nil }
  package mutating func close() {}

  /// A run without a loop around it.
  package mutating func run(_ signals: borrowing [any TransportSignals]) throws(DeviceFault) -> PumpOutcome {
    var budget = RunBudget()
    let outcome = try run(signals, &budget)
    return budget.isSpent ? .more : outcome
  }

  /// For a pump in an optional.
  package mutating func perform(_ body: (inout Self) -> Void) { body(&self) }
}
