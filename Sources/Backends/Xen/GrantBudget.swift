import Synchronization

/// Pages that may be mapped by grants, of all guests together: the domain's maptrack table has so many entries (xen: max_maptrack_frames,
/// 1024 entries of a mapping to a frame).
///
/// A part of them is kept for rings: without its rings a driver cannot connect at all, while everything else can be copied.
package final class GrantBudget: Sendable {
  package let limit: Int
  package let reserve: Int
  fileprivate let used = PageCount()
  fileprivate let reserveUsed = PageCount()

  /// - Parameters:
  ///   - limit: pages; by default half of Xen's default table, since a PV domain takes two entries for each page.
  ///   - reserve: those of them that only rings get; nil for a sixteenth.
  package init(limit: Int = 1 << 17, reserve: Int? = nil) {
    self.limit = limit
    self.reserve = min(limit, reserve ?? limit / 16)
  }
}

/// What one guest may have of the budget, so that no guest takes it all.
package final class GrantShare: Sendable {
  /// Where pages were taken from, to be given back there.
  enum Origin {
    case general
    case reserve
  }

  private let budget: GrantBudget
  /// Pages of the guest at most.
  package let limit: Int
  private let reserveLimit: Int
  private let used = PageCount()
  private let reserveUsed = PageCount()

  /// - Parameter limit: pages; nil for a quarter of the budget. Of the reserve it may have an eighth.
  package init(of budget: GrantBudget, limit: Int? = nil) {
    self.budget = budget
    self.limit = min(budget.limit, limit ?? budget.limit / 4)
    reserveLimit = budget.reserve / 8
  }

  /// - Returns: where the pages are from; nil, with nothing taken, when there are not so many left.
  func take(_ pages: Int, forRings: Bool) -> Origin? {
    if Self.take(pages, (used, limit), (budget.used, budget.limit - budget.reserve)) { return .general }
    guard forRings, Self.take(pages, (reserveUsed, reserveLimit), (budget.reserveUsed, budget.reserve)) else {
      return nil
    }
    return .reserve
  }

  private static func take(_ pages: Int, _ own: (PageCount, Int), _ all: (PageCount, Int)) -> Bool {
    guard own.0.take(pages, limit: own.1) else { return false }
    guard all.0.take(pages, limit: all.1) else {
      own.0.give(pages)
      return false
    }
    return true
  }

  func give(_ pages: Int, to origin: Origin) {
    switch origin {
    case .general:
      used.give(pages)
      budget.used.give(pages)
    case .reserve:
      reserveUsed.give(pages)
      budget.reserveUsed.give(pages)
    }
  }
}

/// A count that never passes its limit, whoever takes at the same moment.
private final class PageCount: Sendable {
  private let value = Atomic<Int>(0)

  func take(_ pages: Int, limit: Int) -> Bool {
    var seen = value.load(ordering: .relaxed)
    while true {
      let (sum, overflow) = seen.addingReportingOverflow(pages)
      guard !overflow, sum <= limit else { return false }
      let (exchanged, now) = value.compareExchange(expected: seen, desired: sum, ordering: .relaxed)
      if exchanged { return true }
      seen = now
    }
  }

  func give(_ pages: Int) { value.wrappingSubtract(pages, ordering: .relaxed) }
}
