/// The device's side of an active virtqueue, split or packed (virtio 1.2, 2.7 and 2.8). Confined to one thread.
///
/// The three ring parts are mapped on their own and mapped again, lazily, after an invalidation. Every index, flag and length
/// that the driver writes is read once into a local, and the local is what gets checked and used. What is particular to a
/// format lies in `Virtqueue+Split.swift` and `Virtqueue+Packed.swift`.
///
/// What is called in the data path is `mutating`, whether it changes anything or not: for a call that only borrows a value of this size, the
/// compiler (Swift 6.3) copies it to the stack first. The same holds for the pumps and for `GuestMemoryView`.
package struct Virtqueue: ~Copyable {
  /// What the queue was set up with; the positions in it are kept current.
  package internal(set) var layout: QueueLayout
  /// Buffers in a chain at most, those of an indirect table included.
  package let chainLimit: Int
  let isPacked: Bool
  let eventIndex: Bool
  let indirect: Bool
  private let source: any GuestMemorySource
  let indirectTable: UnsafeMutableRawPointer
  /// A bit per head of a split ring that the device has: from its taking until its answer is published. A second use of it is the
  /// driver's fault.
  let inUse: UnsafeMutablePointer<UInt64>
  /// Slots of a packed ring that the device works on.
  var occupied = 0
  /// Slots of a packed ring, or entries of a split one, that were used since the last `publish`.
  var unpublished = 0
  var order: CompletionOrder
  let journal: QueueJournal?
  /// Slots of the journal whose chains were used since the last `publish`, in that order.
  private let usedSlots: UnsafeMutablePointer<UInt32>
  private var usedSlotCount = 0
  /// Slots of a packed ring that were used since the journal was settled last.
  private var unsettled = 0
  /// Heads of a split ring that were used since the last `publish`: the first `unpublished` of as many as the ring has.
  let usedHeads: UnsafeMutablePointer<UInt16>
  /// The journal's chains must be taken over before anything else.
  private var adopts = false
  /// The positions come from the used ring at its first mapping.
  private var continuesFromRing: Bool

  var descriptors: RangeMapping?
  var driverArea: RangeMapping?
  var deviceArea: RangeMapping?
  var inFlightArea: RangeMapping?
  private var seenInvalidations: UInt64 = .max

  /// - Parameters:
  ///   - journal: where the chains that the device has are noted; tickets carry its slots then.
  ///   - adopts: go on where the journal's last owner was stopped, see `adopt`; the journal is live.
  ///   - continuesFromRing: go on behind what the split ring shows as used: for devices that answer in order.
  /// - Throws: `badLayout`, see `QueueLayout.validate`.
  package init(
    layout: QueueLayout, maximumSize: UInt16, chainLimit: Int, features: FeatureBits, source: any GuestMemorySource,
    journal: QueueJournal? = nil, adopts: Bool = false, continuesFromRing: Bool = false
  ) throws(VirtqueueFault) {
    self.continuesFromRing = continuesFromRing
    isPacked = features.contains(.ringPacked)
    self.journal = journal
    self.adopts = adopts && journal != nil
    usedSlots = .allocate(capacity: max(1, journal?.slotCount ?? 1))
    usedHeads = .allocate(capacity: isPacked ? 1 : max(1, Int(layout.size)))
    try layout.validate(maximum: maximumSize, packed: isPacked)
    self.layout = layout
    self.chainLimit = chainLimit
    self.source = source
    eventIndex = features.contains(.eventIndex)
    indirect = features.contains(.indirectDescriptors)
    indirectTable = .allocate(byteCount: chainLimit * 16, alignment: 16)
    let words = (Int(layout.size) + 63) / 64
    inUse = .allocate(capacity: words)
    inUse.initialize(repeating: 0, count: words)
    order = CompletionOrder(size: layout.size, isKept: features.contains(.inOrder))
    if let journal, !adopts { journal.start(packed: isPacked, layout: layout) }
  }

  deinit {
    for range in [descriptors, driverArea, deviceArea, inFlightArea] {
      if let range { source.unmapRange(range) }
    }
    indirectTable.deallocate()
    inUse.deallocate()
    usedSlots.deallocate()
    usedHeads.deallocate()
  }

  /// Makes the rings usable for a batch: maps them at first use and after an invalidation.
  package mutating func prepare(invalidations: UInt64) throws(VirtqueueFault) {
    guard invalidations != seenInvalidations else { return }
    forgetRings()
    let packed = isPacked
    do throws(GuestMemoryFault) {
      descriptors = try source.mapRange(address: layout.descriptorArea, length: layout.descriptorBytes)
      driverArea = try source.mapRange(address: layout.driverArea, length: layout.driverBytes(packed: packed))
      deviceArea = try source.mapRange(address: layout.deviceArea, length: layout.deviceBytes(packed: packed))
      if let area = layout.inFlightArea {
        inFlightArea = try source.mapRange(address: area, length: layout.inFlightBytes)
      }
    } catch {
      throw .ringUnmapped
    }
    seenInvalidations = invalidations
    if continuesFromRing {
      continuesFromRing = false
      continueFromUsedRing()
    }
  }

  /// Gives the mappings of the rings back; the queue is not used any more.
  package mutating func forgetRings() {
    let ranges = [descriptors, driverArea, deviceArea, inFlightArea]
    (descriptors, driverArea, deviceArea, inFlightArea) = (nil, nil, nil, nil)
    for range in ranges { if let range { source.unmapRange(range) } }
    seenInvalidations = .max
  }

  // MARK: Available chains

  /// Takes the next chain that the driver made available, copied and checked as a whole.
  ///
  /// - Returns: false when there is none.
  package mutating func next(
    memory: inout GuestMemoryView, into chain: inout DescriptorChain
  ) throws(VirtqueueFault) -> Bool {
    chain.clear()
    if isPacked {
      guard try nextPacked(&memory, &chain) else { return false }
    } else {
      guard try nextSplit(&memory, &chain) else { return false }
    }
    if order.isKept { chain.ticket.sequence = order.issue() }
    return true
  }

  /// Puts the chain that was taken last back, as if it had not been taken: the device has no room for it now.
  package mutating func putBack(_ ticket: ChainTicket) {
    journal?.free(Int(ticket.slot))
    if isPacked { putBackPacked(ticket) } else { putBackSplit(ticket) }
    if order.isKept { order.withdraw() }
  }

  /// Whether chains wait that have not been taken.
  package mutating func hasPending() -> Bool { isPacked ? hasPendingPacked() : hasPendingSplit() }

  /// Chains that wait, by the index of a split ring's driver, which nothing has checked: 0 to 65535. Of a packed ring it says nothing.
  package mutating func pendingCount() -> Int { isPacked ? 0 : pendingCountSplit() }

  /// Tells the driver that notifications are not needed for now (virtio 1.2, 2.7.7 and 2.8.10).
  package mutating func disableNotifications() {
    if isPacked { disableNotificationsPacked() } else { disableNotificationsSplit() }
  }

  /// Asks the driver for a notification of the next chain.
  ///
  /// - Returns: whether chains arrived meanwhile; then they must be taken first.
  package mutating func enableNotifications() -> Bool {
    isPacked ? enableNotificationsPacked() : enableNotificationsSplit()
  }

  /// Asks for a notification of the first chain behind those that are known and wait, of a split ring.
  ///
  /// - Parameter known: chains that were seen and put back.
  /// - Returns: whether there are more than those.
  package mutating func enableNotifications(behind known: Int) -> Bool {
    isPacked ? enableNotificationsPacked() : enableNotificationsSplit(behind: UInt16(truncatingIfNeeded: known))
  }

  // MARK: Used chains

  /// Gives a chain back to the driver, which may see it at once and does after the next `publish`.
  ///
  /// - Parameter length: bytes that the device wrote into it.
  package mutating func pushUsed(_ ticket: ChainTicket, length: UInt32) {
    guard order.isKept else { return pushNow(ticket, length) }
    order.finish(ticket, length)
    while let (first, length) = order.takeFirst() { pushNow(first, length) }
  }

  private mutating func pushNow(_ ticket: ChainTicket, _ length: UInt32) {
    if let journal {
      // Answers of a packed ring are the driver's at once. Behind more than a lap of them, whoever adopts the queue could not tell a slot
      // that is answered from one that was made available again since.
      if isPacked, unsettled &+ Int(ticket.slots) > Int(layout.size) { settle(journal) }
      unsettled &+= Int(ticket.slots)
      journal.use(Int(ticket.slot), position: layout.nextUsed, wrap: layout.usedWrapCounter)
      usedSlots[usedSlotCount] = ticket.slot
      usedSlotCount &+= 1
    }
    if isPacked { pushUsedPacked(ticket, length) } else { pushUsedSplit(ticket, length) }
  }

  /// Publishes what `pushUsed` wrote.
  ///
  /// - Returns: whether the driver wants an interrupt for it (virtio 1.2, 2.7.7, 2.7.10 and 2.8.10).
  package mutating func publish() -> Bool {
    guard unpublished > 0 else { return false }
    defer { unpublished = 0 }
    journal?.intend(layout.nextUsed)
    let wantsInterrupt = isPacked ? publishPacked() : publishSplit()
    if !isPacked { releasePublished() }
    if let journal { settle(journal) }
    return wantsInterrupt
  }

  /// Notes that the driver has all answers so far.
  private mutating func settle(_ journal: QueueJournal) {
    journal.settle(layout.nextUsed, wrap: layout.usedWrapCounter)
    for index in 0..<usedSlotCount { journal.free(Int(usedSlots[index])) }
    unsettled = 0
  }

  /// Whether chains were used since the last `publish`.
  package var hasUnpublished: Bool { mutating get { unpublished > 0 } }

  /// The next slot of the journal whose chain's answer is published; nil when there is none. To be asked after `publish`.
  package mutating func takePublishedSlot() -> Int? {
    guard unpublished == 0, usedSlotCount > 0 else { return nil }
    usedSlotCount &-= 1
    return Int(usedSlots[usedSlotCount])
  }

  /// Notes a chain that was taken, whose ticket has its slot, in the journal. Its buffers are in the journal's storage.
  package mutating func note(_ chain: DescriptorChain) { journal?.take(Int(chain.ticket.slot), chain) }

  // MARK: Adoption

  /// Takes over the chains of the journal, once: the queue's positions become what they were.
  ///
  /// Called behind `prepare`.
  /// - Returns: every chain without a published answer, oldest first; their buffers are in the journal.
  /// - Throws: `badLayout` when rings and journal do not fit together: then nothing can be known, and the driver must reset.
  package mutating func adopt() throws(VirtqueueFault) -> [AdoptedChain] {
    guard adopts, let journal else { return [] }
    guard journal.isPacked == isPacked else { throw .badLayout }
    adopts = false
    if isPacked { try adoptPositionPacked(journal) } else { try adoptPositionSplit(journal) }
    layout.nextAvailable = layout.nextUsed
    layout.availableWrapCounter = layout.usedWrapCounter
    var slots: [Int] = []
    for slot in 0..<journal.slotCount {
      let record = journal.record(slot)
      switch record.state {
      case QueueJournal.State.used where isPublished(record): journal.free(slot)
      case QueueJournal.State.free: break
      default:
        // Another chain may be answered at the position that was noted for this one: the next owner must not take this for published then.
        journal.forgetAnswer(slot)
        slots.append(slot)
      }
    }
    slots.sort { journal.record($0).order < journal.record($1).order }
    var chains: [AdoptedChain] = []
    for slot in slots {
      let record = journal.record(slot)
      guard Int(record.readableCount) + Int(record.writableCount) <= chainLimit, record.slots > 0 else {
        throw .badLayout
      }
      var ticket = ChainTicket(head: record.head, slots: record.slots)
      ticket.slot = UInt32(slot)
      if isPacked { try advancePacked(ticket) } else { try advanceSplit(ticket) }
      if order.isKept { ticket.sequence = order.issue() }
      chains.append(
        AdoptedChain(
          ticket: ticket, readableCount: Int(record.readableCount), writableCount: Int(record.writableCount)))
    }
    return chains
  }

  private func isPublished(_ record: QueueJournal.Record) -> Bool {
    isPacked ? isPublishedPacked(record) : layout.nextUsed &- record.usedPosition &- 1 < 0x8000
  }

  // MARK: Descriptors

  /// Reads the table that an indirect descriptor names, behind what `chain` has so far.
  ///
  /// In a split table entries are linked by `next`; in a packed one they follow each other (virtio 1.2, 2.7.5.3 and 2.8.7).
  mutating func readIndirect(
    _ descriptor: Descriptor, _ memory: inout GuestMemoryView, _ chain: inout DescriptorChain
  ) throws(VirtqueueFault) {
    guard indirect else { throw .indirectNotNegotiated }
    guard !descriptor.hasNext else { throw .nestedIndirect }
    guard descriptor.length > 0, descriptor.length & 15 == 0, Int(descriptor.length) <= chainLimit &* 16 else {
      throw .badIndirectTable(length: descriptor.length)
    }
    // Where it lies in one piece it is read in place, as the ring is: each entry once, into a copy that is checked and used.
    var table = indirectTable
    do throws(GuestMemoryFault) {
      if descriptor.address & 15 == 0, let place = try memory.piece(descriptor.address, Int(descriptor.length)) {
        table = place
      } else {
        try memory.copyIn(from: descriptor.address, to: indirectTable, count: Int(descriptor.length))
      }
    } catch {
      throw .ringUnmapped
    }
    let count = Int(descriptor.length >> 4)
    if isPacked {
      for index in 0..<count {
        let entry = Descriptor(copying: table + 16 &* index, packed: true)
        guard !entry.isIndirect else { throw .nestedIndirect }
        try append(entry, &chain)
      }
    } else {
      guard try walkSplit(table, count: count, from: 0, &chain) == nil else { throw .nestedIndirect }
    }
  }

  mutating func append(_ descriptor: Descriptor, _ chain: inout DescriptorChain) throws(VirtqueueFault) {
    let index = chain.readableCount &+ chain.writableCount
    guard index < chainLimit else { throw .chainTooLong }
    let length = UInt64(descriptor.length)
    guard !descriptor.address.addingReportingOverflow(length).overflow else { throw .bufferOverflow }
    let buffer = GuestBuffer(address: descriptor.address, length: descriptor.length)
    chain.buffers[index] = buffer
    if descriptor.isWritable {
      chain.writableCount &+= 1
      chain.writableBytes &+= length
    } else {
      guard chain.writableCount == 0 else { throw .readableAfterWritable }
      chain.readableCount &+= 1
      chain.readableBytes &+= length
    }
  }
}
