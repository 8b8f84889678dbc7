package import Synchronization
import Virtqueue

/// A count that one thread writes and any thread reads: no lock, no read-modify-write.
package final class Counter: Sendable {
  private let word = Atomic<UInt64>(0)

  package init() {}

  package var value: UInt64 { word.load(ordering: .relaxed) }

  /// Only the owner thread may call it.
  @inline(__always)
  package func add(_ amount: UInt64) {
    word.store(word.load(ordering: .relaxed) &+ amount, ordering: .relaxed)
  }

  /// Only the owner thread may call it.
  package func set(_ value: UInt64) { word.store(value, ordering: .relaxed) }
}

/// Why a packet or a piece of output was not delivered.
package enum DropReason: Int, CaseIterable, Sendable {
  /// The driver's buffers: missing, too small, or not in its memory.
  case badBuffer
  /// A header or packet that makes no sense.
  case malformed
  /// A source that is not the guest's to use: hardware address, then IP address.
  case foreignMAC
  case foreignIP
  /// What a guest is not to speak: a VLAN that is not its own, the link's own protocols, answers of routers and DHCP servers.
  case foreignProtocol
  /// Not for this guest, as its receive filter says.
  case filtered
  /// The link is down, or nobody listens.
  case linkDown
  /// The limit of the device, or the guest, or the daemon.
  case rate
  /// The host did not take it.
  case host
}

/// What a queue did since its device was created. Written by its data thread alone.
///
/// Reads are what the guest gets: of a disk, from the network, of input; writes are what comes from it.
package final class QueueCounters: Sendable {
  package let reads = Counter()
  package let writes = Counter()
  package let flushes = Counter()
  package let discards = Counter()
  package let writeZeroes = Counter()
  package let others = Counter()
  package let readBytes = Counter()
  package let writtenBytes = Counter()
  package let failed = Counter()
  package let unsupported = Counter()
  /// Steps that were tried again after the storage had failed them.
  package let retries = Counter()
  /// Requests that had to wait for their rate, and chains that were taken over from an earlier owner of the queue.
  package let throttled = Counter()
  package let adopted = Counter()
  /// Times that there was no room in the saved state's file system for more requests at a time.
  package let shortages = Counter()
  /// Batches whose answers the driver wanted an interrupt for, and those that needed none.
  package let interrupts = Counter()
  package let interruptsSuppressed = Counter()
  /// Written by the ioreq thread.
  package let notifications = Counter()
  package let batches = Counter()
  /// Guest addresses whose mapping was in the queue's own cache, and those that had to be asked of the pool.
  package let translationHits = Counter()
  package let translationMisses = Counter()
  /// What was not delivered, by reason.
  private let dropped = DropReason.allCases.map { _ in Counter() }
  /// Requests that the engine works on right now.
  package let inFlight = Atomic<UInt64>(0)
  /// Those of them that wait for another try.
  package let waiting = Atomic<UInt64>(0)
  /// When the oldest request under way was taken, and when the present batch began: monotonic nanoseconds, 0 for none.
  package let oldestSince = Atomic<UInt64>(0)
  package let batchSince = Atomic<UInt64>(0)

  package init() {}

  package func drops(_ reason: DropReason) -> Counter { dropped[reason.rawValue] }

  /// At the end of a batch.
  func settle(_ memory: inout GuestMemoryView) {
    batches.add(1)
    translationHits.set(memory.hits)
    translationMisses.set(memory.misses)
  }
}
