/// What an engine is asked to do with the backing store.
package enum BlockOperation: UInt8, Sendable {
  case read
  case write
  /// Everything that was completed before must be durable when this completes.
  case flush
  case discard
  case writeZeroes
}

/// One operation of an engine. What `vectors` points at must stay until the completion is reaped.
package struct EngineRequest {
  package var operation: BlockOperation
  /// Comes back with the completion.
  package var tag: UInt32
  /// Bytes from the store's start. Inside the store: the device has checked it.
  package var offset: UInt64
  /// Bytes to discard or zero; unused by the others.
  package var length: UInt64
  package var vectors: UnsafeMutablePointer<DataVector>
  package var vectorCount: Int

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
package struct DataVector {
  package var start: UnsafeMutableRawPointer?
  package var length: Int

  package init(start: UnsafeMutableRawPointer?, length: Int) {
    self.start = start
    self.length = length
  }
}

/// The end of an operation.
package struct EngineCompletion {
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

  package init(
    capacity: UInt64, logicalBlock: UInt32 = 512, physicalBlock: UInt32 = 4096, canDiscard: Bool = false,
    readOnly: Bool = false
  ) {
    self.capacity = capacity
    self.logicalBlock = logicalBlock
    self.physicalBlock = physicalBlock
    self.canDiscard = canDiscard
    self.readOnly = readOnly
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
  /// Memory alignment that the engine needs of vectors, in bytes.
  var memoryAlignment: Int { get }
  /// Monotonic time in nanoseconds, for the bound on polling.
  var now: UInt64 { get }
  /// Starts operations. Each of them completes, a failure included, by `reap`.
  func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int)
  /// Takes completions that have come; never waits.
  func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int
  /// Waits until `reap` has something to give. Only for the end of a device and for stores that reach guest memory.
  func waitForCompletion()
}
