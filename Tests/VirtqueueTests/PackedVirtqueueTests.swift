import TestSupport
import Testing
import Virtqueue

@Suite struct PackedVirtqueueTests {
  private static let available: UInt16 = 1 << 7
  private static let used: UInt16 = 1 << 15

  private func fixture(size: UInt16 = 8) -> QueueFixture {
    let fixture = QueueFixture(size: size)
    fixture.layout.driverArea = 0x9000
    fixture.layout.deviceArea = 0xb000
    return fixture
  }

  /// Writes an entry of the ring as a driver in its first lap does.
  private func put(
    _ fixture: QueueFixture, _ slot: Int, _ address: UInt64, _ length: UInt32, id: UInt16 = 0, flags: UInt16
  ) {
    fixture.domain.memory.putDescriptor(
      at: fixture.layout.descriptorArea + UInt64(slot) * 16, address, length, id, flags)
  }

  /// Takes chains until there is none, or one is wrong.
  private func take(
    _ fixture: QueueFixture, features: FeatureBits = [.ringPacked, .indirectDescriptors], limit: Int = 16,
    _ body: (DescriptorChain) -> Void = { _ in }
  ) throws(VirtqueueFault) {
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: limit, features: features, source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: limit)
    defer { storage.deallocate() }
    var chain = DescriptorChain(buffers: storage)
    var count = 0
    while count < 1000, try queue.next(memory: &view, into: &chain) {
      body(chain)
      count += 1
    }
  }

  @Test func emptyRingHasNoChain() throws {
    var count = 0
    try take(fixture()) { _ in count += 1 }
    #expect(count == 0)
  }

  @Test func chainTakesItsNameFromItsLastDescriptor() throws {
    let fixture = fixture()
    put(fixture, 0, 0x20000, 16, id: 1, flags: 1 | Self.available)
    put(fixture, 1, 0x21000, 512, id: 2, flags: 3 | Self.available)
    put(fixture, 2, 0x22000, 1, id: 5, flags: 2 | Self.available)
    var chains: [ChainTicket] = []
    try take(fixture) { chain in
      chains.append(chain.ticket)
      #expect((chain.readableBytes, chain.writableBytes) == (16, 513))
    }
    #expect(chains == [ChainTicket(head: 5, slots: 3)])
  }

  /// 2.8.7: entries of an indirect table follow each other, whatever their NEXT flags say.
  @Test func indirectTableIsReadWhole() throws {
    let fixture = fixture()
    fixture.domain.memory.putDescriptor(at: 0x30000, 0x20000, 16, 0, 0)
    fixture.domain.memory.putDescriptor(at: 0x30010, 0x21000, 512, 0, 2)
    put(fixture, 0, 0x30000, 32, id: 3, flags: 4 | Self.available)
    var count = 0
    try take(fixture) { chain in
      count += 1
      #expect((chain.readableBytes, chain.writableBytes) == (16, 512))
    }
    #expect(count == 1)
  }

  @Test func usedDescriptorsCarryTheLapAndTheWriteFlag() throws {
    let fixture = fixture(size: 2)
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: 4, features: [.ringPacked], source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 4)
    defer { storage.deallocate() }
    var chain = DescriptorChain(buffers: storage)
    func flags(_ slot: Int) -> UInt16 {
      fixture.domain.memory.pointer(fixture.layout.descriptorArea).load(
        fromByteOffset: slot * 16 + 14, as: UInt16.self)
    }
    for lap in 0..<4 {
      let isOdd = lap % 2 == 0
      for slot in 0..<2 {
        put(fixture, slot, 0x20000, 8, id: 7, flags: 2 | (isOdd ? Self.available : Self.used))
        let taken = try queue.next(memory: &view, into: &chain)
        #expect(taken)
        queue.pushUsed(chain.ticket, length: slot == 0 ? 8 : 0)
        let expected: UInt16 = (isOdd ? Self.available | Self.used : 0) | (slot == 0 ? 2 : 0)
        #expect(flags(slot) == expected)
        _ = queue.publish()
      }
    }
  }

  @Test func slotsThatTheDeviceStillHasAreAFault() {
    let fixture = fixture(size: 2)
    // The ring's second lap is made available while the first is unanswered: the flags of lap two in every slot would need
    // the first lap's slots. A driver that lies about the first slot after one lap is caught by the count.
    put(fixture, 0, 0x20000, 8, flags: 1 | Self.available)
    put(fixture, 1, 0x20000, 8, flags: 1 | Self.available)
    #expect(throws: VirtqueueFault.ringOverrun) { try take(fixture) }
  }

  @Test func faultsOfDescriptorsAreFound() {
    let readableLast = fixture()
    put(readableLast, 0, 0x20000, 8, flags: 3 | Self.available)
    put(readableLast, 1, 0x20000, 8, flags: Self.available)
    #expect(throws: VirtqueueFault.readableAfterWritable) { try take(readableLast) }

    let overflow = fixture()
    put(overflow, 0, .max - 4, 8, flags: Self.available)
    #expect(throws: VirtqueueFault.bufferOverflow) { try take(overflow) }

    let nested = fixture()
    nested.domain.memory.putDescriptor(at: 0x30000, 0x31000, 16, 0, 4)
    put(nested, 0, 0x30000, 16, flags: 4 | Self.available)
    #expect(throws: VirtqueueFault.nestedIndirect) { try take(nested) }

    let odd = fixture()
    put(odd, 0, 0x30000, 17, flags: 4 | Self.available)
    #expect(throws: VirtqueueFault.badIndirectTable(length: 17)) { try take(odd) }

    let unwanted = fixture()
    put(unwanted, 0, 0x30000, 16, flags: 4 | Self.available)
    #expect(throws: VirtqueueFault.indirectNotNegotiated) { try take(unwanted, features: [.ringPacked]) }

    let long = fixture(size: 64)
    for slot in 0..<40 { put(long, slot, 0x20000, 8, flags: 1 | Self.available) }
    #expect(throws: VirtqueueFault.chainTooLong) { try take(long) }
  }

  @Test func layoutOfAnySizeIsTakenAndUnalignedAreasAreNot() {
    var layout = QueueLayout()
    for size in [1, 3, 100, 32768] as [UInt16] {
      layout.size = size
      #expect(throws: Never.self) { try layout.validate(maximum: 32768, packed: true) }
    }
    layout.driverArea = 2
    #expect(throws: VirtqueueFault.badLayout) { try layout.validate(maximum: 32768, packed: true) }
    layout.driverArea = 0
    layout.nextUsed = 32768
    #expect(throws: VirtqueueFault.badLayout) { try layout.validate(maximum: 32768, packed: true) }
    layout.nextUsed = 0
    layout.size = 32769
    #expect(throws: VirtqueueFault.badLayout) { try layout.validate(maximum: .max, packed: true) }
  }

  /// 2.8.10: an interrupt exactly when the used position passes the driver's event, across laps.
  @Test func interruptFollowsTheEventAcrossLaps() throws {
    let fixture = fixture(size: 4)
    var view = GuestMemoryView(source: fixture.pool)
    var queue = try Virtqueue(
      layout: fixture.layout, maximumSize: 256, chainLimit: 4, features: [.ringPacked, .eventIndex],
      source: fixture.pool)
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let area = fixture.domain.memory.pointer(fixture.layout.driverArea)
    func setEvent(_ slot: UInt16, lap: Bool) {
      area.storeBytes(of: slot | (lap ? 1 << 15 : 0), as: UInt16.self)
      area.storeBytes(of: 2, toByteOffset: 2, as: UInt16.self)
    }
    func use() -> Bool {
      queue.pushUsed(ChainTicket(head: 0, slots: 1), length: 0)
      return queue.publish()
    }
    setEvent(2, lap: true)
    let first = [use(), use(), use(), use()]
    #expect(first == [false, false, true, false])
    setEvent(1, lap: false)
    let second = [use(), use(), use()]
    #expect(second == [false, true, false])
    area.storeBytes(of: 1, toByteOffset: 2, as: UInt16.self)
    let silent = use()
    #expect(!silent)
    area.storeBytes(of: 0, toByteOffset: 2, as: UInt16.self)
    let loud = use()
    #expect(loud)
  }

  /// Whatever bytes the driver writes, taking chains ends in none, a bounded number, or a fault.
  @Test(arguments: UInt64(1)...200) func anyRingContentYieldsChainsOrAFault(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let fixture = fixture(size: UInt16.random(in: 1...24, using: &random))
    for word in 0..<64 {
      var value = random.next()
      if word % 2 == 1, Bool.random(using: &random) {
        // Plausible flags among the random ones, so that chains get further than their first check.
        value = UInt64(Self.available | UInt16.random(in: 0...7, using: &random)) << 48 | value & 0xffff_0000_0fff
      } else if Bool.random(using: &random) {
        value &= 0xf_fff0
      }
      fixture.domain.memory.pointer(fixture.layout.descriptorArea).storeBytes(
        of: value, toByteOffset: word * 8, as: UInt64.self)
    }
    var taken = 0
    do throws(VirtqueueFault) {
      try take(fixture, limit: 32) { chain in
        taken += 1
        #expect(chain.readableCount + chain.writableCount <= 32, "seed \(seed)")
        #expect(chain.ticket.slots <= fixture.layout.size, "seed \(seed)")
      }
    } catch {
      #expect(!error.message.isEmpty)
    }
    #expect(taken <= Int(fixture.layout.size), "seed \(seed)")
  }
}
