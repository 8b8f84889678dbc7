import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Xen

/// The guests with their machines: events go in, effects are done. Confined to the supervisor's loop.
final class GuestTable {
  private(set) var guests: [DomainID: Guest] = [:]
  let settings: SupervisorSettings
  let reader: XenstoreReader
  let herald: Herald
  let runner: EffectRunner
  let board: StatusBoard
  /// The daemon's node of the tree of limits.
  let rate = RateNode()
  /// Events that wait for those before them.
  private var events: [(domain: DomainID, event: GuestEvent<DeviceKey>)] = []
  private var isHandling = false
  /// Entries that are to be looked at again.
  private var revisits: [DeviceKey] = []
  /// Guests and devices so far: the numbers of their machines follow each other.
  private var serial: UInt64 = 0

  init(
    _ settings: SupervisorSettings, _ reader: XenstoreReader, _ herald: Herald, _ runner: EffectRunner,
    _ board: StatusBoard
  ) {
    self.settings = settings
    self.reader = reader
    self.herald = herald
    self.runner = runner
    self.board = board
    rate.set(settings.profiles.daemonLimits)
  }

  /// Where the numbers of a new machine begin: a machine has four thousand million of its own.
  func newNumbers() -> UInt64 {
    serial += 1
    return serial << 32
  }

  func known(_ key: DeviceKey) -> (Guest, Device)? {
    guard let guest = guests[key.domain], let device = guest.devices[key] else { return nil }
    return (guest, device)
  }

  func insert(_ guest: Guest) { guests[guest.domain] = guest }

  func nextRevisit() -> DeviceKey? { revisits.isEmpty ? nil : revisits.removeFirst() }

  // MARK: Events and effects

  /// Gives an event to a guest's machine and does what follows, in order. What an effect brings about at once waits for the others.
  func handle(_ event: GuestEvent<DeviceKey>, of domain: DomainID, for supervisor: Supervisor) {
    events.append((domain, event))
    guard !isHandling else { return }
    isHandling = true
    while !events.isEmpty {
      let (domain, event) = events.removeFirst()
      if let guest = guests[domain] { step(guest, event, supervisor) }
    }
    isHandling = false
  }

  private func step(_ guest: Guest, _ event: GuestEvent<DeviceKey>, _ supervisor: Supervisor) {
    let wasWell = isWell(event, guest)
    for effect in guest.handle(event) { perform(effect, guest, supervisor) }
    if wasWell, !isWell(event, guest), case .device(let key, _) = event, key.kind.isInXenstore { revisits.append(key) }
    for key in guest.devices.keys where guest.machine[key] == nil {
      guest.devices.removeValue(forKey: key)?.bus.forget(key)
    }
    if guests[guest.domain] === guest { updateBoard(guest) }
  }

  /// Whether the device of an event is served: its description is not looked at then, and so it is as soon as it is not.
  private func isWell(_ event: GuestEvent<DeviceKey>, _ guest: Guest) -> Bool {
    if case .device(let key, _) = event { guest.machine[key]?.phase.isWell ?? false } else { false }
  }

  private func perform(_ effect: GuestEffect<DeviceKey>, _ guest: Guest, _ supervisor: Supervisor) {
    switch effect {
    case .device(let key, let effect):
      guard let device = guest.devices[key] else { return }
      perform(effect, device, guest, supervisor)
    case .gone: forget(guest)
    default: runner.perform(effect, guest, for: supervisor)
    }
  }

  private func perform(_ effect: DeviceEffect, _ device: Device, _ guest: Guest, _ supervisor: Supervisor) {
    let key = device.key
    switch effect {
    case .removeEntry: supervisor.onLoop { $0.removeEntryLater(key) }
    case .lookAgain: if key.kind.isInXenstore { revisits.append(key) }
    default:
      for event in runner.perform(effect, device, of: guest, for: supervisor) {
        events.append((guest.domain, .device(key, event)))
      }
    }
  }

  private func forget(_ guest: Guest) {
    let domain = guest.domain
    guests[domain] = nil
    reader.unwatch(name: domain)
    for folder in guest.watchedFrontends { reader.unwatch(frontends: folder) }
    countWatches()
    board.update { $0.guests[domain] = nil }
    // Entries may have come back while the guest ended.
    for kind in DeviceKey.Kind.watched { revisits += reader.keys(kind, of: domain).sorted { $0.device < $1.device } }
    if !reader.isDriverDomain, (try? reader.isThere(domain)) == false { herald.churn.forget { $0.domain == domain } }
  }

  // MARK: What others say

  func opened(_ key: DeviceKey, _ id: BackendID, _ result: Result<DeviceBackend, StartFault>) -> DeviceEvent? {
    guard let (_, device) = known(key), device.running?.id == id else { return nil }
    return runner.opened(id, device, result)
  }

  func event(for report: BusReport) -> (DomainID, GuestEvent<DeviceKey>)? {
    switch report {
    case .driver(let key, let latest):
      _ = latest.take()
      // As it is now: DEVICE_NEEDS_RESET may have come meanwhile.
      guard let transport = known(key)?.1.transport else { return nil }
      return (key.domain, .device(key, .driver(Driver(transport.currentStatus))))
    case .configuration(let key):
      if let (guest, _) = known(key) { runner.publishConfiguration(key, guest) }
      return nil
    case .scan:
      return nil
    }
  }

  /// What a device's frontend says now.
  func view(_ key: DeviceKey) -> DeviceEvent? { known(key).flatMap { runner.view(key, $0.0) } }

  // MARK: For others to see

  func updateBoard(_ guest: Guest) {
    let snapshot = guest.snapshot
    board.update { $0.guests[snapshot.domain] = snapshot }
  }

  func countWatches() {
    let watches = reader.watchCount
    board.update { $0.watches = watches }
  }

  func look(_ watchdog: Watchdog, at now: UInt64) {
    for guest in guests.values {
      var changed = false
      for device in guest.devices.values { changed = watchdog.look(at: device, of: guest, now, herald) || changed }
      if changed { updateBoard(guest) }
    }
  }
}

extension DevicePhase {
  /// Whether the device is served, so that its description matters to nobody.
  var isWell: Bool {
    switch self {
    case .ready, .connected, .faulted, .held, .paused, .closing: true
    case .opening, .failed, .restarting, .quarantined: false
    }
  }
}
