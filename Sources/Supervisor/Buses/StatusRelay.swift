import Synchronization
import Transport

/// The driver's latest status on its way from the guest's thread to the supervisor.
///
/// At most one report is under way, however often the guest writes its status register: a guest that resets its device in a storm
/// cannot fill the supervisor's mailbox.
final class StatusRelay: Sendable {
  private let latest = Mutex<DeviceStatus?>(nil)

  /// - Returns: whether a report must be sent; else one is under way and will carry this status.
  func put(_ status: DeviceStatus) -> Bool {
    latest.withLock { latest in
      defer { latest = status }
      return latest == nil
    }
  }

  func take() -> DeviceStatus { latest.withLock { $0.take() ?? [] } }
}
