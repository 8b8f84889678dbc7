package import Transport

/// What a pool holds and did, for other threads to read while it works; pages have 4096 bytes. Each number for itself: they are not of one moment.
///
/// Invariant: gauges alone. It refers to no pool, so who reads a pool's numbers cannot keep its mappings.
package final class PoolGauges: Sendable {
  package let mappedPages = Gauge()
  package let budgetPages = Gauge()
  package let buckets = Gauge()
  package let holePages = Gauge()
  package let rangePages = Gauge()
  package let misses = Gauge()
  package let evictions = Gauge()
  package let invalidations = Gauge()
  package let mapCalls = Gauge()
  package let unmapCalls = Gauge()

  /// Shows what a pool holds now. Under the pool's lock.
  func show(_ statistics: borrowing PoolStatistics) {
    mappedPages.set(UInt64(clamping: statistics.mappedPages))
    budgetPages.set(UInt64(clamping: statistics.budgetPages))
    buckets.set(UInt64(clamping: statistics.buckets))
    holePages.set(UInt64(clamping: statistics.holePages))
    rangePages.set(UInt64(clamping: statistics.rangePages))
    misses.set(statistics.misses)
    evictions.set(statistics.evictions)
    invalidations.set(statistics.invalidations)
    mapCalls.set(statistics.mapCalls)
    unmapCalls.set(statistics.unmapCalls)
  }

  package var statistics: PoolStatistics {
    var statistics = PoolStatistics()
    statistics.mappedPages = Int(clamping: mappedPages.value)
    statistics.budgetPages = Int(clamping: budgetPages.value)
    statistics.buckets = Int(clamping: buckets.value)
    statistics.holePages = Int(clamping: holePages.value)
    statistics.rangePages = Int(clamping: rangePages.value)
    statistics.misses = misses.value
    statistics.evictions = evictions.value
    statistics.invalidations = invalidations.value
    statistics.mapCalls = mapCalls.value
    statistics.unmapCalls = unmapCalls.value
    return statistics
  }
}

/// What a pool of granted pages shows of itself.
package struct GrantGauges: Sendable {
  package let pages = PoolGauges()
  /// How the guest's memory is reached: the place of a `GrantPool.Mode` among all.
  package let mode = Gauge()
  /// Bytes that were copied by grant copy, because there was no room to map their pages.
  package let copiedBytes = Gauge()
}
