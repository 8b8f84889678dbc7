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
  private var entries: [(mapping: Mapping, generation: UInt64)] = []
  private var viewers: [MemoryViewer] = []

  init() {}

  var isEmpty: Bool { entries.isEmpty }
  var count: Int { entries.count }

  /// Whether nothing waits any more that was put here under a generation or one before it.
  func isDone(_ generation: UInt64) -> Bool { entries.first.map { $0.generation > generation } ?? true }

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
    guard !entries.isEmpty else { return [] }
    var oldest = UInt64.max
    for viewer in viewers {
      let epoch = viewer.epoch.load(ordering: .sequentiallyConsistent)
      if epoch != 0 { oldest = min(oldest, epoch) }
    }
    // Generations grow, so what may go stands before what must stay.
    let count = min(entries.firstIndex { $0.generation > oldest } ?? entries.count, limit)
    guard count > 0 else { return [] }
    let unused = entries[..<count].map(\.mapping)
    entries.removeFirst(count)
    return unused
  }
}

/// Waits for what the end of other threads' batches brings about. They last microseconds as a rule, so yielding is enough.
///
/// Not to be called within a batch of the caller's own, or with a pool's lock.
func waitForBatches(until isDone: () -> Bool) {
  while !isDone() { yieldThread() }
}
