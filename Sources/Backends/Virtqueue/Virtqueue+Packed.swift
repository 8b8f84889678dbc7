import Synchronization

/// The packed format (virtio 1.2, 2.8): one ring of descriptors that both sides write, and an event suppression structure each.
///
/// Positions run through the ring and a wrap counter flips with each lap. A chain occupies as many slots as it has descriptors
/// in the ring; one used descriptor, in the first slot of the next used run, answers it.
extension Virtqueue {
  private static var available: UInt16 { 1 << 7 }  // VIRTQ_DESC_F_AVAIL
  private static var used: UInt16 { 1 << 15 }  // VIRTQ_DESC_F_USED
  /// RING_EVENT_FLAGS_*: 0 enable, 1 disable, 2 at the descriptor of the offset field.
  private static var disableEvents: UInt16 { 1 }
  private static var eventAtDescriptor: UInt16 { 2 }

  mutating func nextPacked(
    _ memory: inout GuestMemoryView, _ chain: inout DescriptorChain
  ) throws(VirtqueueFault) -> Bool {
    guard let ring = descriptors?.start else { throw .ringUnmapped }
    guard isAvailable(ring, layout.nextAvailable, layout.availableWrapCounter) else { return false }
    var position = Int(layout.nextAvailable)
    var slots = 0
    while true {
      // More than the ring has, with what the device still works on: the driver took slots back that it had given away.
      guard occupied &+ slots < Int(layout.size) else { throw .ringOverrun }
      let descriptor = Descriptor(copying: ring + 16 &* position, packed: true)
      slots &+= 1
      position = position &+ 1 == Int(layout.size) ? 0 : position &+ 1
      if descriptor.isIndirect {
        chain.ticket = ChainTicket(head: descriptor.bufferID, slots: UInt16(truncatingIfNeeded: slots))
        try readIndirect(descriptor, &memory, &chain)
        break
      }
      try append(descriptor, &chain)
      if !descriptor.hasNext {
        chain.ticket = ChainTicket(head: descriptor.bufferID, slots: UInt16(truncatingIfNeeded: slots))
        break
      }
    }
    if position <= Int(layout.nextAvailable) { layout.availableWrapCounter.toggle() }
    layout.nextAvailable = UInt16(truncatingIfNeeded: position)
    occupied &+= slots
    return true
  }

  private mutating func isAvailable(_ ring: UnsafeMutableRawPointer, _ position: UInt16, _ wrap: Bool) -> Bool {
    let flags = RingWord.acquire(ring, 16 &* Int(position) &+ 14)
    return (flags & Self.available != 0) == wrap && (flags & Self.used != 0) != wrap
  }

  mutating func putBackPacked(_ ticket: ChainTicket) {
    let slots = Int(ticket.slots)
    occupied &-= slots
    var position = Int(layout.nextAvailable) &- slots
    if position < 0 {
      position &+= Int(layout.size)
      layout.availableWrapCounter.toggle()
    }
    layout.nextAvailable = UInt16(truncatingIfNeeded: position)
  }

  // MARK: Adoption

  /// Answers of a packed ring are seen one by one: those behind the settled position count as far as they stand in the ring.
  mutating func adoptPositionPacked(_ journal: QueueJournal) throws(VirtqueueFault) {
    guard let ring = descriptors?.start else { throw .ringUnmapped }
    guard journal.settledUsed < layout.size else { throw .badLayout }
    layout.nextUsed = journal.settledUsed
    layout.usedWrapCounter = journal.usedWrap
    // Each step finds another record, so this ends.
    for _ in 0..<journal.slotCount {
      let next = (0..<journal.slotCount).first { slot in
        let record = journal.record(slot)
        return record.state == QueueJournal.State.used && record.usedPosition == layout.nextUsed
          && (record.usedWrap == 1) == layout.usedWrapCounter
      }
      // Not written yet: the slot still shows the driver's descriptor of this lap.
      guard let next, !isAvailable(ring, layout.nextUsed, layout.usedWrapCounter) else { break }
      let slots = journal.record(next).slots
      guard slots > 0, slots <= layout.size else { throw .badLayout }
      advanceUsed(Int(slots))
    }
    journal.settle(layout.nextUsed, wrap: layout.usedWrapCounter)
  }

