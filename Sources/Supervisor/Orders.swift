import ControlAPI
import DeviceHost
import EventLoop
import Lifecycle
import Logging
import Xen

/// Makes events of what operators want: of the machines of a device, of a guest, or of all of them. What becomes of it is theirs. Confined to
/// the supervisor's loop.
final class Orders {
  private let table: GuestTable
  private let log: Logger

  init(_ table: GuestTable, log: Logger) {
    self.table = table
    self.log = log
  }

  /// The node above all guests has no machine.
  func limitAll(_ limits: RateLimits, for supervisor: Supervisor) {
    table.rate.set(limits)
    table.board.update { $0.limits = limits }
    for domain in table.guests.keys { table.handle(.limitsAbove, of: domain, for: supervisor) }
  }

  /// Takes new profiles for what is opened from now on; limits and restart policies hold at once, for devices of every type.
  func use(_ profiles: Profiles, for supervisor: Supervisor) {
    table.runner.entries.profiles = profiles
    limitAll(profiles.daemonLimits, for: supervisor)
    for guest in table.guests.values {
      let limits = profiles.options(guest: guest.profileName, uuid: guest.uuid).limits
      table.handle(.limit(limits), of: guest.domain, for: supervisor)
      for device in guest.devices.values where device.key.kind != .spare && device.entry != nil {
        // A device that the new profiles do not know any more keeps what it has.
        guard let settings = try? table.runner.entries.entry(device.key, device.nodes, of: guest).settings else {
          continue
        }
        table.handle(
          .device(device.key, .rules(settings.restart, settings.limits, isNews: true)), of: guest.domain,
          for: supervisor)
      }
    }
    log.info("profiles are loaded: limits and restart policies hold at once, running devices keep their other options")
  }

  /// Whether a command makes sense of the device as it is now: between a client's look at it and now others may have changed it.
  func allows(_ command: DeviceEvent.Command, of key: DeviceKey) -> Bool {
    guard let (_, device) = table.known(key) else { return false }
    let image = device.entry?.settings.image
    return switch command {
    case .fill: image?.isEmpty == true
    case .detach: image?.isEmpty == false
    case .restart, .displace, .pause, .resume, .adjust, .limit, .end: true
    }
  }
}

extension Supervisor {
  // MARK: For the control socket, from its thread

  /// Has something done to a device's life.
  nonisolated func order(_ key: DeviceKey, _ command: DeviceEvent.Command) {
    onLoop { supervisor in
      guard supervisor.orders.allows(command, of: key) else { return }
      supervisor.handle(.device(key, .command(command)), of: key.domain)
    }
  }

  /// Changes the limits of a guest's devices together.
  nonisolated func limit(_ domain: DomainID, _ limits: RateLimits) { post(.limit(limits), of: domain) }

  /// Changes the limits of all guests together.
  nonisolated func limitAll(_ limits: RateLimits) { onLoop { $0.orders.limitAll(limits, for: $0) } }
}
