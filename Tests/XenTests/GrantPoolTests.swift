import EventLoop
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

/// An arena whose driver goes while data threads are at work in it.
@Suite struct GrantPoolTests {
  private let domain: SimulatedDomain
  private let pool: GrantPool
  private let grants: any GrantHandle
  private let references: [UInt32]

  init() throws {
    domain = try SimulatedDomain(identifier: 3, memoryBytes: 1 << 20)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    grants = try hypervisor.openGrants(3)
    pool = GrantPool(budget: GrantBudget())
    let domain = domain
    references = (0..<64).map { domain.grants.grant(frame: UInt64($0), writable: true) }
  }

  /// A data thread in a batch, which looks at a byte of the guest's for as long as it lasts.
  private final class Batch {
    private let thread: LoopThread
    private let leave = Latch()

    /// - Parameter begin: what the batch does first.
    init(_ pool: GrantPool, _ begin: @escaping @Sendable (inout GuestMemoryView) -> UnsafeMutableRawPointer?) throws {
      thread = try LoopThread(name: "viewer")
      let (entered, leave) = (Latch(), leave)
      thread.loop.enqueue {
        var view = GuestMemoryView(source: pool)
        _ = view.enter()
        let start = begin(&view)
        entered.open()
        leave.wait()
        // What is mapped no more kills the process here.
        _ = start?.load(as: UInt8.self)
        view.leave()
      }
      entered.wait()
    }

    func end() {
      leave.open()
      thread.stopAndJoin()
    }
  }

  /// Detaches from another thread, as the guest's thread does.
  private final class Detaching {
    private let thread: LoopThread
    private let done = Latch()

    init(_ pool: GrantPool) throws {
      thread = try LoopThread(name: "guest")
      let done = done
      thread.loop.enqueue {
        pool.detach()
        done.open()
      }
    }

    func isDone(within seconds: Int) -> Bool { done.wait(seconds: seconds) }
    func join() { thread.stopAndJoin() }
  }

  /// One guest takes what it can; another one's driver connects all the same.
  @Test func noGuestTakesWhatOthersNeed() throws {
    let budget = GrantBudget(limit: 128, reserve: 16)
    let (greedy, modest) = (GrantShare(of: budget, limit: 112), GrantShare(of: budget, limit: 112))
    let first = GrantPool(share: greedy)
    try first.attach(grants, references, readOnly: 0, rings: [(0, 4096)])
    #expect(first.mode == .mapped)
    // Neither the budget nor its share has room for a second arena, and its rings may not take all of the reserve.
    let second = GrantPool(share: greedy)
    try second.attach(grants, references, readOnly: 0, rings: [(0, 4096)])
    #expect(second.mode == .copied)
    var ranges: [RangeMapping] = []
    while let range = try? second.mapRange(address: 0, length: 4096) { ranges.append(range) }
    let other = GrantPool(share: modest)
    try other.attach(grants, references, readOnly: 0, rings: [(0, 4096), (4096, 4096)])
    #expect(other.mode == .copied)
    #expect((try? other.mapRange(address: 0, length: 4096)) != nil)
    for range in ranges { second.unmapRange(range) }
    for pool in [first, second, other] { pool.detach() }
    #expect(domain.grants.mappedPages == 0)
    // All of it is there again.
    try other.attach(grants, references, readOnly: 0, rings: [(0, 4096)])
    #expect(other.mode == .mapped)
    other.detach()
  }

  /// Whoever asks what a pool has is answered while the hypervisor is at work for it.
  @Test func statisticsDoNotWaitForTheHypervisor() throws {
    let slow = SlowHandle(grants)
    let attaching = try LoopThread(name: "guest")
    let (pool, references) = (pool, references)
    attaching.loop.enqueue { try? pool.attach(slow, references, readOnly: 0, rings: [(0, 4096)]) }
    slow.isMapping.wait()
    #expect(pool.mode == .unattached && pool.statistics.mappedPages == 0)
    slow.goesOn.open()
    attaching.stopAndJoin()
    #expect(pool.mode == .mapped)
    pool.detach()
  }

