import HostMemory
import Synchronization

/// One data thread's window on a guest's memory: a cache of translations in front of the shared pool.
///
/// Confined to one thread. Between `enter` and `leave` the pointers that it hands out stay mapped; afterwards they must not
/// be kept. A hit costs no lock, no allocation and no call out of this module.
package struct GuestMemoryView: ~Copyable {
  private struct Entry {
    /// Bucket number plus one; 0 when the entry is empty.
    var tag: UInt64
    /// The generation that the entry is good for: one that is older than the view's is as good as empty.
    var generation: UInt64
    var base: UnsafeMutableRawPointer?
    var validPages: UnsafePointer<UInt64>?
    var stamp: UnsafeMutablePointer<UInt64>?
    /// Offsets between which all is backed.
    var solidStart = 0
    var solidEnd = 0
  }

  /// With buckets of 2 MiB, 2 GiB of a guest's memory: twice the pool's default budget.
  private static var entryCount: Int { 1024 }
  private static var pageShift: UInt64 { 12 }

  private let source: any GuestMemorySource
  private let generation: MappingGeneration
  private let viewer = MemoryViewer()
  /// All bits zero is an empty entry. Untouched until then: a view of 2 GiB for a guest that does its I/O in a few buckets.
  private let entries: UnsafeMutablePointer<Entry>
  private let table: UntouchedMemory
  private let bucketShift: UInt64
  private let bucketSize: Int
  private var seenGeneration: UInt64 = 0
  private var clock: UInt64 = 0
  /// Lookups answered by the cache, and those that went to the pool.
  package private(set) var hits: UInt64 = 0
  package private(set) var misses: UInt64 = 0
  private var missesBefore: UInt64 = 0
  /// The run of backed memory that was found last in this batch: an arena, or most of a bucket. What lies in it, as what belongs to one request
  /// mostly does, is found by a subtraction and a comparison. The guest address of its first byte, its bytes, and where it is mapped.
  private var runStart: UInt64 = 0
  private var runBytes: UInt64 = 0
  private var runBase: UnsafeMutableRawPointer
  /// Nothing could be mapped in this batch: who can do without does not ask again.
  private var isUnmappable = false

  package init(source: any GuestMemorySource) {
    self.source = source
    generation = source.generation
    bucketShift = UInt64(source.bucketShift)
    bucketSize = 1 << source.bucketShift
    var table = UntouchedMemory(bytes: UntouchedMemory.bytes(Entry.self, Self.entryCount))
    entries = table.take(Entry.self, Self.entryCount)
    self.table = table
    runBase = UnsafeMutableRawPointer(entries)
    source.add(viewer: viewer)
  }

  deinit {
    viewer.epoch.store(0, ordering: .releasing)
    source.remove(viewer: viewer)
  }

  /// Starts a batch.
  ///
  /// - Returns: the count of invalidations: when it differs from the one seen before, rings must be mapped again.
  package mutating func enter() -> UInt64 {
    // The store of the epoch must be visible before the generation is read a second time: the side that withdraws mappings
    // bumps the generation first and reads the epochs then, so one of the two always sees the other.
    var now = generation.current.load(ordering: .acquiring)
    while true {
      viewer.epoch.store(now, ordering: .sequentiallyConsistent)
      let again = generation.current.load(ordering: .sequentiallyConsistent)
      if again == now { break }
      now = again
    }
    seenGeneration = now
    missesBefore = misses
    runBytes = 0
    isUnmappable = false
    clock = generation.clock.load(ordering: .relaxed)
    return generation.invalidations.load(ordering: .acquiring)
  }

  /// Lookups of this batch that went to the pool. Each may have put a mapping aside that can be withdrawn only behind the batch, so a batch
  /// with many of them is to be left.
  package var missesInBatch: UInt64 { mutating get { misses &- missesBefore } }

  /// Ends a batch: no pointer obtained in it is used any more.
  package mutating func leave() {
    viewer.epoch.store(0, ordering: .releasing)
  }

  /// The host address of a guest address, and how many bytes from there on are contiguous and backed, at most `length`.
  ///
  /// - Throws: `unmapped` when the first byte's page is not backed.
  package mutating func translate(
    _ address: UInt64, _ length: Int
  ) throws(GuestMemoryFault) -> (pointer: UnsafeMutableRawPointer, length: Int) {
    let distance = address &- runStart
    if distance < runBytes {
      hits &+= 1
      return (runBase + Int(truncatingIfNeeded: distance), min(length, Int(truncatingIfNeeded: runBytes &- distance)))
    }
    return try translateByBucket(address, length)
  }

  /// Where `length` bytes from a guest address on are mapped in one piece: for small things that need not be copied before they are looked at, if
  /// that is done by single loads.
  ///
  /// - Returns: nil when they are in several pieces or cannot be mapped: `copyIn` and `copyOut` serve for those.
  /// - Throws: `unmapped` when the first byte's page is not backed.
  package mutating func piece(
    _ address: UInt64, _ length: Int
  ) throws(GuestMemoryFault) -> UnsafeMutableRawPointer? {
    let distance = address &- runStart
    if distance < runBytes, UInt64(truncatingIfNeeded: length) <= runBytes &- distance {
      hits &+= 1
      return runBase + Int(truncatingIfNeeded: distance)
    }
    guard !isUnmappable else { return nil }
    do throws(GuestMemoryFault) {
      let (pointer, found) = try translateByBucket(address, length)
      return found == length ? pointer : nil
    } catch {
      guard error == .mappingFailed else { throw error }
      isUnmappable = true
      return nil
    }
  }

  /// Two words of 64 bits that lie in one piece at an aligned address, read in place. Once each: by relaxed atomics, since the driver may write at
  /// the same time, and what is checked must be what is used.
  ///
  /// - Returns: nil where they have to be copied.
  /// - Throws: `unmapped` when the page is not backed.
  package mutating func words(_ address: UInt64) throws(GuestMemoryFault) -> (UInt64, UInt64)? {
    guard address & 7 == 0, let place = try piece(address, 16) else { return nil }
    let words = place.assumingMemoryBound(to: Atomic<UInt64>.self)
    return (words[0].load(ordering: .relaxed), words[1].load(ordering: .relaxed))
  }

  @inline(never)
  private mutating func translateByBucket(
    _ address: UInt64, _ length: Int
  ) throws(GuestMemoryFault) -> (pointer: UnsafeMutableRawPointer, length: Int) {
    let number = address &>> bucketShift
    let offset = Int(truncatingIfNeeded: address & UInt64(truncatingIfNeeded: bucketSize &- 1))
    let index = Int(truncatingIfNeeded: number & UInt64(truncatingIfNeeded: Self.entryCount &- 1))
    let run = min(length, bucketSize &- offset)
    // By a pointer of its own: an entry is large.
    let entry = entries + index
    if entry.pointee.tag == number &+ 1, entry.pointee.generation == seenGeneration, let base = entry.pointee.base {
      hits &+= 1
      entry.pointee.stamp?.pointee = clock
      if offset >= entry.pointee.solidStart, offset < entry.pointee.solidEnd {
        runStart = address &- UInt64(truncatingIfNeeded: offset &- entry.pointee.solidStart)
        runBytes = UInt64(truncatingIfNeeded: entry.pointee.solidEnd &- entry.pointee.solidStart)
        runBase = base + entry.pointee.solidStart
        return (base + offset, min(length, entry.pointee.solidEnd &- offset))
      }
      if let valid = entry.pointee.validPages {
        let backed = Self.backedRun(valid, offset, run)
        if backed > 0 { return (base + offset, backed) }
      }
    }
    return try translateSlowly(address, number, offset, run, index)
  }

  @inline(never)
  private mutating func translateSlowly(
    _ address: UInt64, _ number: UInt64, _ offset: Int, _ run: Int, _ index: Int
  ) throws(GuestMemoryFault) -> (pointer: UnsafeMutableRawPointer, length: Int) {
    misses &+= 1
    let known = entries[index].tag == number &+ 1 && entries[index].generation == seenGeneration
    var mapping = known ? try source.refreshedBucket(number) : try source.bucket(number)
    var backed = run
    if let valid = mapping.validPages {
      backed = Self.backedRun(valid, offset, run)
      if backed == 0 && !known {
        mapping = try source.refreshedBucket(number)
        backed = mapping.validPages.map { Self.backedRun($0, offset, run) } ?? run
      }
    }
    mapping.stamp.pointee = clock
    let solid = mapping.solid ?? (mapping.validPages == nil ? 0..<bucketSize : 0..<0)
    entries[index] = Entry(
      tag: number &+ 1, generation: seenGeneration, base: mapping.base, validPages: mapping.validPages,
      stamp: mapping.stamp, solidStart: solid.lowerBound, solidEnd: solid.upperBound)
    runBytes = 0
    guard backed > 0 else { throw .unmapped(address: address) }
    return (mapping.base + offset, backed)
  }

  /// Bytes from `offset` on, at most `run`, whose pages are all marked valid.
  private static func backedRun(_ valid: UnsafePointer<UInt64>, _ offset: Int, _ run: Int) -> Int {
    guard run > 0 else { return 0 }
    var page = offset >> 12
    let last = (offset &+ run &- 1) >> 12
    while page <= last {
      if valid[page >> 6] & (1 << UInt64(truncatingIfNeeded: page & 63)) == 0 {
        return max(0, (page << 12) &- offset)
      }
      page &+= 1
    }
    return run
  }

  /// Copies bytes out of the guest.
  package mutating func copyIn(
    from address: UInt64, to destination: UnsafeMutableRawPointer, count: Int
  ) throws(GuestMemoryFault) {
    guard !address.addingReportingOverflow(UInt64(truncatingIfNeeded: count)).overflow else { throw .addressOverflow }
    var done = 0
    do throws(GuestMemoryFault) {
      while done < count {
        let (pointer, length) = try translate(address &+ UInt64(truncatingIfNeeded: done), count &- done)
        (destination + done).copyMemory(from: pointer, byteCount: length)
        done &+= length
      }
    } catch {
      guard error == .mappingFailed else { throw error }
      try source.copy(
        address &+ UInt64(truncatingIfNeeded: done), destination + done, count: count &- done, toGuest: false)
    }
  }

  /// Copies bytes into the guest.
  package mutating func copyOut(
    from origin: UnsafeRawPointer, to address: UInt64, count: Int
  ) throws(GuestMemoryFault) {
    guard !address.addingReportingOverflow(UInt64(truncatingIfNeeded: count)).overflow else { throw .addressOverflow }
    var done = 0
    do throws(GuestMemoryFault) {
      while done < count {
        let (pointer, length) = try translate(address &+ UInt64(truncatingIfNeeded: done), count &- done)
        pointer.copyMemory(from: origin + done, byteCount: length)
        done &+= length
      }
    } catch {
      guard error == .mappingFailed else { throw error }
      // It is only read from there.
      let local = UnsafeMutableRawPointer(mutating: origin + done)
      try source.copy(address &+ UInt64(truncatingIfNeeded: done), local, count: count &- done, toGuest: true)
    }
  }
}
