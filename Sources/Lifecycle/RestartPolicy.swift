/// What happens to a device whose backend failed.
package struct RestartPolicy: Hashable, Sendable {
  package enum Mode: String, CaseIterable, Sendable {
    /// It stays failed until its entry changes or an operator restarts it.
    case never
    /// A backend whose store is gone, or that cannot start, is started again.
    case onFailure = "on-failure"
    /// That, and a backend whose guest broke a queue is made anew.
    case always
  }

  package var mode = Mode.onFailure
  /// Restarts in a window of so many seconds; one more, and the device is quarantined.
  package var limit = 5
  package var windowSeconds: UInt64 = 600
  /// The first pause in milliseconds; it doubles with each restart in the window.
  package var firstPause: UInt64 = 250
  package var longestPause: UInt64 = 30_000

  package init() {}
}
