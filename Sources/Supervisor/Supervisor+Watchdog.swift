import Backends
import Devices
import EventLoop

/// A request that has been under way for too long.
package struct StuckRequest: Equatable, Sendable {
  /// Who has it.
  package enum Layer: String, Sendable {
    /// The queue's thread itself does not come back: from the kernel, or from mapping guest memory.
    case thread = "data thread"
    /// The store has not answered: the kernel, a disk, an NBD server.
    case engine
    /// It failed, and waits to be tried again.
    case retry
  }

  package var queue: Int
  package var layer: Layer
  /// Milliseconds.
  package var age: UInt64
}

/// The watchdog: looks at what the queues publish of their oldest requests. It takes no part in their work, so a queue that is
/// stuck cannot hold it up.
extension Supervisor {
  /// Milliseconds between two looks; a limit is noticed so much later at most.
  private static let watchPeriod: UInt64 = 1000

  /// Runs for as long as there are devices.
  func startWatchdog() {
    guard !isWatching else { return }
    isWatching = true
    watchAgain()
  }

  private func watchAgain() {
    loop.schedule(afterMilliseconds: Self.watchPeriod) { [self] in assumeIsolated { $0.watch() } }
  }

  private func watch() {
    guard !sessions.isEmpty, !isStopping else {
      isWatching = false
      return
    }
    let now = EventLoop.now()
    for session in sessions.values {
      for record in session.devices.values { look(at: record, of: session, now) }
    }
    watchAgain()
  }

  private func look(at record: DeviceRecord, of session: GuestSession, _ now: UInt64) {
    // A queue that is held waits for the operator, who has been told.
    guard let backend = record.backend as? BlockBackend, record.phase == .connected else {
      record.stuck = nil
      return
    }
    let found = backend.stuckRequest(at: now)
    switch (record.stuck, found) {
    case (nil, .some(let stuck)):
      tell(
        .deviceStuck, session, record,
        reason: "queue \(stuck.queue): a request is \(stuck.age) ms old, in the \(stuck.layer.rawValue)")
    case (.some(let old), nil):
      tell(.deviceUnstuck, session, record, reason: "queue \(old.queue)")
    default: break
    }
    let changed = (record.stuck == nil) != (found == nil)
    record.stuck = found
    if changed || found != nil { publish(session) }
  }
}

extension BlockBackend {
  /// The oldest request beyond the limit of the settings.
  package func stuckRequest(at now: UInt64) -> StuckRequest? {
    var worst: StuckRequest?
    for (index, counters) in counters.enumerated() {
      func consider(_ since: UInt64, _ layer: StuckRequest.Layer) {
        guard since != 0, now > since else { return }
        let age = (now &- since) / 1_000_000
        guard age >= settings.stuckMilliseconds, age > worst?.age ?? 0 else { return }
        worst = StuckRequest(queue: index, layer: layer, age: age)
      }
      let waiting = counters.waiting.load(ordering: .relaxed)
      consider(counters.batchSince.load(ordering: .relaxed), .thread)
      if worst?.queue != index {
        consider(counters.oldestSince.load(ordering: .relaxed), waiting > 0 ? .retry : .engine)
      }
    }
    return worst
  }
}
