import DeviceHost
import Devices
import EventLoop
import Lifecycle

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

/// Looks at what the queues publish of their oldest requests. It takes no part in their work, so a queue that is stuck cannot hold it up.
struct Watchdog {
  /// Milliseconds between two looks; a limit is noticed so much later at most.
  static let period: UInt64 = 1000
  /// Its timer runs.
  var isRunning = false

  /// - Returns: whether anything is to be published of the device.
  func look(at device: Device, of guest: Guest, _ now: UInt64, _ herald: Herald) -> Bool {
    // A thread that hangs does so whatever the device's state is. What waits in a queue that is held waits for the operator, who has been
    // told, and in one that no driver has, for nobody.
    let isConnected = guest.machine[device.key]?.phase == .connected
    let found = device.backend?.stuckRequest(at: now, threadsOnly: !isConnected)
    guard device.stuck != nil || found != nil else { return false }
    guard device.backend != nil else {
      device.stuck = nil
      return true
    }
    switch (device.stuck, found) {
    case (nil, .some(let stuck)):
      herald.tell(
        .deviceStuck, guest, device,
        reason: "queue \(stuck.queue): a request is \(stuck.age) ms old, in the \(stuck.layer.rawValue)")
    case (.some(let old), nil): herald.tell(.deviceUnstuck, guest, device, reason: "queue \(old.queue)")
    case (nil, nil), (.some, .some): break
    }
    let changed = (device.stuck == nil) != (found == nil)
    device.stuck = found
    return changed || found != nil
  }
}

extension DeviceBackend {
  /// The oldest request beyond the limit of the settings.
  ///
  /// - Parameter threadsOnly: look only at whether threads come back from their batches.
  package func stuckRequest(at now: UInt64, threadsOnly: Bool = false) -> StuckRequest? {
    var worst: StuckRequest?
    for (index, counters) in counters.enumerated() {
      func consider(_ since: UInt64, _ layer: StuckRequest.Layer) {
        guard since != 0, now > since else { return }
        let age = (now &- since) / 1_000_000
        guard age >= stuckMilliseconds, age > worst?.age ?? 0 else { return }
        worst = StuckRequest(queue: index, layer: layer, age: age)
      }
      let waiting = counters.waiting.load(ordering: .relaxed)
      consider(counters.batchSince.load(ordering: .relaxed), .thread)
      if worst?.queue != index, !threadsOnly {
        consider(counters.oldestSince.load(ordering: .relaxed), waiting > 0 ? .retry : .engine)
      }
    }
    return worst
  }
}
