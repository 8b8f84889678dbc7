import EventLoop
import Virtqueue

/// Mappings on their way out of a pool whose users follow pointers into them without a lock.
///
/// They go in two steps, so that no thread ever follows a pointer into the void: a mapping leaves its pool while the pool's generation
/// is bumped (`MappingGeneration.advance`) and is put here; it is unmapped when no viewer works with an older generation any more (see
/// `MemoryViewer`). A batch that begins later finds neither the mapping in the pool nor a pointer to it in its view's cache.
///
/// Belongs to its pool's lock.
struct MappingLimbo<Mapping>: ~Copyable {
  /// With the generation that viewers must have reached.
  private var entries: [(mapping: Mapping?, generation: UInt64)] = []
  /// Entries before this one have been given out. They leave the array together, so that what is given out one by one costs no move of
  /// all that waits.
  private var first = 0
  private var viewers: [MemoryViewer] = []

  init() {}

  var isEmpty: Bool { count == 0 }
  var count: Int { entries.count - first }

  /// Whether nothing waits any more that was put here under a generation or one before it.
  func isDone(_ generation: UInt64) -> Bool { isEmpty || entries[first].generation > generation }

  mutating func add(_ viewer: MemoryViewer) { viewers.append(viewer) }

  mutating func remove(_ viewer: MemoryViewer) { viewers.removeAll { $0 === viewer } }

  /// Takes a mapping that has left its pool.
  ///
  /// - Parameter generation: the pool's, bumped since.
  mutating func put(_ mapping: Mapping, _ generation: UInt64) { entries.append((mapping, generation)) }

  /// Gives out what no batch can use any more, to be unmapped.
  ///
  /// - Parameter limit: so many at most.
  mutating func takeUnused(limit: Int = .max) -> [Mapping] {
    guard !isEmpty else { return [] }
    var oldest = UInt64.max
    for viewer in viewers {
      let epoch = viewer.epoch.load(ordering: .sequentiallyConsistent)
      if epoch != 0 { oldest = min(oldest, epoch) }
    }
    // Generations grow, so what may go stands before what must stay.
    var unused: [Mapping] = []
    while unused.count < limit, first < entries.count, entries[first].generation <= oldest {
      if let mapping = entries[first].mapping.take() { unused.append(mapping) }
      first += 1
    }
    if first * 2 >= entries.count {
      entries.removeFirst(first)
      first = 0
    }
    return unused
  }
}

/// Waits for what the end of other threads' batches brings about. They last microseconds as a rule, so yielding is enough.
///
/// Not to be called within a batch of the caller's own, or with a pool's lock.
func waitForBatches(until isDone: () -> Bool) {
  while !isDone() { yieldThread() }
}
