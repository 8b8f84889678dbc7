import Virtqueue

/// A request that the device works on: one slot of the slab, reused without allocation.
struct BlockOperationRecord {
  /// The life of the device that the request belongs to: completions of an older one are dropped.
  var life: UInt32 = 0
  var head: UInt16 = 0
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
  /// Discard and write-zeroes: ranges in all, and the next one.
  var rangeCount = 0
  var nextRange = 0
  /// Bytes that the used element reports.
  var written: UInt32 = 0
}

/// Fixed storage for the requests of one queue: records, guest buffers, vectors, bounce buffer numbers.
struct OperationSlab: ~Copyable {
  /// Bounce buffers and so vectors of one step: up to 1 MiB at a time.
  static let buffersPerStep = 16

  let count: Int
  let chainLimit: Int
  let records: UnsafeMutablePointer<BlockOperationRecord>
  private let guestBuffers: UnsafeMutablePointer<GuestBuffer>
  private let vectorStorage: UnsafeMutablePointer<DataVector>
  private let bounceNumbers: UnsafeMutablePointer<UInt32>
  private let rangeStorage: UnsafeMutablePointer<(UInt64, UInt64)>
  private let free: UnsafeMutablePointer<UInt32>
  private(set) var freeCount: Int

  init(count: Int, chainLimit: Int) {
    self.count = count
    self.chainLimit = chainLimit
    records = .allocate(capacity: count)
    records.initialize(repeating: BlockOperationRecord(), count: count)
    guestBuffers = .allocate(capacity: count * chainLimit)
    guestBuffers.initialize(repeating: GuestBuffer(address: 0, length: 0), count: count * chainLimit)
    vectorStorage = .allocate(capacity: count * chainLimit)
    vectorStorage.initialize(repeating: DataVector(start: nil, length: 0), count: count * chainLimit)
    bounceNumbers = .allocate(capacity: count * Self.buffersPerStep)
    bounceNumbers.initialize(repeating: 0, count: count * Self.buffersPerStep)
    rangeStorage = .allocate(capacity: count * BlockConfiguration.rangesMaximum)
    rangeStorage.initialize(repeating: (0, 0), count: count * BlockConfiguration.rangesMaximum)
    free = .allocate(capacity: count)
    for index in 0..<count { free[index] = UInt32(count - 1 - index) }
    freeCount = count
  }

  deinit {
    records.deallocate()
    guestBuffers.deallocate()
    vectorStorage.deallocate()
    bounceNumbers.deallocate()
    rangeStorage.deallocate()
    free.deallocate()
  }

  var busyCount: Int { count &- freeCount }

  mutating func take() -> Int? {
    guard freeCount > 0 else { return nil }
    freeCount &-= 1
    return Int(free[freeCount])
  }

  mutating func give(_ slot: Int) {
    free[freeCount] = UInt32(truncatingIfNeeded: slot)
    freeCount &+= 1
  }

  func buffers(_ slot: Int) -> UnsafeMutablePointer<GuestBuffer> { guestBuffers + slot &* chainLimit }
  func vectors(_ slot: Int) -> UnsafeMutablePointer<DataVector> { vectorStorage + slot &* chainLimit }
  func bounce(_ slot: Int) -> UnsafeMutablePointer<UInt32> { bounceNumbers + slot &* Self.buffersPerStep }
  /// Offset and length in bytes of each range.
  func ranges(_ slot: Int) -> UnsafeMutablePointer<(UInt64, UInt64)> {
    rangeStorage + slot &* BlockConfiguration.rangesMaximum
  }
}
