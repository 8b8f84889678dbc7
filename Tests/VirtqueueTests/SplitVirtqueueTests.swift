import TestSupport
import Testing
import Virtqueue

@Suite struct SplitVirtqueueTests {
  /// Reads the chain of the first published head; what it gives is what `check` sees.
  private func firstChain(
    _ fixture: QueueFixture, features: FeatureBits = [.indirectDescriptors], limit: Int = 16,
    _ check: (DescriptorChain) -> Void = { _ in }
  ) throws(VirtqueueFault) {
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: limit, features: features, source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: queue.chainLimit)
    defer { storage.deallocate() }
    var chain = DescriptorChain(buffers: storage)
    guard try queue.next(memory: &view, into: &chain) else { throw VirtqueueFault.badLayout }
    check(chain)
  }

  @Test func chainKeepsReadableBeforeWritable() throws {
    let fixture = QueueFixture()
    fixture.descriptor(3, 0x20000, 16, flags: 1, next: 5)
    fixture.descriptor(5, 0x21000, 512, flags: 3, next: 1)
    fixture.descriptor(1, 0x22000, 1, flags: 2)
    fixture.publish([3])
    try firstChain(fixture) { chain in
      #expect(chain.ticket.head == 3)
      #expect((chain.readableCount, chain.writableCount) == (1, 2))
      #expect((chain.readableBytes, chain.writableBytes) == (16, 513))
      #expect(chain.writable[1].address == 0x22000)
    }
  }

  @Test func indirectTableCrossingBucketsIsRead() throws {
    let fixture = QueueFixture(bucketShift: 12)
    let table: UInt64 = 0x30000 - 24  // unaligned and across a bucket's border
    fixture.descriptor(at: table, 0x20000, 16, flags: 1, next: 1)
    fixture.descriptor(at: table + 16, 0x21000, 512, flags: 1, next: 2)
    fixture.descriptor(at: table + 32, 0x22000, 1, flags: 2)
    fixture.descriptor(0, table, 48, flags: 4)
    fixture.publish([0])
    try firstChain(fixture) { chain in
      #expect((chain.readableBytes, chain.writableBytes) == (528, 1))
    }
  }

  @Test func directDescriptorsMayEndInAnIndirectTable() throws {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x20000, 16, flags: 1, next: 1)
    fixture.descriptor(1, 0x30000, 16, flags: 4)
    fixture.descriptor(at: 0x30000, 0x21000, 1, flags: 2)
    fixture.publish([0])
    try firstChain(fixture) { chain in
      #expect((chain.readableBytes, chain.writableBytes) == (16, 1))
    }
  }

  @Test func loopIsAFault() {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x20000, 16, flags: 1, next: 1)
    fixture.descriptor(1, 0x20000, 16, flags: 1, next: 0)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.chainTooLong) { try firstChain(fixture) }
  }

  @Test func nextOutOfRangeIsAFault() {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x20000, 16, flags: 1, next: 8)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.nextOutOfRange(8)) { try firstChain(fixture) }
  }

  @Test func headOutOfRangeIsAFault() {
    let fixture = QueueFixture()
    fixture.publish([9])
    #expect(throws: VirtqueueFault.headOutOfRange(9)) { try firstChain(fixture) }
  }

  @Test func availableIndexBeyondTheSizeIsAFault() {
    let fixture = QueueFixture()
    fixture.publish([0], index: 9)
    #expect(throws: VirtqueueFault.availableIndexJumped(pending: 9)) { try firstChain(fixture) }
  }

  @Test func readableBehindWritableIsAFault() {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x20000, 16, flags: 3, next: 1)
    fixture.descriptor(1, 0x20000, 16, flags: 0)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.readableAfterWritable) { try firstChain(fixture) }
  }

  @Test func bufferAtTheEndOfTheAddressSpaceIsAFault() {
    let fixture = QueueFixture()
    fixture.descriptor(0, .max - 8, 16, flags: 0)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.bufferOverflow) { try firstChain(fixture) }
  }

  @Test(arguments: [0, 8, 17, 16 * 17] as [UInt32])
  func indirectTableOfBadLengthIsAFault(length: UInt32) {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x30000, length, flags: 4)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.badIndirectTable(length: length)) { try firstChain(fixture) }
  }

  @Test func indirectInIndirectIsAFault() {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x30000, 16, flags: 4)
    fixture.descriptor(at: 0x30000, 0x31000, 16, flags: 4)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.nestedIndirect) { try firstChain(fixture) }
  }

  @Test func indirectWithoutTheFeatureIsAFault() {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x30000, 16, flags: 4)
    fixture.publish([0])
    #expect(throws: VirtqueueFault.indirectNotNegotiated) { try firstChain(fixture, features: []) }
  }

  @Test func headInUseIsAFault() throws {
    let fixture = QueueFixture()
    fixture.descriptor(0, 0x20000, 16, flags: 0)
    fixture.publish([0, 0])
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: 8, features: [], source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 8)
    defer { storage.deallocate() }
    var chain = DescriptorChain(buffers: storage)
    let isTaken = try queue.next(memory: &view, into: &chain)
    #expect(isTaken)
    #expect(throws: VirtqueueFault.headInUse(0)) { _ = try queue.next(memory: &view, into: &chain) }
  }

  @Test(arguments: [0, 3, 512] as [UInt16])
  func sizeThatIsNoPowerOfTwoOrTooLargeIsRefused(size: UInt16) {
    var layout = QueueLayout()
    layout.size = size
    #expect(throws: VirtqueueFault.badLayout) { try layout.validate(maximum: 256) }
  }

  @Test func unalignedOrOverflowingAreasAreRefused() {
    for change in [
      { (layout: inout QueueLayout) in layout.descriptorArea = 8 }, { $0.driverArea = 1 }, { $0.deviceArea = 2 },
      { $0.descriptorArea = .max - 15 },
    ] {
      var layout = QueueLayout()
      layout.size = 256
      change(&layout)
      #expect(throws: VirtqueueFault.badLayout) { try layout.validate(maximum: 256) }
    }
  }

  @Test func ringsInUnmappedMemoryAreAFault() throws {
    let fixture = QueueFixture()
    fixture.layout.deviceArea = 0x1000_0000
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: 8, features: [], source: fixture.pool)
    let invalidations = view.enter()
    defer { view.leave() }
    #expect(throws: VirtqueueFault.ringUnmapped) { try queue.prepare(invalidations: invalidations) }
  }

  /// virtio 1.2, 2.7.10: an interrupt exactly when the used index passes the driver's event index.
  @Test(arguments: [UInt16(0), 0xfffe]) func interruptFollowsTheEventIndex(start: UInt16) throws {
    let fixture = QueueFixture()
    fixture.layout.nextUsed = start
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: 8, features: [.eventIndex], source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    func setEvent(_ value: UInt16) {
      fixture.domain.memory.pointer(fixture.layout.driverArea).storeBytes(
        of: value, toByteOffset: 4 + 16, as: UInt16.self)
    }
    setEvent(start &+ 1)
    queue.pushUsed(ChainTicket(head: 0, slots: 1), length: 0)
    let wanted0 = queue.publish()
    #expect(!wanted0)
    queue.pushUsed(ChainTicket(head: 1, slots: 1), length: 0)
    let wanted1 = queue.publish()
    #expect(wanted1)
    queue.pushUsed(ChainTicket(head: 2, slots: 1), length: 0)
    let wanted2 = queue.publish()
    #expect(!wanted2)
  }

  /// Whatever bytes the driver writes, taking chains ends in a chain or a fault.
  @Test(arguments: UInt64(1)...200) func anyRingContentYieldsChainsOrAFault(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let fixture = QueueFixture(size: 16)
    for area in [fixture.layout.descriptorArea, fixture.layout.driverArea] {
      for word in 0..<64 {
        // Small numbers among the random ones, so that chains get further than their first check.
        let value = random.next() & (Bool.random(using: &random) ? .max : 0x0007_0007_0000_fff0)
        fixture.domain.memory.pointer(area).storeBytes(of: value, toByteOffset: word * 8, as: UInt64.self)
      }
    }
    fixture.domain.memory.pointer(fixture.layout.driverArea).storeBytes(
      of: UInt16.random(in: 0...20, using: &random), toByteOffset: 2, as: UInt16.self)
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: 32, features: [.indirectDescriptors, .eventIndex],
      source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 32)
    defer { storage.deallocate() }
    var taken = 0
    do throws(VirtqueueFault) {
      var chain = DescriptorChain(buffers: storage)
      while try queue.next(memory: &view, into: &chain) {
        #expect(chain.ticket.head < 16, "seed \(seed)")
        #expect(chain.readableCount + chain.writableCount <= 32, "seed \(seed)")
        queue.pushUsed(chain.ticket, length: 0)
        taken += 1
        guard taken < 100 else { break }
      }
    } catch {
      #expect(!error.message.isEmpty)
    }
    _ = queue.publish()
  }
}
