import EventLoop
import Lifecycle
import Logging

/// Says what happens: a line in the log, an event for who has subscribed. What guests can bring about at will is said less often after a
/// while, also when their devices are others each time. Confined to the supervisor's loop.
final class Herald {
  private let log: Logger
  private let announce: @Sendable (SupervisorEvent) -> Void
  var churn: ChurnBudget<DeviceKey>

  init(log: Logger, churn: ChurnBudget<DeviceKey>, announce: @escaping @Sendable (SupervisorEvent) -> Void) {
    self.log = log
    self.churn = churn
    self.announce = announce
  }

  func tell(_ news: News, _ guest: Guest, _ device: Device? = nil, reason: String? = nil) {
    var reason = reason
    switch (news, device) {
    case (.deviceReady, let device?), (.deviceAdopted, let device?), (.deviceRestarted, let device?):
      reason = reason ?? device.servedBy
    case (.deviceQuarantined, let device?): reason = reason.map { $0 + guest.remedy(device) }
    default: break
    }
    if news.isGuestsDoing {
      // A guest's own news count with the device that it comes and goes with: any of its keys does.
      let key = device?.key ?? DeviceKey(kind: .generic, domain: guest.domain, device: .max)
      switch churn.verdict(for: key, at: .now) {
      case .say: break
      case .sayLast:
        reason = (reason.map { "\($0); " } ?? "") + "further messages of this kind are not logged for a minute"
      case .silent: return
      }
    }
    var metadata: Logger.Metadata = ["GUEST": "\(guest.name)"]
    if let device { metadata["DEVICE"] = "\(device.name)" }
    let subject = device.map { "\(guest.name)/\($0.name)" } ?? "\(guest.name) (domain \(guest.domain))"
    log.log(
      level: news.isTrouble ? .error : .info, "\(subject): \(news.rawValue)\(reason.map { ": \($0)" } ?? "")",
      metadata: metadata)
    announce(
      SupervisorEvent(
        kind: news, domain: guest.domain, guest: guest.name, device: device?.name, reason: reason))
  }

  /// The guest cannot be reached, so that there is none.
  func tellUnreachable(_ domain: UInt16, _ reason: String) {
    log.error("domain \(domain): \(reason)")
    announce(SupervisorEvent(kind: .guestFailed, domain: domain, guest: Supervisor.placeholder(domain), reason: reason))
  }

  /// Something of the daemon's own.
  func note(_ words: String) { log.warning("\(words)") }

  /// A defect of vxd.
  func unexpected(_ words: String, _ guest: Guest) {
    log.critical("guest \(guest.name): internal: \(words)", metadata: ["GUEST": "\(guest.name)"])
  }
}

extension Moment {
  /// As the shell measures it.
  static var now: Moment { Moment(nanoseconds: EventLoop.now(), chance: .random(in: 0...1)) }
}
