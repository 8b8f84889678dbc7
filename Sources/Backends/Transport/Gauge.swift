import Synchronization

/// A number that changes, for other threads to read whenever they like.
///
/// Invariant: one atomic word and nothing else. It refers to nothing, so who has it can neither keep alive what the number is of, a transport, a pool,
/// a backend, nor call into it. Whoever counts has a gauge, and gives it away to be read.
package final class Gauge: Sendable {
  private let word: Atomic<UInt64>

  package init(_ value: UInt64 = 0) { word = Atomic(value) }

  package var value: UInt64 { word.load(ordering: .relaxed) }

  package func set(_ value: UInt64) { word.store(value, ordering: .relaxed) }

  /// From any thread.
  @inline(__always)
  package func add(_ amount: UInt64) { word.wrappingAdd(amount, ordering: .relaxed) }
}
