import CLinux
import EventLoop
import Glibc
import Synchronization

/// An io_uring of the kernel's: a ring of submissions and one of completions, both in memory that is shared with it.
///
/// Each tag has a submission of its own, which stays as it was made until the tag is used again: so it can be handed over once more without
/// being made anew. Confined to one thread. A class, so that nothing has to watch over accesses to it as a whole for each request.
final class SubmissionRing {
  private let ring: clinux_ring
  /// Submissions that were put and not handed over, and the tail behind them.
  private var waiting: UInt32 = 0
  private var tail: UInt32 = 0
  private var isOpen = true

  /// Readable while completions are there.
  var descriptor: Int32 { ring.fd }

  /// - Parameter depth: tags, each of which is with the kernel once at a time.
  /// - Throws: why the kernel makes none.
  init(depth: Int) throws(Errno) {
    var ring = clinux_ring()
    let failure = clinux_ring_open(&ring, UInt32(clamping: depth))
    guard failure == 0 else { throw Errno(failure) }
    self.ring = ring
  }

  deinit { close() }

  /// Nothing may be under way.
  func close() {
    guard isOpen else { return }
    isOpen = false
    var ring = ring
    clinux_ring_close(&ring)
  }

  @inline(__always)
  private func word(_ pointer: UnsafeMutablePointer<UInt32>) -> UnsafeMutablePointer<Atomic<UInt32>> {
    UnsafeMutableRawPointer(pointer).assumingMemoryBound(to: Atomic<UInt32>.self)
  }

  /// The submission of a tag.
  @inline(__always)
  func submission(_ tag: UInt32) -> UnsafeMutablePointer<clinux_submission> { ring.submissions + Int(tag) }

  /// Puts a tag's submission in the row; the kernel learns of it by `enter`.
  @inline(__always)
  func put(_ tag: UInt32) {
    ring.submission_order[Int(tail & ring.submission_mask)] = tag
    tail &+= 1
    waiting &+= 1
  }

  /// Hands over what was put.
  ///
  /// - Parameter refused: called for each tag that the kernel does not take, with a negated errno.
  /// - Returns: how many it took.
  func enter(refused: (UInt32, Int) -> Void) -> Int {
    guard waiting > 0 else { return 0 }
    word(ring.submission_tail).pointee.store(tail, ordering: .releasing)
    var taken = 0
    while waiting > 0 {
      let result = clinux_ring_enter(ring.fd, waiting, 0)
      if result > 0 {
        waiting &-= min(waiting, UInt32(result))
        taken &+= Int(result)
      } else if result != -EINTR {
        // What it has not looked at is ours again.
        let head = word(ring.submission_head).pointee.load(ordering: .acquiring)
        var place = head
        while place != tail {
          refused(ring.submission_order[Int(place & ring.submission_mask)], result == 0 ? -Int(EAGAIN) : Int(result))
          place &+= 1
        }
        tail = head
        word(ring.submission_tail).pointee.store(tail, ordering: .releasing)
        waiting = 0
      }
    }
    return taken
  }

  /// Completions that are there.
  struct Harvest {
    fileprivate(set) var head: UInt32
    fileprivate let tail: UInt32
    var isEmpty: Bool { head == tail }
  }

  @inline(__always)
  func completions() -> Harvest {
    Harvest(
      head: word(ring.completion_head).pointee.load(ordering: .relaxed),
      tail: word(ring.completion_tail).pointee.load(ordering: .acquiring))
  }

  /// Takes the next of them, which must be there.
  @inline(__always)
  func next(_ harvest: inout Harvest) -> (tag: UInt32, result: Int) {
    let place = ring.completions + Int(harvest.head & ring.completion_mask)
    harvest.head &+= 1
    return (UInt32(truncatingIfNeeded: place.pointee.user_data), Int(place.pointee.result))
  }

  /// Gives the kernel back the places of what was taken.
  @inline(__always)
  func give(_ harvest: Harvest) {
    word(ring.completion_head).pointee.store(harvest.head, ordering: .releasing)
  }
}
