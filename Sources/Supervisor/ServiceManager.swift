import CSystemd
import Glibc

/// What the daemon tells systemd, through libsystemd. Without systemd all of it does nothing.
package enum ServiceManager {
  /// The service is up: guests can be created.
  package static func ready() { notify("READY=1") }

  /// The service is on its way out.
  package static func stopping() { notify("STOPPING=1\nSTATUS=Ending the devices") }

  /// One line for `systemctl status`.
  package static func status(_ text: String) { notify("STATUS=\(text)") }

  /// Feeds the watchdog.
  package static func alive() { notify("WATCHDOG=1") }

  /// Half of the watchdog's interval in milliseconds; nil when none is set.
  package static var watchdogPeriod: UInt64? {
    var microseconds: UInt64 = 0
    guard sd_watchdog_enabled(0, &microseconds) > 0 else { return nil }
    return max(1, microseconds / 2000)
  }

  /// Whether standard error goes to the journal, so that log lines may go there with their fields.
  package static var logsToJournal: Bool { getenv("JOURNAL_STREAM") != nil }

  private static func notify(_ state: String) { sd_notify(0, state) }
}