  /// Whether an answer lies behind the used position, within a lap.
  func isPublishedPacked(_ record: QueueJournal.Record) -> Bool {
    let size = Int(layout.size)
    func place(_ position: UInt16, _ wrap: Bool) -> Int { Int(position) + (wrap ? 0 : size) }
    let distance =
      (place(layout.nextUsed, layout.usedWrapCounter) - place(record.usedPosition, record.usedWrap == 1) + 2 * size)
      % (2 * size)
    return distance > 0 && distance <= size
  }

  mutating func advancePacked(_ ticket: ChainTicket) throws(VirtqueueFault) {
    guard occupied &+ Int(ticket.slots) <= Int(layout.size) else { throw .ringOverrun }
    occupied &+= Int(ticket.slots)
    var position = Int(layout.nextAvailable) &+ Int(ticket.slots)
    if position >= Int(layout.size) {
      position &-= Int(layout.size)
      layout.availableWrapCounter.toggle()
    }
    layout.nextAvailable = UInt16(truncatingIfNeeded: position)
  }

  mutating func hasPendingPacked() -> Bool {
    guard let ring = descriptors?.start else { return false }
    return isAvailable(ring, layout.nextAvailable, layout.availableWrapCounter)
  }

  mutating func disableNotificationsPacked() {
    guard let deviceArea else { return }
    RingWord.store(Self.disableEvents, deviceArea.start, 2)
  }

  mutating func enableNotificationsPacked() -> Bool {
    guard let deviceArea else { return false }
    if eventIndex {
      let wrap: UInt16 = layout.availableWrapCounter ? 1 << 15 : 0
      RingWord.store(layout.nextAvailable | wrap, deviceArea.start, 0)
      RingWord.release(Self.eventAtDescriptor, deviceArea.start, 2)
    } else {
      RingWord.store(0, deviceArea.start, 2)
    }
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return hasPendingPacked()
  }

  mutating func pushUsedPacked(_ ticket: ChainTicket, _ length: UInt32) {
    let slots = Int(ticket.slots)
    occupied &-= slots
    guard let ring = descriptors?.start else { return }
    let offset = 16 &* Int(layout.nextUsed)
    (ring + offset).storeBytes(of: length.littleEndian, toByteOffset: 8, as: UInt32.self)
    RingWord.store(ticket.head, ring, offset &+ 12)
    let lap: UInt16 = layout.usedWrapCounter ? Self.available | Self.used : 0
    RingWord.release(lap | (length > 0 ? 2 : 0), ring, offset &+ 14)
    advanceUsed(slots)
    unpublished &+= slots
  }

  private mutating func advanceUsed(_ slots: Int) {
    var position = Int(layout.nextUsed) &+ slots
    if position >= Int(layout.size) {
      position &-= Int(layout.size)
      layout.usedWrapCounter.toggle()
    }
    layout.nextUsed = UInt16(truncatingIfNeeded: position)
  }

  mutating func publishPacked() -> Bool {
    guard let driverArea else { return false }
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    let flags = RingWord.acquire(driverArea.start, 2) & 3
    guard flags == Self.eventAtDescriptor, eventIndex else { return flags != Self.disableEvents }
    let event = RingWord.load(driverArea.start, 0)
    // The event's slot on the scale of the present lap: that of another wrap counter lies a lap behind.
    let isThisLap = (event >> 15 == 1) == layout.usedWrapCounter
    let slot = Int(event & 0x7fff) &- (isThisLap ? 0 : Int(layout.size))
    let passed = Int(layout.nextUsed) &- slot &- 1
    return passed >= 0 && passed < unpublished || unpublished >= Int(layout.size)
  }
}
