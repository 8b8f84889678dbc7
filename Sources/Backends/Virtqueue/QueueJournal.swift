import HostMemory
import Synchronization

/// What must not be forgotten of a live queue when its backend dies in the middle of a batch: the chains that the device has, and
/// how far it has answered.
///
/// The memory is the caller's; when it is that of a file, a later process goes on from it (`Virtqueue.adopt`). Written by the queue's
/// data thread in an order that leaves no gap, whichever store was the last:
///
///     taken      buffers, then the record                      before anything is done for the request
///     used       position of the answer, then the answer       one that is not published is answered again
///     published  how far answers go, then the used index       then the records are free
///
/// Where the device goes on taking chains is not stored: it is the used position plus the chains that the device has.
package struct QueueJournal {
  /// A chain that the device has. 32 bytes.
  struct Record {
    var state: UInt32 = 0
    var head: UInt16 = 0
    var slots: UInt16 = 0
    var readableCount: UInt32 = 0
    var writableCount: UInt32 = 0
    /// The order in which the chains were taken.
    var order: UInt64 = 0
    /// Where the answer stands, when `state` is `used`; the wrap counter of a packed ring in `usedWrap`.
    var usedPosition: UInt16 = 0
    var usedWrap: UInt16 = 0
    var reserved: UInt32 = 0
  }

  /// 64 bytes.
  private struct Header {
    /// What the queue is: see `Condition`.
    var condition: UInt32 = 0
    var slotCount: UInt32 = 0
    var chainLimit: UInt32 = 0
    var packed: UInt32 = 0
    /// Answers that are published for certain, and those that were being published last. One word, `progress`: position and wrap counter of
    /// a packed ring make sense together only.
    var settledUsed: UInt16 = 0
    var intendedUsed: UInt16 = 0
    var usedWrap: UInt16 = 0
    var reserved: UInt16 = 0
    var order: UInt64 = 0
    var padding: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
  }

  package enum Condition: UInt32 {
    /// No driver uses the queue.
    case idle = 0
    case live = 1
    /// The driver broke it; only a reset helps.
    case broken = 2
  }

  enum State {
    static let free: UInt32 = 0
    static let taken: UInt32 = 1
    static let used: UInt32 = 2
  }

  package let slotCount: Int
  package let chainLimit: Int
  private let header: UnsafeMutablePointer<Header>
  private let records: UnsafeMutablePointer<Record>
  private let bufferStorage: UnsafeMutablePointer<GuestBuffer>

  static let headerBytes = 64
  private static let progressOffset = 16

  /// Bytes up to the buffers of a slot, from the journal's start on.
  private static func bytes(before slot: Int, slotCount: Int, chainLimit: Int) -> Int {
    headerBytes + slotCount * MemoryLayout<Record>.stride + slot * chainLimit * MemoryLayout<GuestBuffer>.stride
  }

  /// Slots whose buffers a new journal has memory for. The others' is asked for when they are used first (`back`), so that a disk which mostly
  /// has a few requests under way does not take up what its largest load needs.
  package static func slotsAtFirst(_ slotCount: Int) -> Int { min(16, slotCount) }

  /// Bytes of a new journal that must have memory.
  package static func bytesAtFirst(slotCount: Int, chainLimit: Int) -> Int {
    bytes(before: slotsAtFirst(slotCount), slotCount: slotCount, chainLimit: chainLimit)
  }

  /// Sees to it that stores to the buffers of these slots find memory: one into a file system in memory that is full would be answered with
  /// SIGBUS, which ends the process.
  ///
  /// A kernel that cannot be asked (before Linux 5.14) was asked for all of it when the journal was made.
  ///
  /// - Returns: false when there is none.
  package func back(_ slots: Range<Int>) -> Bool {
    let first = Self.bytes(before: slots.lowerBound, slotCount: slotCount, chainLimit: chainLimit)
    let end = Self.bytes(before: slots.upperBound, slotCount: slotCount, chainLimit: chainLimit)
    let start = UInt(bitPattern: header) + UInt(first)
    let page = start & ~4095
    let bytes = Int(((UInt(bitPattern: header) + UInt(end) + 4095) & ~4095) - page)
    return populate(UnsafeMutableRawPointer(header) + (first - Int(start - page)), bytes) != .refused
  }

  /// Bytes that a journal needs. Pages that are never touched cost nothing in a file system in memory.
  package static func bytes(slotCount: Int, chainLimit: Int) -> Int {
    headerBytes + slotCount * MemoryLayout<Record>.stride
      + slotCount * chainLimit * MemoryLayout<GuestBuffer>.stride
  }

  /// - Parameter memory: `bytes` long, aligned to 64, all zero when it is new; it outlives the value.
  package init(memory: UnsafeMutableRawPointer, slotCount: Int, chainLimit: Int) {
    self.slotCount = slotCount
    self.chainLimit = chainLimit
    header = memory.bindMemory(to: Header.self, capacity: 1)
    let first = memory + Self.headerBytes
    records = first.bindMemory(to: Record.self, capacity: slotCount)
    bufferStorage = (first + slotCount * MemoryLayout<Record>.stride).bindMemory(
      to: GuestBuffer.self, capacity: slotCount * chainLimit)
  }

  /// Whether the memory holds a journal of these dimensions.
  package var isFitting: Bool {
    header.pointee.slotCount == UInt32(slotCount) && header.pointee.chainLimit == UInt32(chainLimit)
  }

  package var condition: Condition { Condition(rawValue: header.pointee.condition) ?? .broken }

  /// Storage for the buffers of the chain in a slot.
  package func buffers(_ slot: Int) -> UnsafeMutablePointer<GuestBuffer> { bufferStorage + slot &* chainLimit }

  // MARK: Life

  /// A driver's queue starts from nothing.
  package func start(packed: Bool, layout: QueueLayout) {
    header.pointee.condition = Condition.idle.rawValue
    order()
    for slot in 0..<slotCount { records[slot].state = State.free }
    header.pointee.slotCount = UInt32(slotCount)
    header.pointee.chainLimit = UInt32(chainLimit)
    header.pointee.packed = packed ? 1 : 0
    header.pointee.settledUsed = layout.nextUsed
    header.pointee.intendedUsed = layout.nextUsed
    header.pointee.usedWrap = layout.usedWrapCounter ? 1 : 0
    order()
    header.pointee.condition = Condition.live.rawValue
  }

  /// The driver took the queue back.
  package func end() { header.pointee.condition = Condition.idle.rawValue }

  package func markBroken() { header.pointee.condition = Condition.broken.rawValue }

  /// Keeps the compiler from moving stores across. A killed process leaves behind every store up to some point of its program.
  @inline(__always)
  private func order() { atomicMemoryFence(ordering: .releasing) }

  // MARK: Chains

  /// Notes a chain whose buffers are in `buffers(slot)`.
  func take(_ slot: Int, _ chain: DescriptorChain) {
    let record = records + slot
    record.pointee.head = chain.ticket.head
    record.pointee.slots = chain.ticket.slots
    record.pointee.readableCount = UInt32(truncatingIfNeeded: chain.readableCount)
    record.pointee.writableCount = UInt32(truncatingIfNeeded: chain.writableCount)
    record.pointee.order = header.pointee.order
    header.pointee.order &+= 1
    order()
    record.pointee.state = State.taken
  }

  /// The chain goes back unserved, or its answer is published.
  func free(_ slot: Int) { records[slot].state = State.free }

  /// The answer is about to be written at a position.
  func use(_ slot: Int, position: UInt16, wrap: Bool) {
    let record = records + slot
    record.pointee.usedPosition = position
    record.pointee.usedWrap = wrap ? 1 : 0
    order()
    record.pointee.state = State.used
    order()
  }

  /// The answer that was noted is not published, and will be written anew.
  func forgetAnswer(_ slot: Int) { records[slot].state = State.taken }

  /// Answers up to a position are about to be published.
  func intend(_ position: UInt16) {
    header.pointee.intendedUsed = position
    order()
  }

  /// They are, and their records free.
  func settle(_ position: UInt16, wrap: Bool) {
    order()
    let progress = UInt64(position) | UInt64(header.pointee.intendedUsed) << 16 | (wrap ? 1 << 32 : 0)
    UnsafeMutableRawPointer(header).storeBytes(
      of: progress.littleEndian, toByteOffset: Self.progressOffset, as: UInt64.self)
    order()
  }

  // MARK: Adoption

  var isPacked: Bool { header.pointee.packed == 1 }
  var settledUsed: UInt16 { header.pointee.settledUsed }
  var intendedUsed: UInt16 { header.pointee.intendedUsed }
  var usedWrap: Bool { header.pointee.usedWrap == 1 }
  func record(_ slot: Int) -> Record { records[slot] }
}
