import Synchronization

/// A number that changes, and that other threads may read at any time. Several threads may change it; `Counter` is for the numbers of a data path, which
/// one thread counts without a read-modify-write.
///
/// Invariant: one atomic word and nothing else. A gauge refers to nothing, so a reader that has one neither keeps alive what it counts for (a transport, a
/// pool, a backend) nor can call into it.
package final class Gauge: Sendable {
  private let word: Atomic<UInt64>

  package init(_ value: UInt64 = 0) { word = Atomic(value) }

  package var value: UInt64 { word.load(ordering: .relaxed) }

  package func set(_ value: UInt64) { word.store(value, ordering: .relaxed) }

  /// From any thread.
  @inline(__always)
  package func add(_ amount: UInt64) { word.wrappingAdd(amount, ordering: .relaxed) }
}
