import Synchronization

/// The split format (virtio 1.2, 2.7): descriptor table, available ring in the driver area, used ring in the device area.
extension Virtqueue {
  private var mask: UInt16 { layout.size &- 1 }

  mutating func nextSplit(
    _ memory: inout GuestMemoryView, _ chain: inout DescriptorChain
  ) throws(VirtqueueFault) -> Bool {
    guard let available = driverArea, let table = descriptors?.start else { throw .ringUnmapped }
    let pending = RingWord.acquire(available.start, 2) &- layout.nextAvailable
    guard pending != 0 else { return false }
    guard pending <= layout.size else { throw .availableIndexJumped(pending: pending) }
    let slot = 4 &+ 2 &* Int(layout.nextAvailable & mask)
    let head = RingWord.load(available.start, slot)
    guard head < layout.size else { throw .headOutOfRange(head) }
    guard claim(head) else { throw .headInUse(head) }
    layout.nextAvailable &+= 1
    markTaken(head)
    chain.ticket = ChainTicket(head: head, slots: 1)
    if let last = try walkSplit(table, count: Int(layout.size), from: Int(head), &chain) {
      try readIndirect(last, &memory, &chain)
    }
    return true
  }

  /// - Returns: false when the device has the head already.
  private mutating func claim(_ head: UInt16) -> Bool {
    // By a pointer of its own: Swift 6.3 makes invalid code of `inUse[index] |= bit` under ThreadSanitizer.
    let word = inUse + Int(head >> 6)
    let bit: UInt64 = 1 << UInt64(head & 63)
    guard word.pointee & bit == 0 else { return false }
    word.pointee |= bit
    return true
  }

  private mutating func disclaim(_ head: UInt16) {
    let word = inUse + Int(head >> 6)
    word.pointee &= ~(1 << UInt64(head & 63))
  }

  mutating func putBackSplit(_ ticket: ChainTicket) {
    disclaim(ticket.head)
    mark(ticket.head, 0)
    layout.nextAvailable &-= 1
  }

  // MARK: Adoption

  /// The used index in the ring is what the driver has seen. It is one of two: publishing was done, or it was not.
  mutating func adoptPositionSplit(_ journal: QueueJournal) throws(VirtqueueFault) {
    guard let deviceArea else { throw .ringUnmapped }
    let published = RingWord.acquire(deviceArea.start, 2)
    guard published == journal.intendedUsed || published == journal.settledUsed else { throw .badLayout }
    layout.nextUsed = published
    journal.settle(published, wrap: true)
  }

  /// Any value will do: what it makes of the available ring is checked chain by chain.
  mutating func continueFromUsedRing() {
    guard !isPacked, let deviceArea else { return }
    layout.nextUsed = RingWord.acquire(deviceArea.start, 2)
    layout.nextAvailable = layout.nextUsed
  }

  mutating func advanceSplit(_ ticket: ChainTicket) throws(VirtqueueFault) {
    guard ticket.head < layout.size else { throw .headOutOfRange(ticket.head) }
    guard claim(ticket.head) else { throw .headInUse(ticket.head) }
    markTaken(ticket.head)
    layout.nextAvailable &+= 1
  }

  // MARK: In-flight area

  /// Says in the in-flight area that the device has a chain: what the driver needs to end its requests when the device is gone for
  /// good. The word of a head is 1 from then on, 0x10000 plus the position of its answer before that is published, 0 afterwards.
  /// The device never reads it.
  mutating func markTaken(_ head: UInt16) { mark(head, 1) }

  private mutating func mark(_ head: UInt16, _ value: UInt32) {
    guard let inFlightArea, head < layout.size else { return }
    inFlightArea.start.storeBytes(of: value.littleEndian, toByteOffset: 4 &* Int(head), as: UInt32.self)
  }

