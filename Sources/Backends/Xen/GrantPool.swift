import Synchronization
package import Virtqueue

/// A guest's arena as its device reaches it: granted pages that stay mapped for as long as the driver is connected. A guest
/// address is an offset into the arena.
///
/// There is a ladder, for a host whose maptrack table or budget is short: the whole arena is mapped (data moves straight to and
/// from it); or the rings alone are, and everything else goes by grant copy; or, when not even those fit, the driver waits. Want of
/// room is never an I/O error.
///
/// `attach` and `detach` are called by one thread, the guest's, or where there is no other any more. What `detach` takes away goes in two
/// steps (`MappingLimbo`): a data thread that is in a batch meanwhile finds its pointers mapped until the batch ends.
package final class GrantPool: GuestMemorySource, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `state` is under a lock; `valid` and `stamp` never move. `valid` is written while nothing is
  // mapped and no batch knows of it, `stamp` by any thread without harm.

  /// Why an arena cannot be had.
  package enum AttachFault: Error, Equatable {
    /// The guest's grants are not what it says.
    case badGrants
    /// There is no room now.
    case noRoom
  }

  /// How the guest's memory is reached.
  package enum Mode: String, CaseIterable, Sendable {
    case unattached
    /// All of it is mapped.
    case mapped
    /// The rings are; the rest is copied by Xen.
    case copied
  }

  /// Pages that are mapped contiguously, and by whom.
  private struct Mapping {
    var handle: any GrantHandle
    var start: UnsafeMutableRawPointer
    var pages: Int
    var origin: GrantShare.Origin
  }

  private struct State: ~Copyable {
    var mode = Mode.unattached
    var handle: (any GrantHandle)?
    var references: [UInt32] = []
    /// The arena from page `firstWritable` on.
    var arena: Mapping?
    /// The pages that the guest granted read-only, from page 1 on.
    var readOnly: Mapping?
    var readOnlyPages = 0
    var ranges: [UInt64: Mapping] = [:]
    /// Left the pool, still mapped.
    var limbo = MappingLimbo<Mapping>()
    var nextRange: UInt64 = 1
    var statistics = PoolStatistics()

    var firstWritable: Int { readOnlyPages == 0 ? 0 : readOnlyPages + 1 }
    /// Where page 0 of the arena would be mapped.
    var base: UnsafeMutableRawPointer? { arena.map { $0.start - firstWritable << 12 } }

    func isReadOnly(_ pages: ClosedRange<Int>) -> Bool { pages.lowerBound >= 1 && pages.upperBound <= readOnlyPages }
  }

  /// Bytes of the largest arena: one bucket holds any of them.
  package let bucketShift = 27
  package let generation = MappingGeneration()
  private let share: GrantShare
  private let state = Mutex(State())
  /// What others see of the state, without waiting for a call of the hypervisor, for which it is locked.
  package let gauges = GrantGauges()
  /// A bit for each page of the arena; the rest of the bucket is no memory. Belongs to the pool for its whole life, so that a view
  /// that looks at it late reads zeros.
  private let valid: UnsafeMutablePointer<UInt64>
  private let stamp: UnsafeMutablePointer<UInt64>
  private static let words = (1 << 15) / 64

  /// With a share of a budget of its own.
  package convenience init(budget: GrantBudget) { self.init(share: GrantShare(of: budget, limit: budget.limit)) }

  package init(share: GrantShare) {
    self.share = share
    valid = .allocate(capacity: Self.words)
    valid.initialize(repeating: 0, count: Self.words)
    stamp = .allocate(capacity: 1)
    stamp.initialize(to: 0)
  }

  deinit {
    detach()
    valid.deallocate()
    stamp.deallocate()
  }

  package var mode: Mode { Mode.allCases[Int(clamping: gauges.mode.value)] }
  /// Mappings stay until `detach`, which is called when no queue is to be served any more.
  package var isStable: Bool { mode == .mapped }
  /// Bytes that were copied by grant copy, because there was no room to map their pages.
  package var copied: UInt64 { gauges.copiedBytes.value }

  package var statistics: PoolStatistics { gauges.pages.statistics }

  /// Works on the state, and shows what came of it.
  private func update<Result>(_ body: (inout State) -> Result) -> Result {
    state.withLock { state in
      let result = body(&state)
      state.statistics.budgetPages = share.limit
      gauges.pages.show(state.statistics)
      gauges.mode.set(UInt64(Mode.allCases.firstIndex(of: state.mode) ?? 0))
      return result
    }
  }

  // MARK: Connection

  /// Reaches the arena as well as there is room.
  ///
  /// - Parameters:
  ///   - references: of each page, in order; 2 to 32768.
  ///   - readOnly: pages 1 to this one are granted read-only; below the count of references.
  ///   - rings: ranges that must be mapped, inside the arena.
  package func attach(
    _ handle: any GrantHandle, _ references: [UInt32], readOnly: Int, rings: [(address: UInt64, length: Int)]
  ) throws(AttachFault) {
    detach()
    let result: Result<Void, AttachFault> = update { state in
      state.handle = handle
      state.references = references
      state.readOnlyPages = min(readOnly, references.count - 1)
      if mapWhole(&state) {
        state.mode = .mapped
        for index in state.firstWritable..<references.count { valid[index >> 6] |= 1 << UInt64(index & 63) }
        return .success(())
      }
      // The error says too little: what can be copied from is a good reference.
      var word: UInt64 = 0
      for (address, length) in rings {
        for page in Self.pages(address, length) {
          guard references.indices.contains(page) else { return .failure(.badGrants) }
          guard let isGood = try? handle.copy(references[page], offset: 0, count: 8, local: &word, toGuest: false)
          else { return .failure(.noRoom) }
          guard isGood else { return .failure(.badGrants) }
        }
      }
      // Whether the rings fit is seen now, not when the first request comes.
      var trial: [Mapping] = []
      defer { for mapping in trial { unmap(mapping, &state) } }
      for (address, length) in rings {
        let pages = Self.pages(address, length)
        guard let mapping = map(references[pages], writable: !state.isReadOnly(pages), forRings: true, &state) else {
          return .failure(.noRoom)
        }
        trial.append(mapping)
      }
      state.mode = .copied
      return .success(())
    }
    do throws(AttachFault) {
      try result.get()
    } catch {
      detach()
      throw error
    }
  }

  /// The pages of a range that lies within an arena.
  private static func pages(_ address: UInt64, _ length: Int) -> ClosedRange<Int> {
    Int(address >> 12)...Int((address &+ UInt64(max(length, 1) - 1)) >> 12)
  }

  /// Gives everything back: the driver disconnects. When this returns, nothing is mapped any more; batches that use it are waited for.
  package func detach() {
    update { state in
      guard state.handle != nil else { return }
      let mappings = [state.arena, state.readOnly].compactMap { $0 } + state.ranges.values
      state.arena = nil
      state.readOnly = nil
      state.readOnlyPages = 0
      state.ranges = [:]
      state.statistics.rangePages = 0
      state.references = []
      state.handle = nil
      state.mode = .unattached
      let next = generation.advance()
      generation.invalidations.wrappingAdd(1, ordering: .sequentiallyConsistent)
      for mapping in mappings { state.limbo.put(mapping, next) }
    }
    waitForBatches {
      update { state in
        for mapping in state.limbo.takeUnused() { unmap(mapping, &state) }
        guard state.limbo.isEmpty else { return false }
        if state.handle == nil { for index in 0..<Self.words { valid[index] = 0 } }
        return true
      }
    }
  }

  /// All of the arena: what is read-only apart from the rest, and page 0 only where there is nothing read-only.
  private func mapWhole(_ state: inout State) -> Bool {
    let first = state.firstWritable
    guard first < state.references.count, let arena = map(state.references[first...], writable: true, &state) else {
      return false
    }
    if state.readOnlyPages > 0 {
      state.readOnly = map(state.references[1...state.readOnlyPages], writable: false, &state)
      guard state.readOnly != nil else {
        unmap(arena, &state)
        return false
      }
    }
    state.arena = arena
    return true
  }

  private func map(
    _ references: ArraySlice<UInt32>, writable: Bool, forRings: Bool = false, _ state: inout State
  ) -> Mapping? {
    guard let handle = state.handle, let origin = share.take(references.count, forRings: forRings) else { return nil }
    state.statistics.mapCalls &+= 1
    guard let start = try? handle.map(Array(references), writable: writable) else {
      share.give(references.count, to: origin)
      return nil
    }
    state.statistics.mappedPages += references.count
    return Mapping(handle: handle, start: start, pages: references.count, origin: origin)
  }

  private func unmap(_ mapping: Mapping, _ state: inout State) {
    state.statistics.unmapCalls &+= 1
    state.statistics.mappedPages -= mapping.pages
    mapping.handle.unmap(mapping.start, count: mapping.pages)
    share.give(mapping.pages, to: mapping.origin)
  }

  // MARK: GuestMemorySource

  package func add(viewer: MemoryViewer) { state.withLock { $0.limbo.add(viewer) } }

  package func remove(viewer: MemoryViewer) { state.withLock { $0.limbo.remove(viewer) } }

  package func bucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping {
    let result: Result<BucketMapping, GuestMemoryFault> = update { state in
      state.statistics.misses &+= 1
      guard number == 0, state.mode != .unattached else { return .failure(.unmapped(address: number << 27)) }
      guard let base = state.base else { return .failure(.mappingFailed) }
      return .success(
        BucketMapping(
          base: base, validPages: UnsafePointer(valid), stamp: stamp,
          solid: state.firstWritable << 12..<state.references.count << 12))
    }
    return try result.get()
  }

  package func refreshedBucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping { try bucket(number) }

  package func mapRange(address: UInt64, length: Int) throws(GuestMemoryFault) -> RangeMapping {
    let result: Result<RangeMapping, GuestMemoryFault> = update { state in
      let (end, overflow) = address.addingReportingOverflow(UInt64(max(length, 1)))
      guard !overflow, end <= UInt64(state.references.count) << 12 else { return .failure(.unmapped(address: address)) }
      let pages = Self.pages(address, length)
      let isReadOnly = state.isReadOnly(pages)
      if isReadOnly, let readOnly = state.readOnly {
        return .success(RangeMapping(start: readOnly.start + Int(address) - 4096, identifier: 0))
      }
      if let base = state.base {
        guard pages.lowerBound >= state.firstWritable else { return .failure(.unmapped(address: address)) }
        return .success(RangeMapping(start: base + Int(address), identifier: 0))
      }
      guard let mapping = map(state.references[pages], writable: !isReadOnly, forRings: true, &state) else {
        return .failure(.mappingFailed)
      }
      let identifier = state.nextRange
      state.nextRange &+= 1
      state.ranges[identifier] = mapping
      state.statistics.rangePages += mapping.pages
      return .success(RangeMapping(start: mapping.start + Int(address & 4095), identifier: identifier))
    }
    return try result.get()
  }

  package func unmapRange(_ range: RangeMapping) {
    update { state in
      // Gone already after `detach`: then there is nothing to do.
      guard let mapping = state.ranges.removeValue(forKey: range.identifier) else { return }
      state.statistics.rangePages -= mapping.pages
      unmap(mapping, &state)
    }
  }

  package func copy(
    _ address: UInt64, _ local: UnsafeMutableRawPointer, count: Int, toGuest: Bool
  ) throws(GuestMemoryFault) {
    var done = 0
    while done < count {
      let at = address &+ UInt64(done)
      let offset = Int(at & 4095)
      // The lock is held for the look-up only: Xen checks the reference whatever has become of it since.
      let found: ((any GrantHandle), UInt32)? = state.withLock { state in
        guard let handle = state.handle, let page = Int(exactly: at >> 12), page < state.references.count else {
          return nil
        }
        return (handle, state.references[page])
      }
      guard let (handle, reference) = found else { throw .unmapped(address: at) }
      let step = min(count - done, 4096 - offset)
      guard
        let isGood = try? handle.copy(reference, offset: offset, count: step, local: local + done, toGuest: toGuest)
      else { throw .mappingFailed }
      guard isGood else { throw .unmapped(address: at) }
      done += step
    }
    gauges.copiedBytes.add(UInt64(truncatingIfNeeded: count))
  }
}
