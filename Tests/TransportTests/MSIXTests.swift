import EventLoop
import Synchronization
import TestSupport
import Testing

@testable import Transport

@Suite struct MSIXTests {
  /// Linux on Xen with pirqs never touches the mask bits: an event channel masks in their place.
  @Test(
    arguments: [
      (0xfee0_7000, 0, false), (0x0000_0100_fee0_0000, 0x4700, false), (0xfee0_0000, 0, true),
      (0xfee0_7000, 0x31, true),
      (0, 0, true),
    ] as [(UInt64, UInt32, Bool)]) func eventChannelsAreNotMaskedByTheTable(address: UInt64, data: UInt32, waits: Bool)
  {
    let vector = MSIXVector()
    let entry = MSIXTable.Entry(message: MSIMessage(address: address, data: data))
    #expect(entry.isMasked)
    _ = vector.set(entry, isMasked: false, isOff: false)
    #expect((vector.raise() == .pending) == waits)
    // The mask of the whole function holds for all.
    _ = vector.set(entry, isMasked: true, isOff: false)
    #expect(vector.raise() == .pending)
  }

  private func entry(_ number: UInt64, masked: Bool = false) -> MSIXTable.Entry {
    MSIXTable.Entry(message: MSIMessage(address: number, data: UInt32(number)), isMasked: masked)
  }

  @Test func tableTakesAlignedWordsAndNothingElse() {
    var table = MSIXTable(count: 2)
    #expect(table.read(12, 4) == 1)
    #expect(table.write(0, 4, 0xfee0_1007) == 0)
    #expect(table.write(16 + 8, 8, 0x0000_0000_1234_5678) == 1)
    #expect(table.entries[1].message.data == 0x1234_5678)
    #expect(!table.entries[1].isMasked)
    #expect(table.read(0, 8) == 0xfee0_1004)
    for (offset, width) in [(1, 4), (2, 2), (0, 1), (4, 8), (32, 4), (0x7fc, 4), (0, 3)] {
      let before = table
      #expect(table.write(offset, width, .max) == nil)
      #expect(table == before)
    }
    #expect(table.read(32, 8) == 0)
    // All 64 bits of the address belong to the driver.
    #expect(table.write(16, 8, 0xffff_ffff_fee0_0000) == 1)
    #expect(table.entries[1].message.address == 0xffff_ffff_fee0_0000)
  }

  @Test func maskedVectorWaitsAndIsSentOnce() {
    let vector = MSIXVector()
    #expect(vector.raise() == .off)
    #expect(vector.set(entry(7), isMasked: false, isOff: false) == nil)
    #expect(vector.raise() == .send(MSIMessage(address: 7, data: 7)))
    #expect(vector.set(entry(7, masked: true), isMasked: false, isOff: false) == nil)
    #expect(vector.raise() == .pending)
    #expect(vector.raise() == .pending)
    #expect(vector.isPending)
    #expect(vector.set(entry(8, masked: true), isMasked: false, isOff: false) == nil)
    #expect(vector.set(entry(9), isMasked: true, isOff: false) == nil)
    #expect(vector.set(entry(9), isMasked: false, isOff: false) == MSIMessage(address: 9, data: 9))
    #expect(!vector.isPending)
    #expect(vector.set(entry(9), isMasked: false, isOff: false) == nil)
  }

  @Test func clearTakesBackWhatIsPending() {
    let vector = MSIXVector()
    _ = vector.set(entry(1, masked: true), isMasked: false, isOff: false)
    #expect(vector.raise() == .pending)
    let (first, second) = (vector.clear(), vector.clear())
    #expect(first)
    #expect(!second)
    #expect(vector.set(entry(1), isMasked: false, isOff: false) == nil)
  }

  /// One thread raises, another rewrites, masks and unmasks: each raise is sent at once or by the next unmasking, and no message is half of
  /// one and half of another.
  @Test func messagesAreNeitherLostNorTorn() throws {
    let vector = MSIXVector()
    let rounds = 200_000
    final class Counts: Sendable {
      let raises = Atomic<Int>(0)
      let torn = Atomic<Int>(0)
      let sent = Atomic<Int>(0)
      let isOver = Atomic<Bool>(false)
      func count(_ message: MSIMessage) {
        sent.wrappingAdd(1, ordering: .relaxed)
        if message.address & 0xffff_ffff != UInt64(message.data) { torn.wrappingAdd(1, ordering: .relaxed) }
      }
    }
    let counts = Counts()
    let thread = try LoopThread(name: "raiser")
    thread.loop.enqueue {
      while !counts.isOver.load(ordering: .relaxed) {
        switch vector.raise() {
        case .send(let message): counts.count(message)
        case .pending, .off: break
        }
        counts.raises.wrappingAdd(1, ordering: .relaxed)
      }
    }
    for round in 1...rounds {
      let number = UInt64(truncatingIfNeeded: round &* 2_654_435_761) & 0xffff_ffff
      let entry = MSIXTable.Entry(
        message: MSIMessage(address: number | number << 32, data: UInt32(number)), isMasked: round % 3 == 0)
      if let due = vector.set(entry, isMasked: round % 7 == 0, isOff: false) { counts.count(due) }
    }
    #expect(eventually { counts.raises.load(ordering: .relaxed) > 1000 })
    counts.isOver.store(true, ordering: .relaxed)
    thread.stopAndJoin()
    #expect(counts.torn.load(ordering: .relaxed) == 0)
    // What was raised last while masked is there still.
    _ = vector.set(entry(1, masked: true), isMasked: false, isOff: false)
    #expect(vector.raise() == .pending)
    #expect(vector.set(entry(1), isMasked: false, isOff: false) == MSIMessage(address: 1, data: 1))
    #expect(counts.sent.load(ordering: .relaxed) > 0)
  }
}