  /// Behind `publish`: the answers are the driver's, and it may use their heads again.
  mutating func releasePublished() {
    // By pointers of their own, see `claim`.
    let (claims, heads, count) = (inUse, usedHeads, unpublished)
    let words = Int(layout.size &+ 63) >> 6
    if layout.nextAvailable == layout.nextUsed, words <= count {
      // The device has no others: cheaper than one by one.
      for word in 0..<words { claims[word] = 0 }
    } else {
      for index in 0..<count {
        let head = heads[index]
        claims[Int(head &>> 6)] &= ~(1 &<< UInt64(head & 63))
      }
    }
    guard inFlightArea != nil else { return }
    for index in 0..<count { mark(heads[index], 0) }
  }

  /// Follows a chain through a table of `count` entries, from the entry `start`, which is below `count`.
  ///
  /// - Returns: the indirect descriptor that ends the chain in this table, if one does (virtio 1.2, 2.7.5.3.2: direct
  ///   descriptors may come before it).
  mutating func walkSplit(
    _ table: UnsafeMutableRawPointer, count: Int, from start: Int, _ chain: inout DescriptorChain
  ) throws(VirtqueueFault) -> Descriptor? {
    var index = start
    var steps = 0
    while true {
      let descriptor = Descriptor(copying: table + 16 &* index)
      if descriptor.isIndirect { return descriptor }
      // A chain visits each entry once at most; `append` limits it too, but not by this table's length.
      guard steps < count else { throw .chainTooLong }
      steps &+= 1
      try append(descriptor, &chain)
      guard descriptor.hasNext else { return nil }
      guard Int(descriptor.next) < count else { throw .nextOutOfRange(descriptor.next) }
      index = Int(descriptor.next)
    }
  }

  mutating func hasPendingSplit() -> Bool {
    guard let driverArea else { return false }
    return RingWord.acquire(driverArea.start, 2) != layout.nextAvailable
  }

  mutating func pendingCountSplit() -> Int {
    guard let driverArea else { return 0 }
    return Int(RingWord.acquire(driverArea.start, 2) &- layout.nextAvailable)
  }

  mutating func disableNotificationsSplit() {
    guard !eventIndex, let deviceArea else { return }
    RingWord.store(1, deviceArea.start, 0)  // VIRTQ_USED_F_NO_NOTIFY
  }

  mutating func enableNotificationsSplit(behind known: UInt16 = 0) -> Bool {
    guard let deviceArea, let driverArea else { return false }
    let expected = layout.nextAvailable &+ known
    if eventIndex {
      RingWord.store(expected, deviceArea.start, 4 &+ 8 &* Int(layout.size))
    } else {
      RingWord.store(0, deviceArea.start, 0)
    }
    // The request for a notification must be visible before the index is read again, or a chain could slip between.
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return RingWord.acquire(driverArea.start, 2) != expected
  }

  mutating func pushUsedSplit(_ ticket: ChainTicket, _ length: UInt32) {
    // At most as many as the ring has heads: each stays claimed until `releasePublished`, so `nextSplit` takes none twice before that.
    guard let deviceArea, unpublished < Int(layout.size) else { return }
    usedHeads[unpublished] = ticket.head
    if inFlightArea != nil { mark(ticket.head, 0x10000 | UInt32(layout.nextUsed)) }
    let entry = deviceArea.start + (4 &+ 8 &* Int(layout.nextUsed & mask))
    entry.storeBytes(of: UInt32(ticket.head).littleEndian, as: UInt32.self)
    entry.storeBytes(of: length.littleEndian, toByteOffset: 4, as: UInt32.self)
    layout.nextUsed &+= 1
    unpublished &+= 1
  }

  mutating func publishSplit() -> Bool {
    guard let deviceArea, let driverArea else { return false }
    RingWord.release(layout.nextUsed, deviceArea.start, 2)
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    guard eventIndex else { return RingWord.load(driverArea.start, 0) & 1 == 0 }  // VIRTQ_AVAIL_F_NO_INTERRUPT
    let event = RingWord.load(driverArea.start, 4 &+ 2 &* Int(layout.size))
    return Int(layout.nextUsed &- event &- 1) < unpublished
  }
}
