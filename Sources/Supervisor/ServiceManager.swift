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

  /// A listening socket that the service manager passed (sd_listen_fds(3)), by the name that its unit gives it.
  package static func socket(named name: String) -> Int32? {
    var names: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?
    let count = sd_listen_fds_with_names(0, &names)
    guard count > 0, let names else { return nil }
    defer {
      for index in 0..<Int(count) { free(names[index]) }
      free(names)
    }
    for index in 0..<Int(count) {
      guard let text = names[index], String(cString: text) == name else { continue }
      let descriptor = 3 + Int32(index)  // SD_LISTEN_FDS_START
      _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
      return descriptor
    }
    return nil
  }

  /// Whether standard error goes to the journal, so that log lines may go there with their fields.
  package static var logsToJournal: Bool { getenv("JOURNAL_STREAM") != nil }

  private static func notify(_ state: String) { sd_notify(0, state) }
}
