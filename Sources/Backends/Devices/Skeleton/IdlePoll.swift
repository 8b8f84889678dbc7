/// How long a queue is watched for more before its thread sleeps.
///
/// A notification costs the guest a trap and both sides a wake-up: far more than a request. So the thread goes on looking for a
/// moment, but only where that has lately been worth it: when work came sooner than `maximum` after the thread went to sleep,
/// the window opens, and doubles up to `maximum`; when the thread slept longer, it closes. An idle device so polls not at all,
/// and a busy one at most `maximum` for each time that its queue runs empty.
struct IdlePoll {
  /// Nanoseconds.
  static let maximum: UInt64 = 32_000
  private static let smallest: UInt64 = 4_000

  private(set) var window: UInt64 = 0
  private var sleepingSince: UInt64 = 0

  /// The thread goes to sleep.
  mutating func sleeps(at now: UInt64) { sleepingSince = now }

  /// The thread was woken.
  mutating func wakes(at now: UInt64) {
    guard sleepingSince != 0 else { return }
    if now &- sleepingSince < Self.maximum {
      window = min(max(window &* 2, Self.smallest), Self.maximum)
    } else {
      window = 0
    }
    sleepingSince = 0
  }
}
