import CLinux
package import EventLoop
import Glibc
import Synchronization

/// A simulated guest's memory: a memory file that the guest and the backends map, with pages that can be absent.
package final class SimulatedMemory: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `base` and `descriptor` never change; the pages' state is under a lock; the bytes
  // themselves are shared as a guest's memory is.

  package let pageCount: Int
  /// The guest's own view of its memory.
  package let base: UnsafeMutableRawPointer
  private let descriptor: OwnedDescriptor
  /// Pages behind the guest's own: those of its ioreq servers.
  static let extraPages = 8
  private let present: Mutex<[Bool]>

  package init(bytes: Int) throws(Errno) {
    pageCount = (bytes + 4095) / 4096
    let raw = clinux_memfd("simulated-guest")
    guard raw >= 0 else { throw Errno.last }
    descriptor = OwnedDescriptor(adopting: raw)
    let length = (pageCount + Self.extraPages) * 4096
    guard ftruncate(raw, off_t(length)) == 0 else { throw Errno.last }
    guard let start = mmap(nil, length, PROT_READ | PROT_WRITE, MAP_SHARED, raw, 0), start != MAP_FAILED
    else {
      throw Errno.last
    }
    base = start
    present = Mutex(Array(repeating: true, count: pageCount))
  }

  deinit { munmap(base, (pageCount + Self.extraPages) * 4096) }

  /// A page that is no memory of the guest's, for what Xen shares with an ioreq server.
  func extraPage(_ index: Int) -> UnsafeMutableRawPointer { base + (pageCount + index) * 4096 }

  /// The memory file, for another process of the same user.
  var path: String { "/proc/\(getpid())/fd/\(descriptor.raw)" }

  /// Whether each of a run of frames is there: 0, or its errno.
  func errors(first: UInt64, count: Int) -> [UInt8] {
    present.withLock { state in
      (0..<count).map { isPresent(first &+ UInt64($0), state) ? 0 : UInt8(ENOENT) }
    }
  }

  /// Takes pages away (as a balloon does) or gives them back, empty. The caller sends the invalidation.
  package func set(pages: Range<Int>, present isPresent: Bool) {
    present.withLock { state in
      for page in pages where state[page] != isPresent {
        state[page] = isPresent
        let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        _ = clinux_fallocate(descriptor.raw, mode, Int64(page * 4096), 4096)
      }
    }
  }

  /// Maps frames for a backend. Absent ones get ENOENT and are not accessible.
  func map(frames: UnsafePointer<UInt64>, count: Int, errors: UnsafeMutablePointer<Int32>) -> UnsafeMutableRawPointer? {
    guard let start = mmap(nil, count * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
      start != MAP_FAILED
    else { return nil }
    present.withLock { state in
      var index = 0
      while index < count {
        guard isPresent(frames[index], state) else {
          errors[index] = ENOENT
          index += 1
          continue
        }
        var run = 1
        while index + run < count, frames[index + run] == frames[index] + UInt64(run),
          isPresent(frames[index + run], state)
        {
          run += 1
        }
        _ = mmap(
          start + index * 4096, run * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor.raw,
          off_t(frames[index] * 4096))
        for step in 0..<run { errors[index + step] = 0 }
        index += run
      }
    }
    return start
  }

  private func isPresent(_ frame: UInt64, _ state: [Bool]) -> Bool {
    guard let index = Int(exactly: frame), index < state.count else { return false }
    return state[index]
  }

  /// Bytes that start at a guest address; the simulated guest only uses addresses that it owns.
  package func pointer(_ address: UInt64) -> UnsafeMutableRawPointer {
    precondition(address < UInt64(pageCount) * 4096, "the simulated guest uses memory that it does not have")
    return base + Int(address)
  }
}
