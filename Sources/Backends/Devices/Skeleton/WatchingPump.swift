import CLinux

/// A pump that watches a queue of its own for a moment once that is empty, see `IdlePoll`.
protocol WatchingPump: DevicePump, ~Copyable {
  var idle: IdlePoll { get set }
  /// When the present run began, in nanoseconds as `clock`.
  var runStart: UInt64 { get }
  /// Time of the batch.
  var now: UInt64 { get set }
  var budget: RunBudget { get set }
  /// The time.
  var clock: UInt64 { get }
  /// Whether the queue has a chain.
  var hasPending: Bool { mutating get }
}

extension WatchingPump where Self: ~Copyable {
  /// Watches the queue, which is empty, where that is worth it.
  ///
  /// - Returns: whether a chain has come.
  mutating func watch() -> Bool {
    let start = clock
    let window = idle.rests(at: start)
    guard window > 0 else { return false }
    repeat {
      for _ in 0..<IdlePoll.looks {
        if hasPending {
          now = clock
          idle.watched(from: start, to: now, found: true)
          idle.arrives(at: now)
          if now &- runStart > IdlePoll.longestRun { budget.spend() }
          return true
        }
        clinux_pause()
      }
      now = clock
    } while now &- start < window
    idle.watched(from: start, to: now, found: false)
    return false
  }
}
