/// A device's restarts, and what to do about one more failure.
package struct RestartBudget: Hashable, Sendable {
  package enum Verdict: Equatable, Sendable {
    /// Start it again after so many milliseconds.
    case restart(after: Milliseconds)
    case quarantine
  }

  private var times: [UInt64] = []
  /// Restarts in all.
  package internal(set) var count = 0

  package init() {}

  /// One more failure.
  ///
  /// - Parameter limit: failures within the policy's window; the policy's own limit by default.
  package mutating func next(_ policy: RestartPolicy, limit: Int? = nil, at now: Moment) -> Verdict {
    let window = policy.windowSeconds &* 1_000_000_000
    times.removeAll { now.nanoseconds &- $0 > window }
    guard times.count < limit ?? policy.limit else { return .quarantine }
    let pause = Self.pause(policy, tries: times.count, at: now)
    times.append(now.nanoseconds)
    count += 1
    return .restart(after: pause)
  }

  /// The pause before a try: the policy's first, doubled with each try before it up to the longest, times 0.5 to 1.5 by chance.
  package static func pause(_ policy: RestartPolicy, tries: Int, at now: Moment) -> Milliseconds {
    let doublings = min(max(tries, 0), 20)
    let longest = min(policy.longestPause, 1 << 40)
    let pause = min(min(policy.firstPause, 1 << 40) << UInt64(doublings), longest)
    return UInt64(Double(pause) * (0.5 + min(max(now.chance, 0), 1)))
  }

  /// An operator restarts the device: its budget is whole again.
  package mutating func forgive() { times = [] }

  /// A restart that no failure caused.
  package mutating func noteRestart() { count += 1 }
}
