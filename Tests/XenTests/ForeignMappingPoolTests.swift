import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Virtqueue
import Xen

@Suite struct ForeignMappingPoolTests {
  private let domain: SimulatedDomain
  private let pool: ForeignMappingPool

  init() throws {
    domain = try SimulatedDomain(identifier: 3, memoryBytes: 1 << 20)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    // Buckets of 16 KiB, four of them at most.
    pool = ForeignMappingPool(guest: try hypervisor.open(3), bucketShift: 14, budgetBytes: 4 << 14)
  }

  @Test func hitsNeedNoCall() throws {
    var view = GuestMemoryView(source: pool)
    for _ in 0..<1000 {
      _ = view.enter()
      _ = try view.translate(0x4000, 4096)
      view.leave()
    }
    #expect(pool.statistics.mapCalls == 1)
    let hits = view.hits
    #expect(hits == 999)
  }

  @Test func leastRecentlyUsedBucketGoesFirst() throws {
    var view = GuestMemoryView(source: pool)
    func touch(_ bucket: UInt64) throws {
      _ = view.enter()
      _ = try view.translate(bucket << 14, 16)
      view.leave()
    }
    for bucket: UInt64 in 0..<4 { try touch(bucket) }
    try touch(0)
    try touch(4)  // evicts 1, the oldest
    let calls = pool.statistics.mapCalls
    try touch(0)
    #expect(pool.statistics.mapCalls == calls)
    try touch(1)
    #expect(pool.statistics.mapCalls == calls + 1)
    #expect(pool.statistics.evictions == 2)
    #expect(pool.statistics.buckets == 4)
  }

  /// Unmapping may be slow (Arm): it goes a bucket at a time, and who needs another bucket meanwhile gets it.
  @Test func slowUnmappingHoldsUpNobodyWhoMisses() throws {
    for bucket: UInt64 in 0..<4 { _ = try pool.bucket(bucket) }
    let (isUnmapping, mayGoOn) = (Latch(), Latch())
    let calls = Atomic<Int>(0)
    domain.beforeUnmapping.withLock {
      $0 = {
        guard calls.wrappingAdd(1, ordering: .relaxed).oldValue == 0 else { return }
        isUnmapping.open()
        mayGoOn.wait()
      }
    }
    let invalidation = try LoopThread(name: "invalidation")
    let isInvalidated = Latch()
    let pool = pool
    invalidation.loop.enqueue {
      pool.invalidate()
      isInvalidated.open()
    }
    isUnmapping.wait()
    let other = try LoopThread(name: "miss")
    let hasMissed = Latch()
    other.loop.enqueue {
      if (try? pool.bucket(5)) != nil { hasMissed.open() }
    }
    #expect(hasMissed.wait(seconds: 20))
    // Whoever gave the pages back is answered when the last one is unmapped, and not before.
    #expect(!isInvalidated.wait(seconds: 0))
    mayGoOn.open()
    #expect(isInvalidated.wait(seconds: 20))
    #expect(pool.statistics.buckets == 1 && pool.statistics.mappedPages == 4 && pool.statistics.unmapCalls == 4)
    #expect(domain.usage.mappings == 1)
    invalidation.stopAndJoin()
    other.stopAndJoin()
    domain.beforeUnmapping.withLock { $0 = nil }
  }

  /// A guest can have its device map pieces of its memory over and over. What one batch does ends with it; what other batches do meanwhile
  /// must not pile up.
  @Test func mappingsThatWaitForALongBatchAreBounded() throws {
    var stuck = GuestMemoryView(source: pool)
    _ = stuck.enter()
    _ = try stuck.translate(0, 16)
    var view = GuestMemoryView(source: pool)
    for round: UInt64 in 0..<UInt64(3 * ForeignMappingPool.limboLimit) {
      _ = view.enter()
      // Eight buckets with room for four: each round evicts.
      _ = try view.translate((round % 8) << 14, 16)
      view.leave()
    }
    let mapped = pool.statistics.mappedPages / 4
    #expect(mapped <= ForeignMappingPool.limboLimit + 8, "\(mapped) buckets are mapped")
    // It is still served, and the budget holds again once the long batch is over.
    stuck.leave()
    _ = view.enter()
    _ = try view.translate(7 << 14, 16)
    view.leave()
    pool.invalidate()
    #expect(pool.statistics.mappedPages == 0)
  }

