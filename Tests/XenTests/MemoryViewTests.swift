import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

/// What a view says of a guest's memory, whatever it remembers of the last lookups, against a model that remembers nothing.
@Suite struct MemoryViewTests {
  private static let pageCount = 64

  private let domain: SimulatedDomain
  private let hypervisor = SimulatedHypervisor()

  init() throws {
    domain = try SimulatedDomain(identifier: 3, memoryBytes: Self.pageCount << 12)
    hypervisor.add(domain)
    for page in 0..<UInt64(Self.pageCount) { domain.memory.pointer(page << 12).storeBytes(of: page, as: UInt64.self) }
  }

  /// Batches of random lookups; `isBacked` says which pages there are, and `bucketPages` where a run ends at the latest.
  private func check(
    _ source: any GuestMemorySource, bucketPages: Int, seed: UInt64, isBacked: (Int) -> Bool
  ) throws {
    var random = SeededGenerator(seed: seed)
    var view = GuestMemoryView(source: source)
    for _ in 0..<50 {
      _ = view.enter()
      defer { view.leave() }
      for _ in 0..<40 {
        let address = UInt64.random(in: 0..<UInt64(Self.pageCount) << 12 + 8192, using: &random)
        let length = Int.random(in: 1...20000, using: &random)
        let first = Int(address >> 12)
        var end = first
        while end < Self.pageCount, end / bucketPages == first / bucketPages, isBacked(end) { end += 1 }
        let expected = min(length, max(0, end << 12 - Int(address)))
        guard expected > 0 else {
          #expect(throws: GuestMemoryFault.self) { _ = try view.translate(address, length) }
          #expect(throws: GuestMemoryFault.self) { _ = try view.piece(address, length) }
          continue
        }
        let found = try view.translate(address, length)
        #expect(found.length == expected, "address \(address), length \(length)")
        let page = (found.pointer - Int(address & 4095)).load(as: UInt64.self)
        #expect(page == UInt64(first))
        let piece = try view.piece(address, length)
        #expect(piece == (expected == length ? found.pointer : nil))
      }
    }
  }

  @Test(arguments: 1...8) func viewOfForeignMappingsKnowsHolesAndBuckets(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let holes = Set((0..<seed).map { _ in Int.random(in: 0..<Self.pageCount, using: &random) })
    for page in holes { domain.memory.set(pages: page..<page + 1, present: false) }
    // Buckets of four pages; with half of them at a time, some leave in the middle of a batch.
    for budget: UInt64 in [2 << 14, 1 << 20] {
      let pool = ForeignMappingPool(guest: try hypervisor.open(3), bucketShift: 14, budgetBytes: budget)
      try check(pool, bucketPages: 4, seed: seed) { !holes.contains($0) }
      pool.close()
    }
  }

  @Test(arguments: [0, 1, 5, 62]) func viewOfAnArenaEndsWhereTheGuestLetsUsOnlyRead(readOnly: Int) throws {
    let domain = domain
    let pool = GrantPool(budget: GrantBudget())
    let references = (0..<Self.pageCount).map {
      domain.grants.grant(frame: UInt64($0), writable: !(1...max(readOnly, 1)).contains($0) || readOnly == 0)
    }
    let first = readOnly == 0 ? 0 : readOnly + 1
    let grants = try hypervisor.openGrants(3)
    try pool.attach(grants, references, readOnly: readOnly, rings: [])
    #expect(pool.mode == .mapped)
    try check(pool, bucketPages: 1 << 15, seed: UInt64(readOnly)) { $0 >= first }
    pool.detach()
  }

  @Test func wordsAreReadInPlaceWhereTheyAreAlignedAndInOnePiece() throws {
    domain.memory.set(pages: 9..<10, present: false)
    domain.memory.pointer(0x8ff0).storeBytes(of: 7, as: UInt64.self)
    domain.memory.pointer(0x8ff8).storeBytes(of: 8, as: UInt64.self)
    let pool = ForeignMappingPool(guest: try hypervisor.open(3), bucketShift: 14, budgetBytes: 1 << 20)
    defer { pool.close() }
    var view = GuestMemoryView(source: pool)
    _ = view.enter()
    defer { view.leave() }
    let words = try view.words(0x8ff0)
    #expect(words?.0 == 7 && words?.1 == 8)
    // Not aligned; into a page that is not there; across the border of two buckets.
    for address: UInt64 in [0x8ff4, 0x8fe1, 0x8ff8, 0x7ff8] {
      let words = try view.words(address)
      #expect(words == nil, "\(address)")
    }
    #expect(throws: GuestMemoryFault.self) { _ = try view.words(0x9000) }
  }

  /// Where nothing can be mapped, who can do without is not sent to the pool for each thing.
  @Test func copiedMemoryHasNoPieces() throws {
    let memory = FlatMemory(domain.memory, mapsData: false)
    var view = GuestMemoryView(source: memory)
    _ = view.enter()
    defer { view.leave() }
    for address: UInt64 in [0x1000, 0x2000, 0x3000] {
      let piece = try view.piece(address, 16)
      #expect(piece == nil)
      var word: UInt64 = 0
      try view.copyIn(from: address, to: &word, count: 8)
      #expect(word == address >> 12)
    }
    let misses = view.misses
    #expect(misses == 4)  // one for the pieces, one for each copy
  }
}
