import HostMemory
import Virtqueue

/// A request that the device works on: one slot of the slab, reused without allocation.
struct BlockOperationRecord: BitwiseCopyable {
  /// The life of the queue that the request belongs to: completions of an older one are dropped.
  var life: UInt32 = 0
  var ticket = ChainTicket(head: 0, slots: 0)
  var kind: BlockOperation = .flush
  var statusAddress: UInt64 = 0
  /// Byte on the disk, and bytes of data in all, done, and in the step under way.
  var offset: UInt64 = 0
  var dataBytes: UInt64 = 0
  var doneBytes: UInt64 = 0
  var stepBytes: UInt64 = 0
  var readableCount = 0
  var writableCount = 0
  /// Bounce buffers of the step; none when the data moves straight to and from guest memory.
  var bufferCount = 0
  /// Vectors of the step.
  var vectorCount = 0
  /// Discard, write-zeroes and secure erase: ranges in all, and the next one.
  var rangeCount = 0
  var nextRange = 0
  /// Bytes that the used element reports.
  var written: UInt32 = 0
  /// Time of the first failure of the step, in nanoseconds; 0 when it has not failed.
  var failedSince: UInt64 = 0
  /// The step makes something durable.
  var flushes = false
  /// The engine works on a step of it.
  var isWithEngine = false
  /// It has a place in the budget tree, to be given back.
  var isCharged = false
  /// Monotonic nanoseconds: when its rate let it through, and when the first step went to the engine; 0 before.
  var admittedAt: UInt64 = 0
  var submittedAt: UInt64 = 0
}

/// Fixed storage for the requests of one queue: records, guest buffers, vectors, bounce buffer numbers.
struct OperationSlab: ~Copyable {
  /// Bounce buffers and so vectors of one step: up to 1 MiB at a time.
  static let buffersPerStep = 16

  /// A range of the disk, for a request that names several.
  struct Range: BitwiseCopyable {
    var offset: UInt64
    var length: UInt64
    var mayUnmap: Bool
  }

  /// A slot's place in the order of age.
  private struct Link: BitwiseCopyable {
    var older: Int32
    var newer: Int32
    var since: UInt64
    var isBusy = false
  }

  let count: Int
  let chainLimit: Int
  let records: UnsafeMutablePointer<BlockOperationRecord>
  /// Where the chains' buffers are.
  private let journal: QueueJournal
  // Written before they are read, and left untouched until then: a slab of an idle queue costs no memory.
  private let tables: UntouchedMemory
  private let vectorStorage: UnsafeMutablePointer<DataVector>
  private let bounceNumbers: UnsafeMutablePointer<UInt32>
  private let rangeStorage: UnsafeMutablePointer<Range>
  private let links: UnsafeMutablePointer<Link>
  private let free: UnsafeMutablePointer<UInt32>
  private(set) var freeCount: Int
  /// Slots below it have memory for their buffers in the journal.
  private var backed = 0
  private var oldest: Int32 = -1
  private var newest: Int32 = -1

  init(journal: QueueJournal) {
    self.journal = journal
    count = journal.slotCount
    chainLimit = journal.chainLimit
    let vectors = count * chainLimit
    let bounces = count * Self.buffersPerStep
    let ranges = count * BlockConfiguration.rangesMaximum
    var tables = UntouchedMemory(
      bytes: UntouchedMemory.bytes(BlockOperationRecord.self, count) + UntouchedMemory.bytes(DataVector.self, vectors)
        + UntouchedMemory.bytes(UInt32.self, bounces) + UntouchedMemory.bytes(Range.self, ranges)
        + UntouchedMemory.bytes(Link.self, count) + UntouchedMemory.bytes(UInt32.self, count))
    records = tables.take(BlockOperationRecord.self, count)
    vectorStorage = tables.take(DataVector.self, vectors)
    bounceNumbers = tables.take(UInt32.self, bounces)
    rangeStorage = tables.take(Range.self, ranges)
    links = tables.take(Link.self, count)
    free = tables.take(UInt32.self, count)
    self.tables = tables
    for index in 0..<count { free[index] = UInt32(count - 1 - index) }
    freeCount = count
  }

  var busyCount: Int { count &- freeCount }

  /// When the oldest slot in use was taken; 0 when none is.
  var oldestSince: UInt64 { oldest < 0 ? 0 : links[Int(oldest)].since }

  /// Nil when none is free, or there is no memory for its buffers: then one that is in use serves later.
  ///
  /// - Parameter now: monotonic time in nanoseconds.
  mutating func take(at now: UInt64) -> Int? {
    guard freeCount > 0 else { return nil }
    let slot = Int(free[freeCount &- 1])
    guard slot < backed || back(slot) else { return nil }
    freeCount &-= 1
    enlist(slot, now)
    return slot
  }

  /// Takes a certain slot, when it is free: for a chain that an earlier owner of the journal has there. Not for the data path.
  mutating func take(_ slot: Int, at now: UInt64) -> Bool {
    guard slot < count, !links[slot].isBusy, let place = (0..<freeCount).first(where: { Int(free[$0]) == slot }) else {
      return false
    }
    freeCount &-= 1
    free[place] = free[freeCount]
    enlist(slot, now)
    return true
  }

  /// Memory for a slot's buffers and those of some behind it: a few times in the life of a queue.
  private mutating func back(_ slot: Int) -> Bool {
    let first = QueueJournal.slotsAtFirst(count)
    let end = min(count, slot + first)
    // What a new journal has from the start is not asked for, so that there is always a slot.
    guard slot < first || journal.back(backed..<end) else { return false }
    backed = slot < first ? first : end
    return true
  }

  private mutating func enlist(_ slot: Int, _ now: UInt64) {
    let place = Int32(truncatingIfNeeded: slot)
    links[slot] = Link(older: newest, newer: -1, since: now, isBusy: true)
    if newest >= 0 { links[Int(newest)].newer = place } else { oldest = place }
    newest = place
  }

  func isBusy(_ slot: Int) -> Bool { links[slot].isBusy }

  /// When a slot in use was taken.
  func since(_ slot: Int) -> UInt64 { links[slot].since }

  mutating func give(_ slot: Int) {
    let link = links[slot]
    links[slot].isBusy = false
    if link.older >= 0 { links[Int(link.older)].newer = link.newer } else { oldest = link.newer }
    if link.newer >= 0 { links[Int(link.newer)].older = link.older } else { newest = link.older }
    free[freeCount] = UInt32(truncatingIfNeeded: slot)
    freeCount &+= 1
  }

  func buffers(_ slot: Int) -> UnsafeMutablePointer<GuestBuffer> { journal.buffers(slot) }
  func vectors(_ slot: Int) -> UnsafeMutablePointer<DataVector> { vectorStorage + slot &* chainLimit }
  func bounce(_ slot: Int) -> UnsafeMutablePointer<UInt32> { bounceNumbers + slot &* Self.buffersPerStep }
  func ranges(_ slot: Int) -> UnsafeMutablePointer<Range> { rangeStorage + slot &* BlockConfiguration.rangesMaximum }
}
