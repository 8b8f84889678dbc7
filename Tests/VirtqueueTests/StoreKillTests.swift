import CStoreTrace
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue

/// A queue whose owner is killed behind each single store that it makes to its journal or to the ring, and the next owner: no chain is lost,
/// none is answered twice. The driver polls: it uses what it finds in the ring without waiting to be told.
@Suite(.serialized) struct StoreKillTests {
  struct Form: CustomStringConvertible, Sendable {
    var size: UInt16
    var features: FeatureBits
    var description: String {
      "\(features.contains(.ringPacked) ? "packed" : "split")\(features.contains(.inOrder) ? ", in order" : ""), \(size)"
    }
  }

  static let forms: [Form] = [FeatureBits.ringPacked, []].flatMap { format in
    (UInt16(1)...8).filter { !format.isEmpty || $0.nonzeroBitCount == 1 }.flatMap { size in
      [FeatureBits(), .inOrder].map { Form(size: size, features: format.union($0)) }
    }
  }

  /// Everything about one queue, from the start.
  private final class Stage {
    private static let area: UInt64 = 0x10000
    private static let chainLimit = 4
    /// More than the ring has: answers of several laps may wait to be published.
    private static let slots = 24
    private let form: Form
    private let words: String
    private let domain: SimulatedDomain
    private let source: FlatMemory
    private let ring: any SimulatedRing
    private var layout = QueueLayout()
    private let journalMemory: UnsafeMutableRawPointer
    private let journalBytes: Int
    private let ringBytes: Int
    private let copy: UnsafeMutableRawPointer
    private var random: SeededGenerator
    /// The store behind which the owner is killed; 0 for none.
    private let end: UInt64
    private(set) var stores: UInt64 = 0
    private(set) var isKilled = false
    /// Where the buffers of each chain are that the driver waits for.
    private var outstanding: [UInt16: UInt64] = [:]
    private var chains: UInt64 = 0
    private var owner: Owner?
    private var lives = 0

    init(_ form: Form, seed: UInt64, end: UInt64) throws {
      (self.form, self.end) = (form, end)
      words = "\(form), seed \(seed), store \(end)"
      random = SeededGenerator(seed: seed)
      domain = try SimulatedDomain(identifier: 3, memoryBytes: 1 << 18)
      source = FlatMemory(domain.memory)
      ring =
        form.features.contains(.ringPacked)
        ? SimulatedPackedRing(memory: domain.memory, area: Self.area, size: form.size, features: form.features)
        : SimulatedSplitRing(memory: domain.memory, area: Self.area, size: form.size, features: form.features)
      layout.size = form.size
      layout.descriptorArea = ring.descriptorArea
      layout.driverArea = ring.driverArea
      layout.deviceArea = ring.deviceArea
      ringBytes = Int((ring.deviceArea + 256 - Self.area + 4095) & ~4095)
      let bytes = QueueJournal.bytes(slotCount: Self.slots, chainLimit: Self.chainLimit)
      journalBytes = (bytes + 4095) & ~4095
      journalMemory = .allocate(byteCount: journalBytes, alignment: 4096)
      journalMemory.initializeMemory(as: UInt8.self, repeating: 0, count: journalBytes)
      copy = .allocate(byteCount: journalBytes + ringBytes, alignment: 16)
    }

    deinit {
      journalMemory.deallocate()
      copy.deallocate()
    }

    private var rings: UnsafeMutableRawPointer { domain.memory.pointer(Self.area) }

    // MARK: The device

    private final class Owner {
      var queue: Virtqueue
      var view: GuestMemoryView
      let journal: QueueJournal
      var mine: [ChainTicket] = []
      var free = Set(0..<UInt32(Stage.slots))

      init(_ queue: consuming Virtqueue, _ view: consuming GuestMemoryView, _ journal: QueueJournal) {
        self.queue = queue
        self.view = view
        self.journal = journal
      }
    }

    private func begin() throws {
      let journal = QueueJournal(memory: journalMemory, slotCount: Self.slots, chainLimit: Self.chainLimit)
      var view = GuestMemoryView(source: source)
      var queue = try Virtqueue(
        layout: layout, maximumSize: form.size, chainLimit: Self.chainLimit, features: form.features, source: source,
        journal: journal, adopts: lives > 0)
      lives += 1
      try queue.prepare(invalidations: view.enter())
      owner = Owner(queue, view, journal)
      try trace { owner in
        for chain in try owner.queue.adopt() {
          owner.mine.append(chain.ticket)
          owner.free.remove(chain.ticket.slot)
        }
      }
      if !isNewlyKilled { checkAdopted() }
    }

