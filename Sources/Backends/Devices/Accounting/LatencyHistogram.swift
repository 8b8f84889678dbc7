import Synchronization

/// Durations counted in buckets that grow with them: sixteen to each doubling, so a quantile is right to 1/16, from 128 ns up to
/// 18 minutes (as HdrHistogram does it). Written by one thread, read by any; two can be added.
package struct LatencyHistogram: Sendable {
  package static let bucketCount = 496
  /// Bytes of memory: the buckets, and the sum of what was recorded.
  package static let bytes = (bucketCount + 1) * 8

  // Invariant behind the unchecked pointer: every word is atomic; the owner of the memory outlives the value.
  private nonisolated(unsafe) let words: UnsafeMutablePointer<Atomic<UInt64>>

  /// - Parameter memory: `bytes` long, zero at first.
  init(memory: UnsafeMutableRawPointer) {
    words = memory.bindMemory(to: Atomic<UInt64>.self, capacity: Self.bucketCount + 1)
  }

  /// The bucket of a duration in nanoseconds.
  @inline(__always)
  package static func bucket(_ nanoseconds: UInt64) -> Int {
    let unit = nanoseconds >> 7
    guard unit >= 16 else { return Int(truncatingIfNeeded: unit) }
    let exponent = 63 &- unit.leadingZeroBitCount
    guard exponent <= 33 else { return bucketCount &- 1 }
    return (exponent &- 3) &* 16 &+ Int(truncatingIfNeeded: (unit >> UInt64(exponent &- 4)) & 15)
  }

  /// The first duration in nanoseconds that lies beyond a bucket.
  package static func end(of bucket: Int) -> UInt64 {
    guard bucket >= 16 else { return UInt64(bucket + 1) << 7 }
    let exponent = UInt64(bucket / 16 + 3)
    return UInt64(16 + bucket % 16 + 1) << (exponent - 4 + 7)
  }

  /// Only the owner thread may call it.
  @inline(__always)
  func record(_ nanoseconds: UInt64) { record(nanoseconds, in: Self.bucket(nanoseconds)) }

  /// - Parameter bucket: that of the duration.
  @inline(__always)
  func record(_ nanoseconds: UInt64, in bucket: Int) {
    add(bucket, 1)
    add(Self.bucketCount, nanoseconds)
  }

  @inline(__always)
  private func add(_ index: Int, _ amount: UInt64) {
    let word = words + index
    word.pointee.store(word.pointee.load(ordering: .relaxed) &+ amount, ordering: .relaxed)
  }

  /// What was counted so far.
  package var counts: LatencyCounts {
    var counts = LatencyCounts()
    for index in 0..<Self.bucketCount { counts.buckets[index] = words[index].load(ordering: .relaxed) }
    counts.sum = words[Self.bucketCount].load(ordering: .relaxed)
    return counts
  }
}

/// The contents of histograms, added up.
package struct LatencyCounts: Equatable, Sendable {
  package fileprivate(set) var buckets = [UInt64](repeating: 0, count: LatencyHistogram.bucketCount)
  /// Nanoseconds of all durations together.
  package fileprivate(set) var sum: UInt64 = 0

  package init() {}

  package var count: UInt64 { buckets.reduce(0, &+) }

  package static func += (left: inout LatencyCounts, right: LatencyCounts) {
    for index in left.buckets.indices { left.buckets[index] &+= right.buckets[index] }
    left.sum &+= right.sum
  }

  /// The duration in nanoseconds that a share of all is below, to 1/16; 0 when there is none.
  ///
  /// - Parameter share: 0 to 1; 0.5 is the median.
  package func quantile(_ share: Double) -> UInt64 {
    let all = count
    guard all > 0 else { return 0 }
    let wanted = max(1, UInt64((Double(all) * min(max(share, 0), 1)).rounded(.up)))
    var seen: UInt64 = 0
    for (index, number) in buckets.enumerated() {
      seen &+= number
      if seen >= wanted { return LatencyHistogram.end(of: index) }
    }
    return LatencyHistogram.end(of: buckets.count - 1)
  }

  /// How many lie below a limit, which is the end of a bucket.
  package func below(_ nanoseconds: UInt64) -> UInt64 {
    var sum: UInt64 = 0
    for (index, number) in buckets.enumerated() where LatencyHistogram.end(of: index) <= nanoseconds { sum &+= number }
    return sum
  }
}

/// The histograms of one queue.
package final class QueueLatencies: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `addresses` never changes, and all words are atomic.

  package enum Operation: Int, CaseIterable, Sendable {
    case read, write, flush, other
  }

  /// Where a request spends its time.
  package enum Stage: Int, CaseIterable, Sendable {
    /// Waits for its share of a limited rate.
    case throttle
    /// Waits in the device, for memory or for another try: requests that did not wait are not counted.
    case queue
    /// The store has it.
    case engine
    /// From the taking of its chain to its answer.
    case total
  }

  /// Addresses of the histograms; 0 until something is recorded: 4 KiB each, and most queues see reads and writes alone.
  private let addresses: UnsafeMutablePointer<Atomic<UInt>>
  private static let count = Operation.allCases.count * Stage.allCases.count

  package init() {
    addresses = .allocate(capacity: Self.count)
    for index in 0..<Self.count { (addresses + index).initialize(to: Atomic(0)) }
  }

  deinit {
    for index in 0..<Self.count { address(index)?.deallocate() }
    addresses.deinitialize(count: Self.count)
    addresses.deallocate()
  }

  private func address(_ index: Int) -> UnsafeMutableRawPointer? {
    UnsafeMutableRawPointer(bitPattern: addresses[index].load(ordering: .acquiring))
  }

  /// Records a duration in nanoseconds. Only the owner thread may call it.
  @inline(__always)
  func record(_ operation: Operation, _ stage: Stage, _ nanoseconds: UInt64) {
    histogram(operation, stage).record(nanoseconds)
  }

  /// Records the two durations that every request has. They are the same when it did not have to wait, and their bucket is looked for once.
  @inline(__always)
  func record(_ operation: Operation, engine: UInt64, total: UInt64) {
    let bucket = LatencyHistogram.bucket(engine)
    histogram(operation, .engine).record(engine, in: bucket)
    histogram(operation, .total).record(total, in: engine == total ? bucket : LatencyHistogram.bucket(total))
  }

  @inline(__always)
  private func histogram(_ operation: Operation, _ stage: Stage) -> LatencyHistogram {
    let index = operation.rawValue &* Stage.allCases.count &+ stage.rawValue
    return LatencyHistogram(memory: address(index) ?? make(index))
  }

  @inline(never)
  private func make(_ index: Int) -> UnsafeMutableRawPointer {
    let memory = UnsafeMutableRawPointer.allocate(byteCount: LatencyHistogram.bytes, alignment: 64)
    memory.initializeMemory(as: UInt64.self, repeating: 0, count: LatencyHistogram.bytes / 8)
    addresses[index].store(UInt(bitPattern: memory), ordering: .releasing)
    return memory
  }

  /// What was recorded so far.
  package func counts(_ operation: Operation, _ stage: Stage) -> LatencyCounts {
    let index = operation.rawValue &* Stage.allCases.count &+ stage.rawValue
    return address(index).map { LatencyHistogram(memory: $0).counts } ?? LatencyCounts()
  }
}
