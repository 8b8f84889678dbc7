import Synchronization

/// The device's side of an active split virtqueue (virtio 1.2, 2.7). Confined to one thread.
///
/// The three ring parts are mapped on their own and mapped again, lazily, after an invalidation. Every index and length that
/// the driver writes is read once into a local, and the local is what gets checked and used.
package struct SplitVirtqueue: ~Copyable {
  /// What the queue was set up with; `nextAvailable` and `nextUsed` are kept current.
  package private(set) var layout: QueueLayout
  /// Descriptors in a chain at most, direct and indirect ones alike.
  package let chainLimit: Int
  private let source: any GuestMemorySource
  private let eventIndex: Bool
  private let indirect: Bool
  private let mask: UInt16
  private let indirectTable: UnsafeMutableRawPointer
  /// A bit per head that the device works on: a second use of it is the driver's fault.
  private let inUse: UnsafeMutablePointer<UInt64>

  private var descriptors: RangeMapping?
  private var available: RangeMapping?
  private var used: RangeMapping?
  private var seenInvalidations: UInt64 = .max
  /// The used index as the driver last saw it published.
  private var publishedUsed: UInt16

  /// - Throws: `badLayout`, see `QueueLayout.validate`.
  package init(
    layout: QueueLayout, maximumSize: UInt16, chainLimit: Int, features: FeatureBits, source: any GuestMemorySource
  ) throws(VirtqueueFault) {
    try layout.validate(maximum: maximumSize)
    self.layout = layout
    self.chainLimit = max(chainLimit, Int(layout.size))
    self.source = source
    eventIndex = features.contains(.eventIndex)
    indirect = features.contains(.indirectDescriptors)
    mask = layout.size &- 1
    publishedUsed = layout.nextUsed
    indirectTable = .allocate(byteCount: self.chainLimit * 16, alignment: 16)
    let words = (Int(layout.size) + 63) / 64
    inUse = .allocate(capacity: words)
    inUse.initialize(repeating: 0, count: words)
  }

  deinit {
    for range in [descriptors, available, used] {
      if let range { source.unmapRange(range) }
    }
    indirectTable.deallocate()
    inUse.deallocate()
  }

  /// Makes the rings usable for a batch: maps them at first use and after an invalidation.
  package mutating func prepare(invalidations: UInt64) throws(VirtqueueFault) {
    guard invalidations != seenInvalidations else { return }
    forgetRings()
    do throws(GuestMemoryFault) {
      descriptors = try source.mapRange(address: layout.descriptorArea, length: layout.descriptorBytes)
      available = try source.mapRange(address: layout.driverArea, length: layout.driverBytes)
      used = try source.mapRange(address: layout.deviceArea, length: layout.deviceBytes)
    } catch {
      throw .ringUnmapped
    }
    seenInvalidations = invalidations
  }

  /// Gives the mappings of the rings back; the queue is not used any more.
  package mutating func forgetRings() {
    let ranges = [descriptors, available, used]
    (descriptors, available, used) = (nil, nil, nil)
    for range in ranges { if let range { source.unmapRange(range) } }
    seenInvalidations = .max
  }

  // MARK: Available ring

  /// Takes the head of the next descriptor chain.
  ///
  /// - Returns: `nil` when the driver has published nothing new.
  package mutating func popHead() throws(VirtqueueFault) -> UInt16? {
    guard let available else { throw .ringUnmapped }
    let pending = RingWord.acquire(available.start, 2) &- layout.nextAvailable
    guard pending != 0 else { return nil }
    guard pending <= layout.size else { throw .availableIndexJumped(pending: pending) }
    let slot = 4 &+ 2 &* Int(layout.nextAvailable & mask)
    let head = RingWord.load(available.start, slot)
    guard head < layout.size else { throw .headOutOfRange(head) }
    let bit: UInt64 = 1 << UInt64(head & 63)
    guard inUse[Int(head >> 6)] & bit == 0 else { throw .headInUse(head) }
    inUse[Int(head >> 6)] |= bit
    layout.nextAvailable &+= 1
    return head
  }

  /// Puts the head that was taken last back, as if it had not been taken: the device has no room for it now.
  package mutating func unpop(_ head: UInt16) {
    inUse[Int(head >> 6)] &= ~(1 << UInt64(head & 63))
    layout.nextAvailable &-= 1
  }

  /// Whether chains wait that have not been taken.
  package func hasPending() -> Bool {
    guard let available else { return false }
    return RingWord.acquire(available.start, 2) != layout.nextAvailable
  }

  /// Tells the driver that notifications are not needed for now (virtio 1.2, 2.7.7).
  package mutating func disableNotifications() {
    guard !eventIndex, let used else { return }
    RingWord.store(1, used.start, 0)  // VIRTQ_USED_F_NO_NOTIFY
  }

  /// Asks the driver for a notification of the next chain.
  ///
  /// - Returns: whether chains arrived meanwhile; then they must be taken first.
  package mutating func enableNotifications() -> Bool {
    guard let used else { return false }
    if eventIndex {
      let field = 4 &+ 8 &* Int(layout.size)
      RingWord.store(layout.nextAvailable, used.start, field)
    } else {
      RingWord.store(0, used.start, 0)
    }
    // The request for a notification must be visible before the index is read again, or a chain could slip between.
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return hasPending()
  }

  // MARK: Used ring

  /// Writes a used element; the driver sees it with the next `publish`.
  package mutating func pushUsed(head: UInt16, length: UInt32) {
    inUse[Int(head >> 6)] &= ~(1 << UInt64(head & 63))
    guard let used else { return }
    let entry = used.start + (4 &+ 8 &* Int(layout.nextUsed & mask))
    entry.storeBytes(of: UInt32(head).littleEndian, as: UInt32.self)
    entry.storeBytes(of: length.littleEndian, toByteOffset: 4, as: UInt32.self)
    layout.nextUsed &+= 1
  }

  /// Publishes what `pushUsed` wrote.
  ///
  /// - Returns: whether the driver wants an interrupt for it (virtio 1.2, 2.7.7 and 2.7.10).
  package mutating func publish() -> Bool {
    guard let used, let available, publishedUsed != layout.nextUsed else { return false }
    let old = publishedUsed
    publishedUsed = layout.nextUsed
    RingWord.release(layout.nextUsed, used.start, 2)
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    let wanted: Bool
    if eventIndex {
      let field = 4 &+ 2 &* Int(layout.size)
      let event = RingWord.load(available.start, field)
      wanted = layout.nextUsed &- event &- 1 < layout.nextUsed &- old
    } else {
      wanted = RingWord.load(available.start, 0) & 1 == 0
    }
    return wanted
  }

  // MARK: Descriptors

  /// Copies and checks a whole chain into `chain`: direct descriptors, then possibly one that names an indirect table
  /// (virtio 1.2, 2.7.5.3.2).
  package mutating func read(
    head: UInt16, memory: inout GuestMemoryView, into chain: inout DescriptorChain
  ) throws(VirtqueueFault) {
    guard let table = descriptors?.start else { throw .ringUnmapped }
    chain.clear()
    chain.head = head
    guard let last = try walk(table, count: Int(layout.size), from: Int(head), &chain) else { return }
    guard indirect else { throw .indirectNotNegotiated }
    guard !last.hasNext else { throw .nestedIndirect }
    guard last.length > 0, last.length & 15 == 0, Int(last.length) <= chainLimit &* 16 else {
      throw .badIndirectTable(length: last.length)
    }
    do throws(GuestMemoryFault) {
      try memory.copyIn(from: last.address, to: indirectTable, count: Int(last.length))
    } catch {
      throw .ringUnmapped
    }
    guard try walk(indirectTable, count: Int(last.length >> 4), from: 0, &chain) == nil else { throw .nestedIndirect }
  }

  /// Follows a chain through a table of `count` entries, from the entry `start`, which is below `count`.
  ///
  /// - Returns: the indirect descriptor that ends the chain in this table, if one does.
  private func walk(
    _ table: UnsafeMutableRawPointer, count: Int, from start: Int, _ chain: inout DescriptorChain
  ) throws(VirtqueueFault) -> Descriptor? {
    var index = start
    while true {
      let descriptor = Descriptor(copying: table + 16 &* index)
      if descriptor.isIndirect { return descriptor }
      guard chain.readableCount &+ chain.writableCount < chainLimit else { throw .chainTooLong }
      try append(descriptor, &chain)
      guard descriptor.hasNext else { return nil }
      guard Int(descriptor.next) < count else { throw .nextOutOfRange(descriptor.next) }
      index = Int(descriptor.next)
    }
  }

  private func append(_ descriptor: Descriptor, _ chain: inout DescriptorChain) throws(VirtqueueFault) {
    let length = UInt64(descriptor.length)
    guard !descriptor.address.addingReportingOverflow(length).overflow else { throw .bufferOverflow }
    let buffer = GuestBuffer(address: descriptor.address, length: descriptor.length)
    if descriptor.isWritable {
      chain.buffers[chain.readableCount &+ chain.writableCount] = buffer
      chain.writableCount &+= 1
      chain.writableBytes &+= length
    } else {
      guard chain.writableCount == 0 else { throw .readableAfterWritable }
      chain.buffers[chain.readableCount] = buffer
      chain.readableCount &+= 1
      chain.readableBytes &+= length
    }
  }
}
