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
    for guest in table.guests.values { follow(profiles, guest, for: supervisor) }
    log.info("profiles loaded: limits and restart policies apply at once; running devices keep their other options")
  }

  /// Has one guest follow them.
  func follow(_ profiles: Profiles, _ guest: Guest, for supervisor: Supervisor) {
    let limits = profiles.options(guest: guest.profileName, uuid: guest.uuid).limits
    table.handle(.limit(limits), of: guest.domain, for: supervisor)
    for device in guest.devices.values where device.key.kind != .spare && device.entry != nil {
      // A device that the new profiles do not know any more keeps what it has.
      guard let settings = try? table.runner.entries.entry(device.key, device.nodes, of: guest).settings else {
        continue
      }
      table.handle(
        .device(device.key, .rules(settings.restart, settings.limits, isNews: true)), of: guest.domain, for: supervisor)
    }
  }

  /// What a change makes of the limits that a device has now: others may have changed since a client saw them.
  func limits(of key: DeviceKey, _ change: (RateLimits) -> RateLimits) -> RateLimits? {
    table.known(key).flatMap { guest, _ in guest.machine[key] }.map { change($0.rules.limits) }
  }
}

extension Supervisor {
  // MARK: For the control socket, from its thread

  /// Has something done to a device's life.
  nonisolated func order(_ key: DeviceKey, _ command: DeviceEvent.Command) {
    post(.device(key, .command(command)), of: key.domain)
  }

  /// Changes a device's limits.
  nonisolated func limit(_ key: DeviceKey, _ change: @escaping @Sendable (RateLimits) -> RateLimits) {
    onLoop { supervisor in
      guard let limits = supervisor.orders.limits(of: key, change) else { return }
      supervisor.handle(.device(key, .command(.limit(limits))), of: key.domain)
    }
  }

  /// Changes the limits of a guest's devices together.
  nonisolated func limit(_ domain: DomainID, _ change: @escaping @Sendable (RateLimits) -> RateLimits) {
    onLoop { supervisor in
      guard let guest = supervisor.table.guests[domain] else { return }
      supervisor.handle(.limit(change(guest.machine.limits)), of: domain)
    }
  }

  /// Changes the limits of all guests together.
  nonisolated func limitAll(_ change: @escaping @Sendable (RateLimits) -> RateLimits) {
    onLoop { $0.orders.limitAll(change($0.board.current.limits), for: $0) }
  }
}
