import Synchronization
package import Virtqueue

/// What a pool holds and did; pages have 4096 bytes.
package struct PoolStatistics: Equatable, Sendable {
  package var mappedPages = 0
  package var budgetPages = 0
  package var buckets = 0
  /// Pages that a bucket spans but the guest does not back.
  package var holePages = 0
  package var rangePages = 0
  package var misses: UInt64 = 0
  package var evictions: UInt64 = 0
  package var invalidations: UInt64 = 0
  package var mapCalls: UInt64 = 0
  package var unmapCalls: UInt64 = 0

  package init() {}
}

/// One guest's memory as foreign mappings: buckets mapped on first use, evicted least recently used first under a budget, and
/// all withdrawn on an invalidation.
///
/// Mappings are withdrawn in two steps (`MappingLimbo`). An invalidation waits for the second, since it may be answered only when the
/// mappings are gone; an eviction does not. Those between the steps are bounded: batches with many misses end early (`RunBudget`), and
/// where another thread's batch lasts, buckets are mapped beyond the budget rather than evicted, and in the end not at all.
///
/// Unmapping is dear where Xen has to be asked for each page (Arm: a hypercall and a flush of the TLB; the kernel holds the process's memory
/// map meanwhile). So it goes a bucket at a time, without the pool's lock: other guests' threads, and this guest's that miss, wait for one
/// bucket at most.
package final class ForeignMappingPool: GuestMemorySource {
  /// A mapping and its bookkeeping. Lives until it is unmapped.
  private struct Mapping {
    var base: UnsafeMutableRawPointer
    var pages: Int
    /// A bit per page; nil when every page is backed.
    var valid: UnsafeMutablePointer<UInt64>?
    var holes: Int
    var stamp: UnsafeMutablePointer<UInt64>

    var bucket: BucketMapping {
      BucketMapping(base: base, validPages: valid.map { UnsafePointer($0) }, stamp: stamp)
    }
  }

  private struct State: ~Copyable {
    var buckets: [UInt64: Mapping] = [:]
    var ranges: [UInt64: Mapping] = [:]
    var nextRange: UInt64 = 1
    /// Left the pool, still mapped.
    var limbo = MappingLimbo<Mapping>()
    /// Taken out of it, and being unmapped by some thread.
    var unmapping = 0
    var statistics = PoolStatistics()
    var isClosed = false
  }

  package let bucketShift: Int
  package let isStable: Bool
  package let generation = MappingGeneration()
  private let guest: any GuestHandle
  private let budgetBuckets: Int
  /// Mappings that may wait to be withdrawn. Each is an area of the process's memory map, of which all guests share 65530
  /// (vm.max_map_count).
  package static let limboLimit = 2048
  /// What others see of the state, without waiting for a call of the hypervisor, for which it is locked.
  package let gauges = PoolGauges()
  private let state: Mutex<State>

  /// - Parameters:
  ///   - bucketShift: bytes of a bucket as a power of two, 12 to 30.
  ///   - budgetBytes: memory mapped by buckets at most; at least two buckets are allowed. Rings come on top.
  ///   - isStable: see `GuestMemorySource.isStable`; true only in the simulator's benchmarks.
  package init(
    guest: any GuestHandle, bucketShift: Int = 21, budgetBytes: UInt64 = 1 << 30, isStable: Bool = false
  ) {
    self.guest = guest
    self.bucketShift = bucketShift
    self.isStable = isStable
    budgetBuckets = max(2, Int(clamping: budgetBytes >> UInt64(bucketShift)))
    state = Mutex(State())
    update { _ in }
  }

  deinit { close() }

  package var statistics: PoolStatistics { gauges.statistics }

  /// Works on the state, and shows what came of it.
  private func update<Result>(_ body: (inout State) -> Result) -> Result {
    state.withLock { state in
      let result = body(&state)
      state.statistics.buckets = state.buckets.count
      state.statistics.budgetPages = budgetBuckets << (bucketShift - 12)
      gauges.show(state.statistics)
      return result
    }
  }

  // MARK: GuestMemorySource

  package func add(viewer: MemoryViewer) {
    state.withLock { $0.limbo.add(viewer) }
  }

  package func remove(viewer: MemoryViewer) {
    update { state in state.limbo.remove(viewer) }
    reclaimSome()
  }

  package func bucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping {
    try bucket(number, afresh: false)
  }

  package func refreshedBucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping {
    try bucket(number, afresh: true)
  }

  private func bucket(_ number: UInt64, afresh: Bool) throws(GuestMemoryFault) -> BucketMapping {
    reclaimSome()
    let result: Result<BucketMapping, GuestMemoryFault> = update { state in
      guard !state.isClosed else { return .failure(.mappingFailed) }
      state.statistics.misses &+= 1
      generation.clock.wrappingAdd(1, ordering: .relaxed)
      if let known = state.buckets[number] {
        // With the limbo full, a hole stays one until a batch elsewhere has ended.
        if !afresh || known.valid == nil || state.limbo.count >= Self.limboLimit { return .success(known.bucket) }
        withdraw(number, &state)
      }
      if state.buckets.count >= budgetBuckets {
        if state.limbo.count >= Self.limboLimit {
          guard state.buckets.count < budgetBuckets + Self.limboLimit else { return .failure(.mappingFailed) }
        } else if let oldest = state.buckets.min(by: { $0.value.stamp.pointee < $1.value.stamp.pointee }) {
          withdraw(oldest.key, &state)
          state.statistics.evictions &+= 1
        }
      }
      let pages = 1 << (bucketShift - 12)
      guard let mapping = map(first: number << UInt64(bucketShift - 12), pages: pages, &state) else {
        return .failure(.unmapped(address: number << UInt64(bucketShift)))
      }
      mapping.stamp.pointee = generation.clock.load(ordering: .relaxed)
      state.buckets[number] = mapping
      state.statistics.holePages += mapping.holes
      return .success(mapping.bucket)
    }
    return try result.get()
  }

  package func mapRange(address: UInt64, length: Int) throws(GuestMemoryFault) -> RangeMapping {
    let first = address >> 12
    let (end, overflow) = address.addingReportingOverflow(UInt64(max(length, 1) - 1))
    guard !overflow else { throw .addressOverflow }
    let pages = Int(truncatingIfNeeded: (end >> 12) &- first) &+ 1
    reclaimSome()
    let result: Result<RangeMapping, GuestMemoryFault> = update { state in
      guard !state.isClosed else { return .failure(.mappingFailed) }
      guard let mapping = map(first: first, pages: pages, &state) else { return .failure(.unmapped(address: address)) }
      guard mapping.holes == 0 else {
        unmap(mapping, &state)
        return .failure(.unmapped(address: address))
      }
      let identifier = state.nextRange
      state.nextRange &+= 1
      state.ranges[identifier] = mapping
      state.statistics.rangePages += mapping.pages
      return .success(
        RangeMapping(start: mapping.base + Int(truncatingIfNeeded: address & 0xfff), identifier: identifier))
    }
    return try result.get()
  }

  package func unmapRange(_ range: RangeMapping) {
    let taken: Mapping? = update { state in
      // Gone already after an invalidation: then there is nothing to do.
      guard let mapping = state.ranges.removeValue(forKey: range.identifier) else { return nil }
      state.statistics.rangePages -= mapping.pages
      state.unmapping += 1
      return mapping
    }
    if let taken { finish(taken) }
  }

  // MARK: Withdrawal

  /// Drops every mapping and returns when none is left: Xen says that the guest gave pages back.
  ///
  /// Called by the ioreq thread, outside any batch of its own view.
  package func invalidate() { withdrawAll(closing: false) }

  /// Drops every mapping for good: the guest is gone, or its last device is.
  package func close() { withdrawAll(closing: true) }

  private func withdrawAll(closing: Bool) {
    let target: UInt64? = update { state in
      if closing { state.isClosed = true }
      if !closing { state.statistics.invalidations &+= 1 }
      // Linux balloons in batches, with one invalidation each: the empty case must be cheap.
      // One that another thread is unmapping is still there.
      if state.buckets.isEmpty && state.ranges.isEmpty && state.limbo.isEmpty && state.unmapping == 0 { return nil }
      let next = generation.advance()
      generation.invalidations.wrappingAdd(1, ordering: .sequentiallyConsistent)
      for mapping in state.buckets.values { state.limbo.put(mapping, next) }
      for mapping in state.ranges.values { state.limbo.put(mapping, next) }
      state.buckets.removeAll(keepingCapacity: true)
      state.ranges.removeAll(keepingCapacity: true)
      state.statistics.holePages = 0
      state.statistics.rangePages = 0
      return next
    }
    guard let target else { return }
    // The vCPU that gave the pages back waits meanwhile.
    waitForBatches {
      // What others withdraw meanwhile is not waited for.
      while !state.withLock({ $0.limbo.isDone(target) }), reclaimOne() {}
      return state.withLock { $0.limbo.isDone(target) && $0.unmapping == 0 }
    }
  }

  private func withdraw(_ number: UInt64, _ state: inout State) {
    guard let mapping = state.buckets.removeValue(forKey: number) else { return }
    state.statistics.holePages -= mapping.holes
    state.limbo.put(mapping, generation.advance())
  }

  /// Mappings that a miss gives back at most: more than it makes, so that they do not gather.
  private static let reclaimedByMiss = 2

  /// Unmaps a little of what left the pool.
  private func reclaimSome() {
    for _ in 0..<Self.reclaimedByMiss where !reclaimOne() { return }
  }

  /// Unmaps one mapping that left the pool and is used by nobody any more, outside the lock.
  ///
  /// - Returns: false when there is none.
  private func reclaimOne() -> Bool {
    let taken: Mapping? = state.withLock { state in
      let taken = state.limbo.takeUnused(limit: 1).first
      if taken != nil { state.unmapping += 1 }
      return taken
    }
    guard let taken else { return false }
    finish(taken)
    return true
  }

  /// Unmaps what was taken out of the pool, which is counted as being unmapped.
  private func finish(_ mapping: Mapping) {
    guest.unmap(mapping.base, count: mapping.pages)
    update { state in
      state.unmapping -= 1
      note(mapping, &state)
    }
  }

  // MARK: Mapping calls

  private func map(first: UInt64, pages: Int, _ state: inout State) -> Mapping? {
    let frames = UnsafeMutablePointer<UInt64>.allocate(capacity: pages)
    let errors = UnsafeMutablePointer<Int32>.allocate(capacity: pages)
    defer {
      frames.deallocate()
      errors.deallocate()
    }
    for index in 0..<pages {
      frames[index] = first &+ UInt64(index)
      errors[index] = 0
    }
    state.statistics.mapCalls &+= 1
    guard let base = guest.map(frames: frames, count: pages, errors: errors) else { return nil }
    state.statistics.mappedPages += pages
    let words = (pages + 63) / 64
    let valid = UnsafeMutablePointer<UInt64>.allocate(capacity: words)
    valid.initialize(repeating: 0, count: words)
    var holes = 0
    for index in 0..<pages {
      if errors[index] == 0 { valid[index >> 6] |= 1 << UInt64(index & 63) } else { holes += 1 }
    }
    let stamp = UnsafeMutablePointer<UInt64>.allocate(capacity: 1)
    stamp.initialize(to: 0)
    var mapping = Mapping(base: base, pages: pages, valid: valid, holes: holes, stamp: stamp)
    if holes == 0 {
      valid.deallocate()
      mapping.valid = nil
    }
    if holes == pages {
      unmap(mapping, &state)
      return nil
    }
    return mapping
  }

  /// Of a mapping that nobody has seen.
  private func unmap(_ mapping: Mapping, _ state: inout State) {
    guest.unmap(mapping.base, count: mapping.pages)
    note(mapping, &state)
  }

  /// A mapping is no more.
  private func note(_ mapping: Mapping, _ state: inout State) {
    state.statistics.unmapCalls &+= 1
    state.statistics.mappedPages -= mapping.pages
    mapping.valid?.deallocate()
    mapping.stamp.deallocate()
  }
}
