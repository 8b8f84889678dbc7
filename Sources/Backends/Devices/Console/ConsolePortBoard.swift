import Synchronization

/// Which ports of a console device are open, for other threads to read. Bit n is port n.
package final class ConsolePortBoard: Sendable {
  private let guest = Atomic<UInt64>(0)
  private let host = Atomic<UInt64>(0)

  package init() {}

  /// What a program in the guest has open.
  package func isGuestOpen(_ port: Int) -> Bool { Self.bit(guest.load(ordering: .relaxed), port) }
  /// What somebody on this host has open, or takes what comes.
  package func isHostOpen(_ port: Int) -> Bool { Self.bit(host.load(ordering: .relaxed), port) }

  func set(guest mask: UInt64) { guest.store(mask, ordering: .relaxed) }
  func set(host mask: UInt64) { host.store(mask, ordering: .relaxed) }

  package static func bit(_ mask: UInt64, _ port: Int) -> Bool { mask >> UInt64(port & 63) & 1 == 1 }
}
