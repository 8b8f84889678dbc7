/// Whether a queue that ran empty is watched for a moment before its thread sleeps, and for how long.
///
/// A notification costs the guest a trap and both sides a wake-up: far more than a request. So the thread goes on looking for a moment where
/// the driver's rhythm makes it likely that more comes at once. The rhythm is how long the driver took to make the next chain available
/// after the device had nothing left to do; `expected` follows it. Only chains count, whatever else woke the thread: an engine's completion, a
/// timer and a packet from the network say nothing of the driver. One that takes longer than `maximum` is not waited for at all.
///
/// What watching may cost is bounded by `credit`, whatever the driver does. Time that passes earns `share` of itself, `burst` at most; a watch
/// costs its length, and `futilePrice` times that when nothing came, and is not begun without the credit for the latter. So over any time a
/// queue is watched for `share` of it and `burst` at most, and in vain for an eighth of that. Queues that have a thread together divide both the
/// longest watch and the share among them: what the thread does for one keeps it from the others.
///
/// A value that knows no clock: times are monotonic nanoseconds.
package struct IdlePoll {
  /// The longest watch.
  package static let maximum: UInt64 = 100_000
  package static let smallest: UInt64 = 4_000
  /// Of one core that the watching of a queue may take, in hundredths.
  package static let share: UInt64 = 75
  package static let futilePrice: UInt64 = 8
  package static let burst: UInt64 = 100 * maximum
  /// A run that has lasted so long goes on with another one when a watch has found something: memory that the guest gives back, and the other
  /// queues of the thread, wait for the end of a run.
  package static let longestRun: UInt64 = 1_000_000
  /// Looks at a queue between two at the clock, with a pause of the processor behind each.
  package static let looks = 8
  /// The longest time that is taken for a rhythm: one such pause closes the window.
  package static let longest: UInt64 = 5 * maximum

  /// The driver's time to its next chain, smoothed; of a driver of which nothing is known yet it is long.
  package private(set) var expected = Self.longest
  private var credit = Self.burst
  private var earnedUpTo: UInt64 = 0
  /// Since when there is nothing to do; 0 while there is something.
  private var idleSince: UInt64 = 0

  /// The longest watch where the thread has other queues too.
  package let limit: UInt64
  private let sharers: UInt64

  /// - Parameter sharers: queues that the thread serves, this one included.
  package init(sharers: Int = 1) {
    self.sharers = UInt64(max(1, sharers))
    limit = Self.maximum / self.sharers
  }

  /// The device has nothing left to do: no chain waits, and its engine works on none.
  ///
  /// - Returns: how long to watch the queue. 0 when that is not worth it, is not paid for, or was done already: there is one watch between two
  ///   chains.
  package mutating func rests(at now: UInt64) -> UInt64 {
    guard idleSince == 0 else { return 0 }
    idleSince = max(now, 1)
    earn(now)
    guard expected <= limit else { return 0 }
    let window = min(max(expected &* 2, Self.smallest), limit)
    return credit >= window &* Self.futilePrice ? window : 0
  }

  /// A watch has ended.
  ///
  /// - Parameter found: a chain came; `arrives` is to be called too.
  package mutating func watched(from start: UInt64, to end: UInt64, found: Bool) {
    earn(end)
    // It may be longer than the window: when the thread did not run meanwhile.
    let time = min(end > start ? end &- start : 0, Self.burst)
    let price = found ? time : time &* Self.futilePrice
    credit = credit > price ? credit &- price : 0
  }

  /// A chain is there, found by a watch or by a thread that was woken.
  package mutating func arrives(at now: UInt64) {
    guard idleSince != 0 else { return }
    let time = min(now > idleSince ? now &- idleSince : 0, Self.longest)
    idleSince = 0
    expected = (expected &* 3 &+ time) / 4
  }

  /// The device has something to do, or has done something, without a chain having come: an answer is the driver's from here on.
  package mutating func works() { idleSince = 0 }

  private mutating func earn(_ now: UInt64) {
    if earnedUpTo != 0, now > earnedUpTo {
      let passed = min(now &- earnedUpTo, 100 &* Self.burst)
      credit = min(credit &+ passed &* Self.share / (100 &* sharers), Self.burst)
    }
    earnedUpTo = max(now, earnedUpTo)
  }
}
