import Synchronization

/// What a completed write is worth.
package enum BlockCacheMode: String, Sendable, CaseIterable {
  /// Completed writes are in the store's cache; a completed flush makes them durable. The driver may ask for write-through
  /// (VIRTIO_BLK_F_CONFIG_WCE).
  case writeback
  /// Completed writes are durable.
  case writethrough
  /// Flushes do nothing: a crash of the host may lose or tear anything. For data that can be made again.
  case unsafe
}

/// The driver's choice between write-back and write-through, made by its register accesses and read by the data threads.
package final class WritebackSwitch: Sendable {
  private let word = Atomic<Bool>(true)

  package init() {}

  package var isOn: Bool {
    get { word.load(ordering: .relaxed) }
    set { word.store(newValue, ordering: .relaxed) }
  }
}

/// A flush that failed where it cannot be tried again: what it should have made durable may be lost, and no later flush of any queue can
/// say otherwise.
package final class FlushFault: Sendable {
  private let word = Atomic<Int>(0)
  private let keep: @Sendable (Int) -> Void

  /// - Parameters:
  ///   - earlier: what an earlier backend of the same driver had.
  ///   - keep: called with what a later one has to know.
  package init(earlier: Int = 0, keep: @escaping @Sendable (Int) -> Void = { _ in }) {
    self.keep = keep
    word.store(earlier, ordering: .relaxed)
  }

  /// A negated errno; 0 when all is well.
  package var result: Int { word.load(ordering: .acquiring) }

  package func note(_ result: Int) {
    // Kept before the driver hears of it.
    if word.compareExchange(expected: 0, desired: result, ordering: .acquiringAndReleasing).exchanged { keep(result) }
  }

  /// Another driver begins: it has written nothing yet.
  package func forget() { word.store(0, ordering: .releasing) }
}

/// What happens to a request that the store failed.
package struct BlockErrorPolicy: Equatable, Sendable {
  package enum Action: Equatable, Sendable {
    /// The guest gets VIRTIO_BLK_S_IOERR.
    case report
    /// The request is tried again until so many milliseconds have passed since its first failure; then it is reported.
    case retry(milliseconds: UInt64)
    /// The queue stops with the request in it and the guest waits, until an operator says `resume`.
    case hold
  }

  /// Errors of the store, ENOSPC excepted.
  package var onError: Action = .report
  /// ENOSPC: a thin store is full.
  package var onNoSpace: Action = .report
  /// Pause between two tries, in milliseconds.
  package var retryPause: UInt64 = 250

  package init() {}

  /// - Parameter result: a negated errno.
  package func action(for result: Int) -> Action {
    switch result {
    // The engine was short of something itself: not the store's word, and over soon.
    case -11: .retry(milliseconds: Self.shortageLimit)  // EAGAIN
    case -28: onNoSpace  // ENOSPC
    default: onError
    }
  }

  /// Whether an error says that the store itself is gone, rather than that it fails: ENXIO, EBADF, ENODEV, ESTALE, ENOMEDIUM.
  package static func meansGone(_ result: Int) -> Bool { [-6, -9, -19, -116, -123].contains(result) }

  /// How long an engine may be short of something before its requests fail, in milliseconds.
  private static let shortageLimit: UInt64 = 10_000
}

/// How a pump serves its queue.
package struct BlockPumpSettings: Sendable {
  /// Answer to GET_ID, at most 20 bytes are used.
  package var serial: [UInt8] = []
  /// Memory for data on its way, where the engine cannot reach guest memory itself, in bytes.
  package var bounceBytes = 4 << 20
  /// Copy also where the engine could reach guest memory: for measurements.
  package var copiesAlways = false
  /// See `IdlePoll`; off where driver and device share a thread.
  package var pollsWhenIdle = true
  /// Queues that the pump's thread serves, its own included.
  package var queuesOnThread = 1
  package var cache = BlockCacheMode.writeback
  package var errors = BlockErrorPolicy()
  /// A store that is gone stops the queue, with its requests in the journal, instead of failing them.
  package var stopsWhenStorageIsGone = false

  package init() {}
}
