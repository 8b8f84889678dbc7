package import SimulatedXen
package import Virtqueue

/// A simulated guest's memory as it is, without a pool: rings are always there, and data is too, or can only be copied.
package final class FlatMemory: GuestMemorySource, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: tests use it from one thread.
  package let bucketShift = 30
  package let isStable = true
  package let generation = MappingGeneration()
  private let memory: SimulatedMemory
  private let mapsData: Bool
  private let stamp = UnsafeMutablePointer<UInt64>.allocate(capacity: 1)
  package private(set) var copied = 0

  package init(_ memory: SimulatedMemory, mapsData: Bool = true) {
    self.memory = memory
    self.mapsData = mapsData
    stamp.initialize(to: 0)
  }

  deinit { stamp.deallocate() }

  package func bucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping {
    guard mapsData else { throw .mappingFailed }
    guard number == 0 else { throw .unmapped(address: number << 30) }
    return BucketMapping(base: memory.base, validPages: nil, stamp: stamp)
  }

  package func refreshedBucket(_ number: UInt64) throws(GuestMemoryFault) -> BucketMapping { try bucket(number) }

  package func mapRange(address: UInt64, length: Int) throws(GuestMemoryFault) -> RangeMapping {
    RangeMapping(start: memory.base + Int(address), identifier: 0)
  }

  package func unmapRange(_ range: RangeMapping) {}

  package func copy(
    _ address: UInt64, _ local: UnsafeMutableRawPointer, count: Int, toGuest: Bool
  ) throws(GuestMemoryFault) {
    guard address < UInt64(memory.pageCount) << 12, address + UInt64(count) <= UInt64(memory.pageCount) << 12 else {
      throw .unmapped(address: address)
    }
    let (from, to) = toGuest ? (local, memory.base + Int(address)) : (memory.base + Int(address), local)
    to.copyMemory(from: from, byteCount: count)
    copied += count
  }

  package func add(viewer: MemoryViewer) {}
  package func remove(viewer: MemoryViewer) {}
}
