import ControlAPI
import DeviceHost
import Devices
package import EventLoop
import Lifecycle
package import Logging
package import Xen

/// Watches Xenstore for guests with devices of ours, and has their machines (`Lifecycle`) decide what is done for them.
///
/// An actor bound to the daemon's main loop: everything here runs on that loop's thread, in short steps. An event goes to a guest's machine,
/// the effects that come out are performed by `EffectRunner`, and what takes time reports back as another event.
package actor Supervisor {
  package nonisolated let loop: EventLoop
  package nonisolated let board: StatusBoard
  nonisolated let hypervisor: any Hypervisor
  package nonisolated var unownedExecutor: UnownedSerialExecutor { loop.asUnownedSerialExecutor() }

  private let settings: SupervisorSettings
  private let log: Logger
  let reader: XenstoreReader
  let table: GuestTable
  private let population: Population
  let orders: Orders
  private var xenstoreToken: EventLoop.Token?
  private var watchdog = Watchdog()
  private var onStopped: (@Sendable () -> Void)?
  /// No device is started any more.
  private(set) var isStopping = false
  /// Guests whose QEMU is being asked.
  private var asked: Set<DomainID> = []

  /// - Parameter announce: gets each event; called on the loop's thread.
  package init(
    loop: EventLoop, hypervisor: any Hypervisor, settings: SupervisorSettings, log: Logger, board: StatusBoard,
    announce: @escaping @Sendable (SupervisorEvent) -> Void
  ) {
    self.loop = loop
    self.settings = settings
    self.log = log
    self.board = board
    self.hypervisor = hypervisor
    reader = XenstoreReader(socketPath: settings.xenstoreSocket)
    let writer = XenstoreWriter(reader, log: log)
    let herald = Herald(log: log, churn: ChurnBudget(settings.startRetry), announce: announce)
    let runner = EffectRunner(settings, reader, writer, herald) { guest, device, line in
      log.info("\(guest)/\(device): \(line)", metadata: ["GUEST": "\(guest)", "DEVICE": "\(device)"])
    }
    table = GuestTable(settings, reader, herald, runner, board)
    population = Population(hypervisor, settings, reader, writer, table, log)
    orders = Orders(table, log: log)
    let summary = hypervisor.summary
    board.update {
      $0.limits = settings.profiles.daemonLimits
      $0.hypervisor = summary
    }
  }

  // MARK: Onto the loop

  /// Runs `body` on the loop's thread, later.
  nonisolated func onLoop(_ body: @escaping @Sendable (isolated Supervisor) -> Void) {
    loop.enqueue { self.assumeIsolated { body($0) } }
  }

  /// The same after a pause in milliseconds; to be called on the loop's thread.
  nonisolated func later(_ pause: UInt64, _ body: @escaping @Sendable (isolated Supervisor) -> Void) {
    loop.schedule(afterMilliseconds: pause) { self.assumeIsolated { body($0) } }
  }

  /// An event from any thread.
  nonisolated func post(_ event: GuestEvent<DeviceKey>, of domain: DomainID) {
    onLoop { $0.handle(event, of: domain) }
  }

  /// Gives an event to a guest's machine and does what follows.
  func handle(_ event: GuestEvent<DeviceKey>, of domain: DomainID) {
    table.handle(event, of: domain, for: self)
    revisit()
    stopIfEmpty()
  }

  /// Looks at the entries again that may have come while others of their names ended.
  private func revisit() {
    while let key = table.nextRevisit() { reconcile(key) }
  }

  func reconcile(_ key: DeviceKey) { if !isStopping { population.reconcile(key, for: self) } }

  /// A backend is open, or could not be opened.
  func opened(_ key: DeviceKey, _ id: BackendID, _ result: Result<DeviceBackend, StartFault>) {
    guard let event = table.opened(key, id, result) else { return }
    handle(.device(key, event), of: key.domain)
  }

  /// A backend has something to say.
  func reported(_ key: DeviceKey, _ id: BackendID, _ report: DeviceReport) {
    guard let device = table.known(key)?.1 else { return }
    handle(.device(key, .report(id, DeviceEvent.Report(report, of: device.backend))), of: key.domain)
    // Reports of the status are merged, so that of a driver that has reset the device since may have been looked at before this fault.
    guard case .fault = report, let status = device.transport?.currentStatus, !status.contains(.needsReset)
    else { return }
    handle(.device(key, .driver(Driver(status))), of: key.domain)
  }

  /// A bus has something to say.
  func heard(_ report: BusReport) {
    if case .scan(let domain) = report, let guest = table.guests[domain], !askQEMU(of: guest) {
      guest.buses.learnNothing(isGone: false)
      table.runner.answerScan(of: guest, without: nil, for: self)
    }
    guard let event = table.event(for: report) else { return }
    handle(event.1, of: event.0)
  }

  // MARK: Start and stop

  /// Connects to xenstored and sets the watches. Guests that are there already are found by the watches' first events.
  ///
  /// Called on the loop's thread.
  package func start() throws(XenError) {
    try connect()
    log.info("watching Xenstore for virtio devices (\(board.current.hypervisor))")
    checkXenstoreLater()
    guard let crashes = settings.crashes else { return }
    if let death = crashes.lastDeath {
      log.error(
        "the vxd before this one died of signal \(death.signal)\(death.label.isEmpty ? "" : ", at work for \(death.label)")"
      )
    }
    later(CrashRecord.healthyAfter) { $0.settings.crashes?.noteHealth() }
  }

  private func connect() throws(XenError) {
    try reader.connect { log.info("\($0)") }
    guard let connection = reader.connection else { return }
    do throws(Errno) {
      xenstoreToken = try loop.onReadable(connection.eventDescriptor) { [unowned self] in
        assumeIsolated { $0.xenstoreEvents() }
      }
    } catch {
      throw XenError("epoll of xenstore's descriptor", error)
    }
    let watches = reader.watchCount
    let nodes = settings.hostNodes(isDriverDomain: reader.isDriverDomain)
    board.update {
      $0.watches = watches
      $0.hostNodes = nodes
      $0.hasXenstore = true
    }
  }

  private func disconnect() {
    if let xenstoreToken { loop.remove(xenstoreToken) }
    xenstoreToken = nil
    reader.disconnect()
  }

  private func checkXenstoreLater() { later(settings.xenstoreCheckMilliseconds) { $0.checkXenstore() } }

  /// Guests go on without xenstored; what starts and ends them does not. A new one is connected to as soon as it is there, and
  /// its watches bring everything in line that changed meanwhile.
  private func checkXenstore() {
    guard !isStopping else { return }
    defer { checkXenstoreLater() }
    askQEMU()
    population.tryAgain(for: self)
    guard !reader.isAlive else { return }
    if reader.connection != nil {
      log.error("xenstored no longer answers: devices keep working, and new ones wait until it is back")
      board.update { $0.hasXenstore = false }
    }
    disconnect()
    do throws(XenError) {
      try connect()
      log.notice("xenstored is back")
    } catch {
      reader.disconnect()
      log.debug("xenstored is not back: \(error)")
    }
  }

  /// QEMU is started behind the guest's disks: what it has on the guest's PCI bus is known when the guest runs. It is asked when the guest looks
  /// for the first time, and then whenever that may be another.
  private func askQEMU() { for guest in table.guests.values where guest.buses.asksQEMU { askQEMU(of: guest) } }

  /// - Returns: whether its answer comes, or that there is none.
  @discardableResult
  private func askQEMU(of guest: Guest) -> Bool {
    let domain = guest.domain
    guard !asked.contains(domain) else { return true }
    let folder = settings.qemuFolder
    guard QEMUMonitor.isThere(of: domain, folder: folder) else {
      guest.buses.learnNothing(isGone: true)
      return false
    }
    let isAsked = table.runner.aside("vxd-qemu-\(domain)", for: self) { [self] in
      let found = QEMUMonitor.functions(of: domain, folder: folder)
      onLoop { $0.learned(domain, found) }
    }
    if isAsked { asked.insert(domain) }
    return isAsked
  }

  private func learned(_ domain: DomainID, _ found: [(device: UInt8, function: UInt8)]?) {
    asked.remove(domain)
    guard let guest = table.guests[domain] else { return }
    // One that does not answer is asked again, but for a guest that waits.
    guard let found else {
      guest.buses.learnNothing(isGone: false)
      return table.runner.answerScan(of: guest, without: nil, for: self)
    }
    let disputed = guest.buses.learn(Set(found.map { PCIAddress(device: $0.device, function: $0.function) }))
    // What is not in its place yet never gets there: it is stopped before the guest is let look.
    for device in disputed where !device.isPresent { displace(device) }
    // For the others their guest decides, on its thread: what a driver has found by then stays.
    table.runner.answerScan(of: guest, without: disputed.filter(\.isPresent), for: self)
    table.updateBoard(guest)
  }

  /// A device is not in its place, which is QEMU's; unless it has another by now.
  func displace(_ device: Displacement) {
    let key = device.key
    if let known = table.known(key)?.1 {
      guard known.bus.isAt(device) else { return }
      return handle(.device(key, .command(.displace(device.reason))), of: key.domain)
    }
    // One of an earlier daemon, which nobody has asked for so far: it begins anew when somebody does.
    guard let guest = table.guests[key.domain],
      let bus = guest.buses.unclaimed.first(where: { $0.key == key && $0.bus.isAt(device) })?.bus
    else { return }
    settings.stateFolder?.forget(key)
    table.runner.takeOut(key, of: bus, guest)
  }

  /// Ends every device in good order; `completion` runs when nothing is left, on the loop's thread.
  ///
  /// The entries' states stay as they are: the toolstack did not ask for the end. Where state is saved, guests find their devices again
  /// with the next daemon, and wait until then.
  /// - Parameter handsOver: false ends the devices for good: their slots are empty afterwards.
  package func stop(handsOver: Bool = true, completion: @escaping @Sendable () -> Void) {
    isStopping = true
    settings.crashes?.noteHealth()
    onStopped = completion
    let departure: Departure = handsOver && settings.stateFolder != nil ? .handedOver : .closed(isAwaited: false)
    for domain in table.guests.keys.sorted() { handle(.end(departure), of: domain) }
    stopIfEmpty()
  }

  private func stopIfEmpty() {
    guard isStopping, table.guests.isEmpty, let completion = onStopped else { return }
    onStopped = nil
    disconnect()
    completion()
  }

  // MARK: Xenstore's events

  private func xenstoreEvents() {
    guard !isStopping else { return }
    population.follow(reader.changes(), for: self)
    revisit()
    startWatchdog()
  }

  /// Removes an entry where the backend's domain has to, behind state 6 when that has been seen.
  func removeEntryLater(_ key: DeviceKey, tries: Int = 20) {
    guard population.removesEntry(key), tries > 0 else { return }
    later(500) { supervisor in
      if supervisor.population.removeEntry(key) { supervisor.removeEntryLater(key, tries: tries - 1) }
    }
  }

  // MARK: The watchdog

  /// Runs for as long as there are guests.
  private func startWatchdog() {
    guard !watchdog.isRunning, !table.guests.isEmpty else { return }
    watchdog.isRunning = true
    later(Watchdog.period) { $0.watch() }
  }

  private func watch() {
    watchdog.isRunning = false
    guard !isStopping else { return }
    table.look(watchdog, at: EventLoop.now())
    startWatchdog()
  }

  /// Takes new profiles for what is opened from now on.
  package func use(profiles: Profiles) { orders.use(profiles, for: self) }

  /// Has a guest follow the profiles that know it now.
  func follow(_ domain: DomainID) {
    if let guest = table.guests[domain] { orders.follow(table.runner.entries.profiles, guest, for: self) }
  }
}
