import DeviceHost
import Devices
import Lifecycle
import Xen

/// One guest with devices of ours: its machine, and what belongs to it. Confined to the supervisor's loop.
final class Guest {
  let domain: DomainID
  var name: String
  /// As the toolstack wrote it; nil where this domain may not see it.
  var uuid: String?
  let buses: GuestBuses
  /// Changed by its events alone.
  private(set) var machine: GuestMachine<DeviceKey>
  var devices: [DeviceKey: Device] = [:]
  /// Directories of frontends that are watched for it.
  var watchedFrontends: Set<String> = []
  /// The guest's node of the tree of limits.
  let rate: RateNode

  /// - Parameter saved: what an earlier daemon left of it: a server, which its vCPUs may be waiting for.
  init(
    _ domain: DomainID, name: String, uuid: String?, buses: GuestBuses, saved: StateFolder.Guest?, rate: RateNode,
    numbersAfter: UInt64, retry: RestartPolicy
  ) {
    self.domain = domain
    self.name = name
    self.uuid = uuid
    self.buses = buses
    self.rate = rate
    machine = GuestMachine(
      hasServer: saved != nil, holdsWindows: saved?.windows.isEmpty == false, retry: retry, numbersAfter: numbersAfter)
  }

  /// The name by which the profiles know it; empty for none.
  var profileName: String { name == Supervisor.placeholder(domain) ? "" : name }

  /// Gives its machine an event.
  ///
  /// - Returns: what is to be done, in this order.
  func handle(_ event: GuestEvent<DeviceKey>) -> [GuestEffect<DeviceKey>] { machine.handle(event, at: .now) }

  func keep(to limits: RateLimits) {
    rate.set(limits)
    reconsider()
  }

  /// Limits of the guest or above it have changed: what waits may go earlier.
  func reconsider() { for device in devices.values { device.backend?.limitsChanged() } }

  /// What operators see of a device's life.
  func phase(of device: Device) -> DevicePhase {
    let phase = machine[device.key]?.phase ?? .closing
    guard case .quarantined(let reason) = phase else { return phase }
    return .quarantined(reason: reason + remedy(device))
  }

  /// How a device leaves its quarantine.
  func remedy(_ device: Device) -> String { "; left alone until 'vxctl device restart \(name)/\(device.name)'" }

  /// What the status board shows of it.
  var snapshot: StatusBoard.Guest {
    let (phaseName, reason): (String, String?) =
      switch machine.phase {
      case .starting: ("starting", nil)
      case .bare, .running: ("running", nil)
      case .failed(let reason, _): ("failed", reason)
      case .closing, .gone: ("closing", nil)
      }
    let facts = buses.facts
    return StatusBoard.Guest(
      domain: domain, name: name, uuid: uuid, phase: phaseName, reason: reason, vcpus: facts.vcpus,
      channels: facts.channels,
      server: facts.server, mappings: facts.mappings, facts: facts.rows, guestNeeds: buses.guestNeeds,
      notes: buses.notes, limits: machine.limits,
      devices: devices.values.sorted { $0.key.device < $1.key.device }.map { snapshot($0) })
  }

  private func snapshot(_ device: Device) -> StatusBoard.Device {
    let machine = machine[device.key]
    let place = device.bus.facts(of: device.key)
    let (settings, transport) = (device.entry?.settings, device.transport)
    return StatusBoard.Device(
      key: device.key, name: device.name, guestName: self.name, phase: phase(of: device), slot: place.slot,
      type: device.type?.name ?? "unknown", path: settings?.image ?? device.nodes["params"],
      readOnly: settings?.readOnly ?? false, readings: device.backend?.readings,
      driverStatus: transport?.currentStatus, interrupts: transport?.interruptGauge,
      stuck: device.stuck, accounts: device.account.all, limits: machine?.rules.limits ?? RateLimits(),
      restarts: machine?.restarts.count ?? 0,
      faults: machine?.faults.count ?? 0, policy: machine?.rules.restart ?? RestartPolicy(),
      isEmptySpare: machine?.spare == .empty, entryPath: device.nodes["params"],
      bus: type(of: device.bus).name, guestNeeds: device.bus.guestNeeds, grants: place.grants, facts: place.rows,
      addressBesideQEMU: place.addressBesideQEMU, warning: place.warning, channels: place.channels)
  }
}

extension Supervisor {
  /// What a guest is called whose name this domain may not see. Its number is another guest's after a reboot, and so nothing by which the
  /// profiles could know it.
  static func placeholder(_ domain: DomainID) -> String { "domain-\(domain)" }
}