    /// What is adopted is what the driver waits for, and not an earlier chain of the same name.
    private func checkAdopted() {
      takeUsed()
      guard owner != nil else { return }
      let mine = owner?.mine ?? []
      let journal = QueueJournal(memory: journalMemory, slotCount: Self.slots, chainLimit: Self.chainLimit)
      for ticket in mine {
        let place = journal.buffers(Int(ticket.slot))[0].address
        #expect(outstanding[ticket.head] == place, "\(words): chain \(ticket.head) is adopted and was answered")
      }
      #expect(Set(mine.map(\.head)).count == mine.count, "\(words): a chain is adopted twice")
    }

    private var isNewlyKilled = false

    /// Runs a piece of the device's work, store by store.
    private func trace(_ body: (Owner) throws -> Void) throws {
      guard let owner else { return }
      isNewlyKilled = false
      let stop = !isKilled && end > stores ? end - stores : 0
      cstoretrace_begin(journalMemory, journalBytes, rings, ringBytes, stop, copy)
      var failure: (any Error)?
      do { try body(owner) } catch { failure = error }
      let count = cstoretrace_end()
      stores += count
      if let failure { throw failure }
      guard stop > 0, count >= stop else { return }
      // What a killed process leaves: its stores up to that one.
      isKilled = true
      isNewlyKilled = true
      journalMemory.copyMemory(from: copy, byteCount: journalBytes)
      rings.copyMemory(from: copy + journalBytes, byteCount: ringBytes)
      self.owner = nil
    }

    private func take() throws {
      try trace { owner in
        guard let slot = owner.free.min() else { return }
        var chain = DescriptorChain(buffers: owner.journal.buffers(Int(slot)))
        guard try owner.queue.next(memory: &owner.view, into: &chain) else { return }
        chain.ticket.slot = slot
        owner.queue.note(chain)
        owner.free.remove(slot)
        owner.mine.append(chain.ticket)
      }
    }

    private func use() throws {
      let place = Int(random.next() % 8)
      try trace { owner in
        guard !owner.mine.isEmpty else { return }
        owner.queue.pushUsed(owner.mine.remove(at: place % owner.mine.count), length: 4)
      }
    }

    private func publish() throws {
      try trace { owner in
        _ = owner.queue.publish()
        while let slot = owner.queue.takePublishedSlot() { owner.free.insert(UInt32(slot)) }
      }
    }

    // MARK: The driver

    private func add() {
      let count = Int(random.next() % 3) + 1
      let place = 0x20000 + chains * 0x100
      let buffers = (0..<min(count, Int(form.size))).map {
        SimulatedDriver.Buffer(place + UInt64($0) * 64, 64, writable: $0 > 0)
      }
      guard let head = ring.add(buffers, indirect: false) else { return }
      chains += 1
      #expect(outstanding.updateValue(place, forKey: head) == nil, "\(words)")
    }

    private func takeUsed() {
      while let used = ring.takeUsed() {
        #expect(outstanding.removeValue(forKey: used.head) != nil, "\(words): \(used.head) is answered twice")
      }
    }

    // MARK: The play

    /// Plays all of it; the owner is replaced once in good order, and once where it is killed.
    func play() throws {
      for turn in 0..<40 {
        if turn == 20 { owner = nil }
        while owner == nil { try begin() }
        // Published is now and then: the driver of a packed ring sees answers before.
        switch random.next() % 16 {
        case 0...3: add()
        case 4...6: takeUsed()
        case 7...10: try take()
        case 11...14: try use()
        default: try publish()
        }
      }
      for _ in 0..<100 where !outstanding.isEmpty {
        while owner == nil { try begin() }
        try take()
        while owner == nil { try begin() }
        try use()
        while owner == nil { try begin() }
        try publish()
        takeUsed()
      }
      #expect(outstanding.isEmpty, "\(words): \(outstanding.count) chains are lost")
      owner = nil
    }
  }

  @Test(.enabled(if: cstoretrace_works() == 1 && getenv("VXD_TESTS_ARE_SLOW") == nil), arguments: forms)
  func noStoreIsOneToDieBehind(form: Form) throws {
    for seed: UInt64 in 1...1 {
      let whole = try Stage(form, seed: seed, end: 0)
      try whole.play()
      #expect(whole.stores > 20, "\(form): \(whole.stores)")
      for store in 1...whole.stores {
        let stage = try Stage(form, seed: seed, end: store)
        try stage.play()
        #expect(stage.isKilled)
      }
    }
  }
}
