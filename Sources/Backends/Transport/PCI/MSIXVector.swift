import Synchronization

/// One MSI-X vector between a data thread, which raises it, and the guest's thread, which changes it: without a lock.
///
/// One word says whether the vector is masked, off (MSI-X as a whole), and pending, and counts changes. Who raises reads the
/// message and looks whether the word is still the same; who changes the message masks the vector meanwhile. So no message is torn, and
/// none is lost: it is sent, or noted as pending before the vector is unmasked, and then sent by who unmasks it.
final class MSIXVector: Sendable {
  private static let masked: UInt64 = 1
  private static let pending: UInt64 = 2
  private static let off: UInt64 = 4
  private static let change: UInt64 = 8

  private let word = Atomic<UInt64>(masked | off)
  private let address = Atomic<UInt64>(0)
  private let data = Atomic<UInt32>(0)

  enum Outcome: Equatable {
    case send(MSIMessage)
    /// It is masked, and sent when it is no more.
    case pending
    /// MSI-X is off: the interrupt has to go another way.
    case off
  }

  var isPending: Bool { word.load(ordering: .acquiring) & Self.pending != 0 }

  /// On any thread. Tries again only after a change, which costs the guest an access.
  func raise() -> Outcome {
    var current = word.load(ordering: .acquiring)
    while true {
      if current & Self.off != 0 { return .off }
      if current & Self.masked != 0 {
        let (exchanged, seen) = word.compareExchange(
          expected: current, desired: current | Self.pending, ordering: .acquiringAndReleasing)
        if exchanged { return .pending }
        current = seen
        continue
      }
      let message = MSIMessage(address: address.load(ordering: .acquiring), data: data.load(ordering: .acquiring))
      let seen = word.load(ordering: .acquiring)
      if seen == current { return .send(message) }
      current = seen
    }
  }

  /// On the guest's thread.
  ///
  /// - Returns: a message that was pending and is to be sent now.
  func set(_ entry: MSIXTable.Entry, isMasked: Bool, isOff: Bool) -> MSIMessage? {
    var current = word.bitwiseOr(Self.masked, ordering: .acquiringAndReleasing).newValue
    // Releasing: whoever sees a part of the new message sees the vector masked, or the next version of the word.
    address.store(entry.message.address, ordering: .releasing)
    data.store(entry.message.data, ordering: .releasing)
    let flags = (isMasked || entry.holdsBack ? Self.masked : 0) | (isOff ? Self.off : 0)
    while true {
      let isDue = flags == 0 && current & Self.pending != 0
      let version = (current & ~(Self.change - 1)) &+ Self.change
      let (exchanged, seen) = word.compareExchange(
        expected: current, desired: version | flags | (isDue ? 0 : current & Self.pending),
        ordering: .acquiringAndReleasing)
      if exchanged { return isDue ? entry.message : nil }
      current = seen
    }
  }

  /// Takes back what is pending.
  ///
  /// - Returns: whether something was.
  @discardableResult
  func clear() -> Bool {
    word.bitwiseAnd(~Self.pending, ordering: .acquiringAndReleasing).oldValue & Self.pending != 0
  }
}
