import CAIO
import Synchronization

/// The ring in which the kernel leaves completions of an aio context (linux: fs/aio.c, struct aio_ring), read without a system
/// call, as QEMU does and libaio does for its look at an empty ring.
///
///     0 id | 4 nr | 8 head | 12 tail | 16 magic | 20 compat features | 24 incompat features | 28 header length | 32 events
struct CompletionRing {
  private static let magic: UInt32 = 0xa10a_10a1
  private static let headerBytes = 32

  private let start: UnsafeMutableRawPointer
  private let count: UInt32

  /// - Returns: nil when the context has no ring of the known form; io_getevents has to serve then.
  init?(_ context: io_context_t) {
    let ring = UnsafeMutableRawPointer(context)
    func word(_ offset: Int) -> UInt32 { ring.load(fromByteOffset: offset, as: UInt32.self) }
    guard word(16) == Self.magic, word(24) == 0, word(28) == UInt32(Self.headerBytes), word(4) > 0 else { return nil }
    start = ring
    count = word(4)
  }

  private func word(_ offset: Int) -> UnsafeMutablePointer<Atomic<UInt32>> {
    (start + offset).assumingMemoryBound(to: Atomic<UInt32>.self)
  }

  /// Takes completions that are there, at most `capacity`.
  func take(into events: UnsafeMutablePointer<io_event>, capacity: Int) -> Int {
    var head = word(8).pointee.load(ordering: .relaxed)
    let tail = word(12).pointee.load(ordering: .acquiring)
    guard head < count, tail < count else { return 0 }
    var taken = 0
    while head != tail, taken < capacity {
      events[taken] = (start + Self.headerBytes + Int(head) &* MemoryLayout<io_event>.stride).load(as: io_event.self)
      taken &+= 1
      head = head &+ 1 == count ? 0 : head &+ 1
    }
    word(8).pointee.store(head, ordering: .releasing)
    return taken
  }
}
