package import Transport

/// Which ports of a console device are open, for other threads to read. Bit n is port n.
package final class ConsolePortBoard: Sendable {
  /// What a program in the guest has open.
  package let guest = Gauge()
  /// What somebody on this host has open, or takes what comes.
  package let host = Gauge()

  package init() {}

  func set(guest mask: UInt64) { guest.set(mask) }
  func set(host mask: UInt64) { host.set(mask) }

  package static func bit(_ mask: UInt64, _ port: Int) -> Bool { mask >> UInt64(port & 63) & 1 == 1 }
}
