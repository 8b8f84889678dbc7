import Synchronization

/// A count that several threads take from, never beyond a limit.
final class SharedCount: Sendable {
  private let count = Atomic<Int>(0)

  var value: Int { count.load(ordering: .relaxed) }

  /// - Returns: false, with nothing changed, when the sum would be above the limit.
  func add(_ amount: Int, upTo limit: Int) -> Bool {
    var seen = count.load(ordering: .relaxed)
    while true {
      let (sum, overflow) = seen.addingReportingOverflow(amount)
      guard !overflow, sum <= limit else { return false }
      let (exchanged, now) = count.compareExchange(expected: seen, desired: sum, ordering: .relaxed)
      if exchanged { return true }
      seen = now
    }
  }

  func subtract(_ amount: Int) { count.wrappingSubtract(amount, ordering: .relaxed) }
}
