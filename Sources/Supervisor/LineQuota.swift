/// How many lines of a guest go to the daemon's log: the journal has a limit for each service, and drops the daemon's own lines beyond it.
package struct LineQuota: Sendable {
  package enum Verdict: Equatable, Sendable {
    /// It is said; so many before it were not.
    case say(left: Int)
    case drop
  }

  private let lines: Int
  private let period: UInt64
  private var start: UInt64 = 0
  private var count = 0
  private var left = 0

  /// - Parameters:
  ///   - lines: that are said in each period. The default is a tenth of what journald takes of a service.
  ///   - seconds: of a period.
  package init(lines: Int = 1000, seconds: UInt64 = 30) {
    self.lines = lines
    period = seconds &* 1_000_000_000
  }

  /// One more line.
  ///
  /// - Parameter now: monotonic nanoseconds.
  package mutating func next(at now: UInt64) -> Verdict {
    if now &- start >= period {
      start = now
      count = 0
    }
    guard count < lines else {
      left += 1
      return .drop
    }
    count += 1
    defer { left = 0 }
    return .say(left: left)
  }
}
