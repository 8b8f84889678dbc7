/// What an engine is asked to do with the backing store.
package enum BlockOperation: UInt8, BitwiseCopyable, Sendable {
  case read
  case write
  /// Everything that was completed before must be durable when this completes.
  case flush
  case discard
  case writeZeroes
  /// As discard, with a promise that no copy of the data is left.
  case secureErase
}

/// One operation of an engine. What `vectors` points at must stay until the completion is reaped.
package struct EngineRequest: BitwiseCopyable {
  package var operation: BlockOperation
  /// Comes back with the completion.
  package var tag: UInt32
  /// Bytes from the store's start. Inside the store: the device has checked it.
  package var offset: UInt64
  /// Bytes to discard or zero; unused by the others.
  package var length: UInt64
  package var vectors: UnsafeMutablePointer<DataVector>
  package var vectorCount: Int
  /// Writes of every kind: durable by the time of the completion, as if a flush followed.
  package var isDurable = false
  /// Write zeroes: whether the store may give the space back.
  package var mayUnmap = false

  package init(
    operation: BlockOperation, tag: UInt32, offset: UInt64, length: UInt64 = 0,
    vectors: UnsafeMutablePointer<DataVector>, vectorCount: Int = 0
  ) {
    self.operation = operation
    self.tag = tag
    self.offset = offset
    self.length = length
    self.vectors = vectors
    self.vectorCount = vectorCount
  }
}

/// A piece of memory; laid out as the kernel's `struct iovec`.
package struct DataVector: BitwiseCopyable {
  package var start: UnsafeMutableRawPointer?
  package var length: Int

  package init(start: UnsafeMutableRawPointer?, length: Int) {
    self.start = start
    self.length = length
  }
}

/// The end of an operation.
package struct EngineCompletion: BitwiseCopyable {
  package var tag: UInt32
  /// Bytes moved, or a negated errno.
  package var result: Int

  package init(tag: UInt32, result: Int) {
    self.tag = tag
    self.result = result
  }
}

/// What the backing store is.
package struct BlockGeometry: Equatable, Sendable {
  /// Bytes, a multiple of 512.
  package var capacity: UInt64
  /// The unit that requests must be aligned to, in bytes: 512 or 4096.
  package var logicalBlock: UInt32
  /// The unit that the store writes without reading first, in bytes.
  package var physicalBlock: UInt32
  package var canDiscard: Bool
  package var readOnly: Bool
  package var canWriteZeroes: Bool
  package var canSecureErase: Bool
  /// Whether zeroing may give space back.
  package var canUnmapZeroes = false
  /// The unit that the store discards, in bytes; 0 when it does not say.
  package var discardGranularity: UInt64 = 0
  /// The size of transfers that the store likes best, in bytes; 0 when it does not say.
  package var optimalSize: UInt64 = 0
  /// What the store tells of its wear, where it does.
  package var lifetime: BlockLifetime?

  package init(
    capacity: UInt64, logicalBlock: UInt32 = 512, physicalBlock: UInt32 = 4096, canDiscard: Bool = false,
    readOnly: Bool = false, canWriteZeroes: Bool = true, canSecureErase: Bool = false, lifetime: BlockLifetime? = nil
  ) {
    self.capacity = capacity
    self.logicalBlock = logicalBlock
    self.physicalBlock = physicalBlock
    self.canDiscard = canDiscard
    self.readOnly = readOnly
    self.canWriteZeroes = canWriteZeroes
    self.canSecureErase = canSecureErase
    self.lifetime = lifetime
  }
}

/// Wear of a flash store, as eMMC tells it and VIRTIO_BLK_T_GET_LIFETIME passes it on (virtio 1.2, 5.2.6).
package struct BlockLifetime: Equatable, Sendable {
  /// 0 unknown, 1 normal, 2 warning (80 % of the reserved blocks used), 3 urgent (90 %).
  package var preEndOfLife: UInt16
  /// Wear in tenths: 1 is 0 to 10 % used, 11 beyond the estimate, 0 unknown; for two kinds of memory.
  package var typicalA: UInt16
  package var typicalB: UInt16

  package init(preEndOfLife: UInt16, typicalA: UInt16, typicalB: UInt16) {
    self.preEndOfLife = preEndOfLife
    self.typicalA = typicalA
    self.typicalB = typicalB
  }
}

/// What a block device stores its data with. Confined to the device's thread; called once per batch.
package protocol BlockEngine: AnyObject {
  var geometry: BlockGeometry { get }
  /// Whether the kernel takes vectors that point into guest memory which stays mapped. Direct I/O refuses foreign mappings, so
  /// with those the device copies through its bounce buffers.
  var reachesGuestMemory: Bool { get }
  /// Whether data has moved by the time `submit` returns: buffered I/O copies at once. Then even mappings that may be withdrawn
  /// after the batch can be used.
  var movesDataInSubmit: Bool { get }
  /// Whether a flush that failed may be tried again. A page cache forgets what it could not write once it has said so: there only the
  /// first flush behind it tells the truth.
  var canRetryFlush: Bool { get }
  /// Memory alignment that the engine needs of vectors, in bytes.
  var memoryAlignment: Int { get }
  /// Monotonic time in nanoseconds, for the bound on polling.
  var now: UInt64 { get }
  /// Readable when `reap` may have something.
  var readiness: Int32 { get }
  /// Takes the wake-ups that have come, before `reap`.
  func acknowledgeReadiness()
  /// A second descriptor that is readable when `reap` may have something; nil where one is enough.
  var alarm: Int32? { get }
  /// Takes its wake-ups.
  func acknowledgeAlarm()
  /// Whether a completion may end a sleep in the kernel (EINTR) and be there without `readiness` having been reported.
  var interruptsSleep: Bool { get }
  /// Transfers of so many bytes at most are cheaper through bounce buffers, also where the engine could reach the guest's memory.
  var bouncesUpTo: UInt64 { get }
  /// Memory that most transfers will use, from which the engine may take an advantage. It stays where it is until `close`.
  func register(_ start: UnsafeMutableRawPointer, bytes: Int)
  /// Starts operations. Each of them completes, a failure included, by `reap`. A completion of -EAGAIN means that the engine was
  /// short of something for a moment.
  func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int)
  /// Takes completions that have come; never waits.
  func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int
  /// Waits until `reap` has something to give. Only for the end of a device and for stores that reach guest memory.
  func waitForCompletion()
  /// Completes with an error, as soon as possible, what would otherwise wait for a store that is out of reach: the device ends.
  func abandon()
  /// Gives the kernel back what it has for the engine, which works on nothing any more: called on the device's thread, since that can
  /// take long.
  func close()
}

extension BlockEngine {
  package var canRetryFlush: Bool { false }
  package var alarm: Int32? { nil }
  package func acknowledgeAlarm() {}
  package var interruptsSleep: Bool { false }
  package var bouncesUpTo: UInt64 { 0 }
  package func register(_ start: UnsafeMutableRawPointer, bytes: Int) {}
}
