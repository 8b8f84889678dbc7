import ControlAPI
import DeviceHost
import Devices
import Engines
import EventLoop
import Lifecycle
import Logging
import Xen

/// What operators have done. Orders about a device's life become events of its machine; the rest changes what is beside it. Confined to the
/// supervisor's loop.
final class Orders {
  private let table: GuestTable
  private let log: Logger

  init(_ table: GuestTable, log: Logger) {
    self.table = table
    self.log = log
  }

  // MARK: Limits and profiles

  func set(limits: RateLimits) {
    table.rate.set(limits)
    table.board.update { $0.limits = limits }
    for guest in table.guests.values { guest.limitsChanged() }
  }

  func set(limits: RateLimits, of domain: DomainID) {
    guard let guest = table.guests[domain] else { return }
    guest.set(limits)
    table.updateBoard(guest)
  }

  func set(limits: RateLimits, of key: DeviceKey) {
    guard let (guest, device) = table.known(key) else { return }
    device.set(limits)
    table.herald.tell(.deviceLimited, guest, device, reason: JSONText.text(limits.json))
    table.updateBoard(guest)
  }

  /// Takes new profiles for what is opened from now on; limits and restart policies hold at once, for devices of every type.
  func use(_ profiles: Profiles) {
    table.runner.entries.profiles = profiles
    set(limits: profiles.daemonLimits)
    for guest in table.guests.values {
      set(limits: profiles.options(guest: guest.profileName, uuid: guest.uuid).limits, of: guest.domain)
      for device in guest.devices.values where device.key.kind != .spare && device.entry != nil {
        // A device that the new profiles do not know any more keeps what it has.
        guard let entry = try? table.runner.entries.entry(device.key, device.nodes, of: guest) else { continue }
        guest.machine.set(entry.settings.restart, of: device.key)
        if entry.settings.limits != device.limits { set(limits: entry.settings.limits, of: device.key) }
      }
      table.updateBoard(guest)
    }
    log.info("profiles are loaded: limits and restart policies hold at once, running devices keep their other options")
  }

  /// A device is started by an operator, whatever it was part of.
  func forgive(_ key: DeviceKey) { table.settings.crashes?.forgive(key) }

  // MARK: Spare disks

  /// Notes an image for a spare disk that is empty.
  ///
  /// - Returns: the event that makes it one.
  func fill(_ key: DeviceKey, image: String, limits: RateLimits?) -> DeviceEvent? {
    guard let (guest, device) = table.known(key), device.entry?.settings.image?.isEmpty == true else { return nil }
    device.entry = table.runner.entries.spare(key, image: image, limits: device.limits, of: guest)
    if let limits { device.set(limits) }
    return .command(.fill(image: image))
  }

  func detach(_ key: DeviceKey, deadline: UInt64) -> DeviceEvent? {
    guard let (_, device) = table.known(key), device.entry?.settings.image?.isEmpty == false else { return nil }
    return .command(.detach(deadline: deadline))
  }
}

extension Supervisor {
  // MARK: For the control socket, from its thread

  /// Has something done to a device's life.
  nonisolated func order(_ key: DeviceKey, _ command: DeviceEvent.Command) {
    onLoop { supervisor in
      if command == .restart { supervisor.orders.forgive(key) }
      supervisor.handle(.device(key, .command(command)), of: key.domain)
    }
  }

  nonisolated func fill(_ key: DeviceKey, image: String, limits: RateLimits?) {
    onLoop { supervisor in
      guard let event = supervisor.orders.fill(key, image: image, limits: limits) else { return }
      supervisor.handle(.device(key, event), of: key.domain)
    }
  }

  nonisolated func detach(_ key: DeviceKey, deadline: UInt64) {
    onLoop { supervisor in
      guard let event = supervisor.orders.detach(key, deadline: deadline) else { return }
      supervisor.handle(.device(key, event), of: key.domain)
    }
  }
}
