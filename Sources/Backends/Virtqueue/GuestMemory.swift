package import Synchronization

/// What can go wrong when a guest address is turned into memory of ours.
package enum GuestMemoryFault: Error, Equatable {
  /// Address plus length leaves the 64-bit space.
  case addressOverflow
  /// The page is not backed by guest memory: a hole, a ballooned page, or beyond the guest's end.
  case unmapped(address: UInt64)
  /// The domain has no memory left for another mapping, or the hypervisor refuses it.
  case mappingFailed
}

/// One bucket: a run of guest memory, aligned to its size, that is mapped contiguously.
package struct BucketMapping {
  /// Where the bucket's first byte is mapped.
  package var base: UnsafeMutableRawPointer
  /// A bit per page, set where the page is backed; `nil` when all of them are.
  package var validPages: UnsafePointer<UInt64>?
  /// Offsets in the bucket between which every page is backed for as long as the mapping is there, if the source knows of such: lookups
  /// between them need no look at the bits. `nil` for the whole bucket where there are no bits, and for nothing where there are.
  package var solid: Range<Int>?
  /// The word that a user stamps with its clock, for the pool's choice of the least recently used bucket.
  package var stamp: UnsafeMutablePointer<UInt64>

  package init(
    base: UnsafeMutableRawPointer, validPages: UnsafePointer<UInt64>?, stamp: UnsafeMutablePointer<UInt64>,
    solid: Range<Int>? = nil
  ) {
    self.solid = solid
    self.base = base
    self.validPages = validPages
    self.stamp = stamp
  }
}

/// A thread's mark of whether it holds pointers into a guest's mappings.
///
/// The owner alone writes `epoch`: 0 between batches, the source's generation within one. A mapping that left the pool at
/// generation G may go when every viewer shows 0 or a value of at least G.
package final class MemoryViewer: Sendable {
  package let epoch = Atomic<UInt64>(0)

  package init() {}
}

/// Where a guest's memory comes from: a pool of foreign mappings, of grants, or the simulator's.
///
/// The slow path of `GuestMemoryView`: called on a miss of its cache only, from any data thread.
package protocol GuestMemorySource: AnyObject, Sendable {
  /// Bytes of a bucket as a power of two, at least one page.
  var bucketShift: Int { get }
  /// Whether mappings stay until their users give them back, as grants do; foreign mappings may be withdrawn at any moment.
  var isStable: Bool { get }
  /// Bumped before any mapping is taken away. Pointers of an older generation must not be used in a new batch.
  var generation: MappingGeneration { get }
  /// Maps a bucket or finds it mapped.
  func bucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping
  /// Maps a bucket afresh after an access to a page that was a hole: the guest may have filled it since.
  func refreshedBucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping
  /// Maps a ring part contiguously, apart from the buckets. Gone after the next invalidation.
  func mapRange(address: UInt64, length: Int) throws(GuestMemoryFault) -> RangeMapping
  /// Gives a range back.
  func unmapRange(_ range: RangeMapping)
  /// Moves bytes between the guest and `local` where `bucket` fails with `mappingFailed`: slowly, without a mapping.
  func copy(_ address: UInt64, _ local: UnsafeMutableRawPointer, count: Int, toGuest: Bool) throws(GuestMemoryFault)
  /// Makes a viewer known, so that no mapping it uses is taken away under it.
  func add(viewer: MemoryViewer)
  /// Forgets a viewer; its thread holds no pointer any more.
  func remove(viewer: MemoryViewer)
}

extension GuestMemorySource {
  package func copy(
    _ address: UInt64, _ local: UnsafeMutableRawPointer, count: Int, toGuest: Bool
  ) throws(GuestMemoryFault) {
    throw .mappingFailed
  }
}

/// The counters that tell users of mappings that some went away.
package final class MappingGeneration: Sendable {
  /// Counts every withdrawal of mappings, evictions included.
  package let current = Atomic<UInt64>(1)
  /// Counts withdrawals of everything: after one, rings must be mapped again too.
  package let invalidations = Atomic<UInt64>(0)
  /// The pool's time, in misses: what viewers stamp the buckets with that they use.
  package let clock = Atomic<UInt64>(1)

  package init() {}

  /// Counts a withdrawal of mappings that cannot be found any more.
  ///
  /// - Returns: the generation of batches that know nothing of them.
  package func advance() -> UInt64 { current.wrappingAdd(1, ordering: .sequentiallyConsistent).newValue }
}

/// A ring part mapped on its own.
package struct RangeMapping {
  /// The first byte of the range.
  package var start: UnsafeMutableRawPointer
  /// Identifies the mapping towards its source.
  package var identifier: UInt64

  package init(start: UnsafeMutableRawPointer, identifier: UInt64) {
    self.start = start
    self.identifier = identifier
  }
}
