import SimulatedXen
import TestSupport
import Testing
import Virtqueue
import Xen

/// A queue whose owner dies again and again, at any store that it makes, and what the next owner finds in the journal.
@Suite struct JournalTests {
  private static let size: UInt16 = 8

  /// The queue's memory: the rings, which the driver sees, and the journal, which the owners see.
  private final class Stage {
    let domain: SimulatedDomain
    let pool: ForeignMappingPool
    let ring: any SimulatedRing
    let features: FeatureBits
    var layout = QueueLayout()
    let journalBytes = QueueJournal.bytes(slotCount: Int(size), chainLimit: 4)
    let journalMemory: UnsafeMutableRawPointer
    let journal: QueueJournal
    /// Chains that the driver made available and that are not answered.
    var outstanding: Set<UInt16> = []
    /// Chains that some owner took and that the driver has not seen answered.
    var taken: Set<UInt16> = []
    private var lives = 0

    init(packed: Bool) throws {
      features = packed ? [.ringPacked] : []
      domain = try SimulatedDomain(identifier: 3, memoryBytes: 1 << 20)
      let hypervisor = SimulatedHypervisor()
      hypervisor.add(domain)
      pool = ForeignMappingPool(guest: try hypervisor.open(3), bucketShift: 14, budgetBytes: 1 << 20)
      ring =
        packed
        ? SimulatedPackedRing(memory: domain.memory, area: 0x1000, size: size, features: features)
        : SimulatedSplitRing(memory: domain.memory, area: 0x1000, size: size, features: features)
      layout.size = size
      layout.descriptorArea = ring.descriptorArea
      layout.driverArea = ring.driverArea
      layout.deviceArea = ring.deviceArea
      journalMemory = .allocate(byteCount: journalBytes, alignment: 64)
      journalMemory.initializeMemory(as: UInt8.self, repeating: 0, count: journalBytes)
      journal = QueueJournal(memory: journalMemory, slotCount: Int(size), chainLimit: 4)
    }

    deinit { journalMemory.deallocate() }

    /// A chain of one to three descriptors, if there is room.
    func add(_ descriptors: Int) throws {
      let buffers = (0..<descriptors).map {
        SimulatedDriver.Buffer(0x80000 + UInt64($0) * 64, 64, writable: $0 == descriptors - 1)
      }
      guard let head = ring.add(buffers, indirect: false) else { return }
      #expect(outstanding.insert(head).inserted)
    }

    /// What the driver sees as answered.
    func takeUsed(_ words: String) {
      while let used = ring.takeUsed() {
        #expect(outstanding.remove(used.head) != nil, "\(words): chain \(used.head) is answered and not under way")
        #expect(taken.remove(used.head) != nil, "\(words): chain \(used.head) is answered and was never taken")
      }
    }

    func image(_ memory: UnsafeMutableRawPointer, _ count: Int) -> [UInt8] {
      Array(UnsafeRawBufferPointer(start: memory, count: count))
    }

    var rings: UnsafeMutableRawPointer { domain.memory.pointer(0x1000) }
    var ringBytes: Int { Int(ring.end - 0x1000) }

    /// Runs one owner until it dies.
    ///
    /// - Parameter finishes: it answers everything instead.
    func live(_ random: inout SeededGenerator, finishes: Bool, _ words: String) throws {
      var view = GuestMemoryView(source: pool)
      var queue = try Virtqueue(
        layout: layout, maximumSize: size, chainLimit: 4, features: features, source: pool, journal: journal,
        adopts: lives > 0)
      lives += 1
      try queue.prepare(invalidations: view.enter())
      defer { view.leave() }
      let adopted = try queue.adopt()
      #expect(Set(adopted.map(\.ticket.head)) == taken, "\(words): other chains are adopted than were under way")
      var mine = adopted.map(\.ticket)
      var free = Set((0..<UInt32(size))).subtracting(mine.map(\.slot))
      func take() throws {
        guard let slot = free.min() else { return }
        var chain = DescriptorChain(buffers: journal.buffers(Int(slot)))
        guard try queue.next(memory: &view, into: &chain) else { return }
        chain.ticket.slot = slot
        queue.note(chain)
        free.remove(slot)
        mine.append(chain.ticket)
        #expect(taken.insert(chain.ticket.head).inserted, "\(words): chain \(chain.ticket.head) is taken twice")
      }
      for _ in 0..<(finishes ? 1000 : Int.random(in: 0..<14, using: &random)) {
        switch Int.random(in: 0..<4, using: &random) {
        case 0 where !finishes: try add(Int.random(in: 1...3, using: &random))
        case 0, 1: try take()
        case 2:
          guard let index = mine.indices.randomElement(using: &random) else { break }
          queue.pushUsed(mine.remove(at: index), length: 4)
        default:
          _ = queue.publish()
          while let slot = queue.takePublishedSlot() { free.insert(UInt32(slot)) }
          // The driver answers nothing while it is dead.
          takeUsed(words)
        }
        if finishes && outstanding.isEmpty { return }
      }
      // Death, between two stores of what it would have done next.
      switch Int.random(in: 0..<4, using: &random) {
      case 0:
        // The position of an answer is noted, the answer not written.
        guard let index = mine.indices.randomElement(using: &random) else { break }
        let before = image(rings, ringBytes)
        queue.pushUsed(mine[index], length: 4)
        rings.copyMemory(from: before, byteCount: ringBytes)
      case 1:
        // Publishing is intended, the index not written.
        let (before, noted) = (image(rings, ringBytes), image(journalMemory, journalBytes))
        _ = queue.publish()
        rings.copyMemory(from: before, byteCount: ringBytes)
        restore(noted)
      case 2:
        // The index is written, nothing noted of that.
        let noted = image(journalMemory, journalBytes)
        _ = queue.publish()
        restore(noted)
      default: break
      }
      takeUsed(words)
    }

    /// The journal as it was, but for the position up to which answers were about to be published.
    private func restore(_ bytes: [UInt8]) {
      let intended = journalMemory.load(fromByteOffset: 18, as: UInt16.self)
      journalMemory.copyMemory(from: bytes, byteCount: journalBytes)
      journalMemory.storeBytes(of: intended, toByteOffset: 18, as: UInt16.self)
    }
  }

  @Test(arguments: UInt64(1)...60, [false, true])
  func everyChainIsAnsweredOnceHoweverManyOwnersDie(seed: UInt64, packed: Bool) throws {
    var random = SeededGenerator(seed: seed)
    let stage = try Stage(packed: packed)
    for life in 0..<40 {
      for _ in 0..<Int.random(in: 0..<4, using: &random) { try stage.add(Int.random(in: 1...3, using: &random)) }
      try stage.live(&random, finishes: false, "seed \(seed), packed \(packed), life \(life)")
    }
    try stage.live(&random, finishes: true, "seed \(seed), packed \(packed), the last life")
    #expect(stage.outstanding.isEmpty && stage.taken.isEmpty, "seed \(seed), packed \(packed)")
  }
}
