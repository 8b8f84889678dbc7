/// How long notifications of used buffers may be kept back, as a driver chose it (virtio 1.2, 5.1.6.5.8: VIRTIO_NET_CTRL_NOTF_COAL).
package struct NotificationLimits: Equatable, Sendable {
  /// The longest delay, in microseconds: what a driver asks for beyond that is not more. A notification may always come earlier.
  package static let longest: UInt32 = 10_000

  /// Packets after which the driver is notified; 0 for no such limit.
  package var packets: UInt32 = 0
  /// Microseconds after which it is; 0 for at once.
  package var microseconds: UInt32 = 0

  package init() {}

  package init(packets: UInt32, microseconds: UInt32) {
    self.packets = packets
    self.microseconds = min(microseconds, Self.longest)
  }

  /// Without a limit of time nothing is kept back: a packet that no other one follows would never be told of.
  package var delays: Bool { microseconds > 0 && packets != 1 }

  // MARK: Saved

  var word: UInt64 { UInt64(packets) << 32 | UInt64(microseconds) }
  init(word: UInt64) {
    self.init(packets: UInt32(word >> 32), microseconds: UInt32(truncatingIfNeeded: word))
  }
}

/// A notification that is kept back: a value. What is used is published at once, and it is only the driver's interrupt that waits.
package struct NotificationDelay: Equatable {
  package private(set) var limits = NotificationLimits()
  /// Packets since the first that it is owed for.
  private var packets: UInt64 = 0
  /// When the driver is to be notified at the latest, in monotonic nanoseconds; 0 when it is owed nothing.
  package private(set) var due: UInt64 = 0

  /// Whether anything is to be kept back.
  package private(set) var isOn = false

  package init() {}

  package mutating func set(_ limits: NotificationLimits) {
    self.limits = limits
    isOn = limits.delays
    // What is owed without a delay, or by a longer one, is due at the next look.
    if due != 0 { due = 1 }
  }

  /// A queue is set up again; its start notifies the driver.
  package mutating func reset() { (packets, due) = (0, 0) }

  /// Buffers were published.
  ///
  /// - Parameters:
  ///   - isWanted: the driver wants to be notified of them.
  ///   - most: packets that never wait together, since the driver may have no more buffers.
  /// - Returns: whether it is to be notified now.
  package mutating func published(packets count: UInt64, isWanted: Bool, most: UInt64, at now: UInt64) -> Bool {
    if due == 0 {
      guard isWanted else { return false }
      (packets, due) = (0, now &+ UInt64(limits.microseconds) &* 1000)
    }
    packets &+= count
    let limit = limits.packets > 0 ? min(UInt64(limits.packets), most) : most
    guard now >= due || packets >= limit else { return false }
    reset()
    return true
  }

  /// - Returns: whether the driver is to be notified now, since it has been owed that for long enough.
  package mutating func elapsed(at now: UInt64) -> Bool {
    guard due != 0, now >= due else { return false }
    reset()
    return true
  }
}