  private final class SlowHandle: GrantHandle {
    let isMapping = Latch()
    let goesOn = Latch()
    private let inner: any GrantHandle
    init(_ inner: any GrantHandle) { self.inner = inner }

    func map(_ references: [UInt32], writable: Bool) throws(XenError) -> UnsafeMutableRawPointer {
      isMapping.open()
      goesOn.wait()
      return try inner.map(references, writable: writable)
    }

    func unmap(_ start: UnsafeMutableRawPointer, count: Int) { inner.unmap(start, count: count) }

    func copy(
      _ reference: UInt32, offset: Int, count: Int, local: UnsafeMutableRawPointer, toGuest: Bool
    ) throws(XenError) -> Bool {
      try inner.copy(reference, offset: offset, count: count, local: local, toGuest: toGuest)
    }

    func doorbell(remotePort: UInt32) throws(XenError) -> any QueueDoorbell {
      try inner.doorbell(remotePort: remotePort)
    }
  }

  @Test func arenaStaysMappedUntilTheLastBatchInItEnds() throws {
    try pool.attach(grants, references, readOnly: 0, rings: [])
    let batch = try Batch(pool) { view in try? view.translate(0x3000, 16).pointer }
    let detaching = try Detaching(pool)
    // It has left the pool, and it is mapped.
    #expect(eventually { pool.mode == .unattached })
    #expect(domain.grants.mappedPages == 64)
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    #expect(throws: GuestMemoryFault.self) { _ = try view.translate(0x3000, 16) }
    view.leave()
    batch.end()
    #expect(detaching.isDone(within: 10))
    #expect(domain.grants.mappedPages == 0)
    detaching.join()
  }

  @Test func ringsOfACopiedArenaStayMappedUntilTheLastBatchEnds() throws {
    domain.grants.largeMapFailures.store(.max, ordering: .relaxed)
    try pool.attach(grants, references, readOnly: 0, rings: [(0x1000, 4096)])
    #expect(pool.mode == .copied)
    let pool = pool
    let batch = try Batch(pool) { _ in try? pool.mapRange(address: 0x1000, length: 100).start }
    #expect(domain.grants.mappedPages == 1)
    let detaching = try Detaching(pool)
    #expect(eventually { pool.mode == .unattached })
    #expect(domain.grants.mappedPages == 1)
    batch.end()
    #expect(detaching.isDone(within: 10))
    #expect(domain.grants.mappedPages == 0)
    detaching.join()
  }

  @Test func batchThatBeginsBehindTheEndHoldsNothingUp() throws {
    try pool.attach(grants, references, readOnly: 0, rings: [])
    let batch = try Batch(pool) { view in try? view.translate(0, 16).pointer }
    let detaching = try Detaching(pool)
    #expect(eventually { pool.mode == .unattached })
    let later = try Batch(pool) { view in try? view.translate(0, 16).pointer }
    batch.end()
    #expect(detaching.isDone(within: 10))
    #expect(domain.grants.mappedPages == 0)
    detaching.join()
    later.end()
  }

  @Test func arenaIsAttachedAgainOnlyBehindTheEndOfTheOldOne() throws {
    for _ in 0..<50 {
      try pool.attach(grants, references, readOnly: 0, rings: [])
      let batch = try Batch(pool) { view in try? view.translate(0, 16).pointer }
      let thread = try LoopThread(name: "guest")
      let (pool, grants, references) = (pool, grants, references)
      thread.loop.enqueue { try? pool.attach(grants, references, readOnly: 0, rings: []) }
      batch.end()
      thread.perform {}
      thread.stopAndJoin()
      #expect(pool.mode == .mapped)
      #expect(domain.grants.mappedPages == 64)
    }
    pool.detach()
    #expect(domain.grants.mappedPages == 0)
    #expect(pool.statistics.mappedPages == 0)
  }
}
