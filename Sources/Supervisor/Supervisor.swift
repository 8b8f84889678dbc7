import Backends
import Devices
package import EventLoop
import Glibc
package import Logging
package import Xen

/// Watches Xenstore for guests with devices of ours, and runs a backend for each of those.
///
/// An actor bound to the daemon's main loop: everything here runs on that loop's thread, in short steps. What takes time runs
/// elsewhere and reports back: images are opened on the device's own thread, ioreq servers made and ended on the guest's.
package actor Supervisor {
  package nonisolated let loop: EventLoop
  package nonisolated let board: StatusBoard
  package nonisolated var unownedExecutor: UnownedSerialExecutor { loop.asUnownedSerialExecutor() }

  let hypervisor: any Hypervisor
  let settings: SupervisorSettings
  let log: Logger
  let announce: @Sendable (SupervisorEvent) -> Void
  var store: XenStore?
  var sessions: [DomainID: GuestSession] = [:]
  private var storeToken: EventLoop.Token?
  /// Kinds of devices whose entries have been looked at since the start.
  private var seenKinds: Set<DeviceKey.Kind> = []
  private var hasSwept = false
  /// Pages mapped by grants, of all guests together.
  let grantBudget: GrantBudget
  /// Whether this is not dom0: guests are reached over Xenbus only, and their entries are removed here.
  private(set) var isDriverDomain = false
  /// The daemon's node of the budget tree.
  let rate = RateNode()
  /// Guests go on after the end of this daemon, with the next one.
  private(set) var isHandingOver = false
  private var onStopped: (@Sendable () -> Void)?
  /// The watchdog's timer runs.
  var isWatching = false
  /// Options of disks; those of a running device stay.
  var profiles: DiskProfiles
  /// No device is started any more.
  private(set) var isStopping = false
  private static let releaseWatch = "@releaseDomain"
  private static let introduceWatch = "@introduceDomain"

  /// - Parameter announce: gets each event; called on the loop's thread.
  package init(
    loop: EventLoop, hypervisor: any Hypervisor, settings: SupervisorSettings, log: Logger, board: StatusBoard,
    announce: @escaping @Sendable (SupervisorEvent) -> Void
  ) {
    self.loop = loop
    self.hypervisor = hypervisor
    self.settings = settings
    grantBudget = GrantBudget(limit: settings.grantBudget)
    profiles = settings.profiles
    rate.set(settings.profiles.daemonLimits)
    board.update { $0.limits = settings.profiles.daemonLimits }
    self.log = log
    self.board = board
    self.announce = announce
  }

  /// Runs `body` on the loop's thread, later.
  nonisolated func onLoop(_ body: @escaping @Sendable (isolated Supervisor) -> Void) {
    loop.enqueue { self.assumeIsolated { body($0) } }
  }

  // MARK: Start and stop

  /// Connects to xenstored and sets the watches. Guests that are there already are found by the watches' first events.
  ///
  /// Called on the loop's thread.
  package func start() throws(XenError) {
    try connect()
    log.info("watching Xenstore for virtio devices (\(hypervisor.summary))")
    checkStoreLater()
  }

  private func connect() throws(XenError) {
    let store = try XenStore(socketPath: settings.xenstoreSocket)
    self.store = store
    isDriverDomain = (store.read("domid") ?? "0") != "0"
    for kind in DeviceKey.Kind.watched { try store.watch("backend/\(kind.rawValue)", token: kind.rawValue) }
    do throws(XenError) {
      try store.watch(Self.releaseWatch, token: Self.releaseWatch)
      if !isDriverDomain { try store.watch(Self.introduceWatch, token: Self.introduceWatch) }
    } catch {
      // A driver domain may not watch it before Xen 4.22; it learns of a death by its devices' nodes.
      log.info("no watch on @releaseDomain: \(error)")
    }
    do throws(Errno) {
      storeToken = try loop.onReadable(store.eventDescriptor) { [unowned self] in assumeIsolated { $0.storeEvents() } }
    } catch {
      throw XenError("epoll of xenstore's descriptor", error)
    }
    for (domain, session) in sessions {
      // Of a guest that a driver domain may not see, nothing comes.
      try? store.watch("/local/domain/\(domain)/name", token: "\(Self.nameToken)\(domain)")
      for folder in session.watchedFrontends { try store.watch("/" + folder, token: Self.token(frontends: folder)) }
    }
    board.update {
      $0.watches = store.watchCount
      $0.hypervisor = hypervisor.summary
      $0.hasXenstore = true
    }
  }

  // MARK: The end of xenstored

  private func checkStoreLater() {
    loop.schedule(afterMilliseconds: settings.storeCheckMilliseconds) { [weak self] in
      self?.assumeIsolated { $0.checkStore() }
    }
  }

  /// Guests go on without xenstored; what starts and ends them does not. A new one is connected to as soon as it is there, and
  /// its watches bring everything in line that changed meanwhile.
  private func checkStore() {
    guard !isStopping else { return }
    defer { checkStoreLater() }
    if let store, store.isAlive { return }
    if store != nil {
      log.error("xenstored does not answer any more: devices go on, new ones wait until it is back")
      board.update { $0.hasXenstore = false }
    }
    if let storeToken { loop.remove(storeToken) }
    storeToken = nil
    store = nil
    do throws(XenError) {
      try connect()
      log.notice("xenstored is back")
    } catch {
      store = nil
      log.debug("xenstored is not back: \(error)")
    }
  }

  /// Ends every device in good order; `completion` runs when nothing is left, on the loop's thread.
  ///
  /// The entries' states stay as they are: the toolstack did not ask for the end. Where state is saved, guests find their devices again
  /// with the next daemon, and wait until then.
  /// - Parameter handsOver: false ends the devices for good: their slots are empty afterwards.
  package func stop(handsOver: Bool = true, completion: @escaping @Sendable () -> Void) {
    isStopping = true
    onStopped = completion
    if handsOver, settings.stateFolder != nil {
      isHandingOver = true
      for session in sessions.values where session.phase != .closing { handOver(session) }
      return stopIfEmpty()
    }
    for session in sessions.values {
      for record in session.devices.values { close(record, of: session, wantsClosedState: false) }
    }
    stopIfEmpty()
  }

  func stopIfEmpty() {
    guard isStopping, sessions.isEmpty, let completion = onStopped else { return }
    onStopped = nil
    if let storeToken { loop.remove(storeToken) }
    store = nil
    completion()
  }

  /// Takes new options for the disks that are opened from now on.
  package func use(profiles: DiskProfiles) {
    self.profiles = profiles
    set(limits: profiles.daemonLimits)
    for session in sessions.values {
      set(limits: profiles.options(guest: session.name, uuid: session.uuid).limits, of: session.domain)
      for record in session.devices.values where record.key.kind != .spare {
        guard let entry = record.entry, let disk = entry.form.disk else { continue }
        var probe = BlockSettings(path: disk.path, readOnly: false, discard: false, serial: "")
        profiles.apply(
          to: &probe, guest: session.name, uuid: session.uuid, device: entry.name, number: record.key.device)
        record.policy = probe.restart
        if probe.limits != record.limits { set(limits: probe.limits, of: record.key) }
      }
    }
    log.info("profiles are loaded: limits and restart policies hold at once, running devices keep their other options")
  }

  // MARK: Xenstore events

  private func storeEvents() {
    guard let store else { return }
    var keys: Set<DeviceKey> = []
    var wholeKinds: Set<DeviceKey.Kind> = []
    var checksDomains = false
    var hasNewDomains = false
    var frontends: Set<DeviceKey> = []
    while let event = store.nextEvent() {
      if event.token == Self.releaseWatch {
        checksDomains = true
      } else if event.token == Self.introduceWatch {
        hasNewDomains = true
      } else if event.token.hasPrefix(Self.nameToken) {
        if let domain = DomainID(event.token.dropFirst(Self.nameToken.count)) { readName(domain) }
      } else if event.token.hasPrefix(Self.frontendToken) {
        frontends.formUnion(frontendKeys(event.path))
      } else if let kind = DeviceKey.Kind(rawValue: event.token) {
        if let key = Self.key(kind, path: event.path) { keys.insert(key) } else { wholeKinds.insert(kind) }
      }
    }
    for kind in wholeKinds { keys.formUnion(everyKey(kind)) }
    seenKinds.formUnion(wholeKinds)
    if checksDomains { keys.formUnion(keysOfDeadDomains()) }
    // Lower numbers first: disks get their slots in their order.
    for key in keys.sorted(by: { ($0.domain, $0.device) < ($1.domain, $1.device) }) { reconcile(key) }
    for key in frontends { frontendChanged(key) }
    // A new domain has its devices by now, or none: whoever has none is found here.
    if hasNewDomains { findGuests() }
    if checksDomains { closeOrphans() }
    guard !hasSwept, seenKinds.count == DeviceKey.Kind.watched.count else { return }
    hasSwept = true
    findGuests()
    sweepSavedState()
    sweepTaps()
  }

  /// Begins the token of the watch on a guest's name.
  static let nameToken = "name:"

  /// The device that a changed path belongs to: backend/KIND/DOMAIN/DEVICE/...; nil for a path above that.
  package static func key(_ kind: DeviceKey.Kind, path: String) -> DeviceKey? {
    let parts = path.split(separator: "/", omittingEmptySubsequences: false)
    guard parts.count >= 4, let domain = DomainID(parts[2]), let device = UInt32(parts[3]) else { return nil }
    return DeviceKey(kind: kind, domain: domain, device: device)
  }

  /// Devices that are in Xenstore or known already.
  private func everyKey(_ kind: DeviceKey.Kind) -> Set<DeviceKey> {
    var keys: Set<DeviceKey> = []
    let root = "backend/\(kind.rawValue)"
    for domain in store?.list(root) ?? [] {
      guard let number = DomainID(domain) else { continue }
      for device in store?.list("\(root)/\(domain)") ?? [] {
        if let device = UInt32(device) { keys.insert(DeviceKey(kind: kind, domain: number, device: device)) }
      }
    }
    for session in sessions.values { keys.formUnion(session.devices.keys.filter { $0.kind == kind }) }
    return keys
  }

  /// Known devices whose guest is no more: what a toolstack that died halfway leaves behind.
  private func keysOfDeadDomains() -> Set<DeviceKey> {
    var keys: Set<DeviceKey> = []
    for session in sessions.values where session.phase != .closing {
      keys.formUnion(session.devices.keys.filter(\.kind.isInXenstore))
    }
    return keys
  }

  // MARK: Events for others

  func publish(_ session: GuestSession) {
    let guest = session.snapshot
    board.update { $0.guests[guest.domain] = guest }
  }

  func forget(_ session: GuestSession) {
    let domain = session.domain
    board.update { $0.guests[domain] = nil }
  }
}
