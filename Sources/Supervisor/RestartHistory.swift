package import Backends

/// A device's restarts, and what to do about one more failure.
package struct RestartHistory: Sendable {
  package enum Verdict: Equatable, Sendable {
    /// Start it again after so many milliseconds.
    case restart(afterMilliseconds: UInt64)
    case quarantine
  }

  private var times: [UInt64] = []
  /// Restarts in all.
  package private(set) var count = 0

  package init() {}

  /// One more failure.
  ///
  /// - Parameters:
  ///   - now: monotonic nanoseconds.
  ///   - random: 0 to 1: the pause is spread over half to one and a half of itself, so that devices which failed together do not come
  ///     back together.
  package mutating func next(_ policy: RestartPolicy, at now: UInt64, random: Double) -> Verdict {
    let window = policy.windowSeconds &* 1_000_000_000
    times.removeAll { now &- $0 > window }
    guard times.count < policy.limit else { return .quarantine }
    let pause = Self.pause(policy, tries: times.count, random: random)
    times.append(now)
    count += 1
    return .restart(afterMilliseconds: pause)
  }

  package static func pause(_ policy: RestartPolicy, tries: Int, random: Double) -> UInt64 {
    let pause = min(policy.firstPause << UInt64(min(tries, 20)), policy.longestPause)
    return UInt64(Double(pause) * (0.5 + min(max(random, 0), 1)))
  }

  /// An operator restarts the device: its budget is whole again.
  package mutating func forgive() { times = [] }

  /// A restart that is no failure's.
  package mutating func noteRestart() { count += 1 }
}