  @Test func holesAreKnownPageByPage() throws {
    domain.memory.set(pages: 5..<6, present: false)
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    defer { view.leave() }
    let before = try view.translate(0x4000, 0x4000).length
    #expect(before == 0x1000)
    #expect(throws: GuestMemoryFault.unmapped(address: 0x5000)) { _ = try view.translate(0x5000, 1) }
    let behind = try view.translate(0x6000, 0x2000).length
    #expect(behind == 0x2000)
    #expect(pool.statistics.holePages == 1)
  }

  @Test func pageThatComesBackIsFound() throws {
    domain.memory.set(pages: 5..<6, present: false)
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    defer { view.leave() }
    #expect(throws: GuestMemoryFault.self) { _ = try view.translate(0x5000, 1) }
    domain.memory.set(pages: 5..<6, present: true)
    let length = try view.translate(0x5000, 16).length
    #expect(length == 16)
  }

  @Test func copiesCrossBuckets() throws {
    let bytes = (0..<40000).map { UInt8(truncatingIfNeeded: $0 &* 31) }
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    defer { view.leave() }
    try view.copyOut(from: bytes, to: 0x3ffd, count: bytes.count)
    var back = [UInt8](repeating: 0, count: bytes.count)
    try view.copyIn(from: 0x3ffd, to: &back, count: back.count)
    #expect(back == bytes)
    #expect(domain.memory.pointer(0x3ffd).load(as: UInt8.self) == bytes[0])
  }

  @Test func addressesBeyondTheGuestAreUnmapped() {
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    defer { view.leave() }
    for address: UInt64 in [1 << 20, 1 << 40, .max - 4096, .max] {
      #expect(throws: GuestMemoryFault.self) { _ = try view.translate(address, 1) }
    }
    var byte: UInt8 = 0
    #expect(throws: GuestMemoryFault.addressOverflow) { try view.copyIn(from: .max, to: &byte, count: 2) }
    #expect(pool.statistics.buckets == 0)
  }

  @Test func invalidationWaitsForTheBatchInWhichPointersAreUsed() throws {
    let entered = Latch()
    let leave = Latch()
    let thread = try LoopThread(name: "viewer")
    let pool = pool
    thread.loop.enqueue {
      var view = GuestMemoryView(source: pool)
      _ = view.enter()
      _ = try? view.translate(0, 16)
      entered.open()
      leave.wait()
      view.leave()
    }
    entered.wait()
    let invalidator = try LoopThread(name: "invalidator")
    let flag = Flag()
    invalidator.loop.enqueue {
      pool.invalidate()
      flag.raise()
    }
    // The mapping leaves the pool at once, and stays until the viewer is done with it.
    #expect(eventually { pool.statistics.invalidations == 1 })
    #expect(!flag.isRaised)
    #expect(domain.usage.mappings == 1)
    leave.open()
    #expect(eventually { flag.isRaised })
    #expect(domain.usage.mappings == 0)
    invalidator.stopAndJoin()
    thread.stopAndJoin()
  }

  private final class Flag: Sendable {
    private let value = Atomic(false)
    var isRaised: Bool { value.load(ordering: .acquiring) }
    func raise() { value.store(true, ordering: .releasing) }
  }

  @Test func invalidationOfAnEmptyPoolIsFree() {
    for _ in 0..<1000 { pool.invalidate() }
    #expect(pool.statistics.invalidations == 1000)
    #expect(pool.generation.current.load(ordering: .relaxed) == 1)
  }

  @Test func closedPoolMapsNothingAnyMore() throws {
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    _ = try view.translate(0, 16)
    view.leave()
    let range = try pool.mapRange(address: 0x8010, length: 100)
    pool.close()
    pool.unmapRange(range)
    #expect(domain.usage.mappings == 0)
    _ = view.enter()
    defer { view.leave() }
    #expect(throws: GuestMemoryFault.mappingFailed) { _ = try view.translate(0, 16) }
  }
}
