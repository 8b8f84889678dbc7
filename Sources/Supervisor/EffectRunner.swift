import ControlAPI
import DeviceHost
import Devices
import Engines
import EventLoop
import Lifecycle
import Synchronization
import Transport
import Xen

/// Does what the machines of guests and devices ask for: the one place that crosses threads. Jobs go to the guest's thread, backends are opened and closed
/// on their own threads, and each reports back as an event.
///
/// Confined to the supervisor's loop.
final class EffectRunner {
  private let settings: SupervisorSettings
  private let reader: XenstoreReader
  private let writer: XenstoreWriter
  private let herald: Herald
  /// Where a line that a guest wrote goes.
  private let logLine: @Sendable (_ guest: String, _ device: String, _ line: String) -> Void
  var entries: EntryMaker

  init(
    _ settings: SupervisorSettings, _ reader: XenstoreReader, _ writer: XenstoreWriter, _ herald: Herald,
    logLine: @escaping @Sendable (_ guest: String, _ device: String, _ line: String) -> Void
  ) {
    self.settings = settings
    self.reader = reader
    self.writer = writer
    self.herald = herald
    self.logLine = logLine
    entries = EntryMaker(profiles: settings.profiles, settings: settings)
  }

  /// - Parameter supervisor: gets the events that follow.
  /// - Returns: what follows at once.
  func perform(_ effect: DeviceEffect, _ device: Device, of guest: Guest, for supervisor: Supervisor) -> [DeviceEvent] {
    let (key, bus) = (device.key, device.bus)
    switch effect {
    case .start(let id): return start(id, device, of: guest, for: supervisor)
    case .stop(let id): stop(id, device, of: guest, for: supervisor)
    case .join(let id): join(id, device, of: guest)
    case .resume: device.backend?.resume()
    case .adjust(let id, let adjustment): adjust(id, adjustment, device, for: supervisor)
    case .limit(let limits, let isNews):
      device.keep(to: limits)
      if isNews { herald.tell(.deviceLimited, guest, device, reason: JSONText.text(limits.json)) }
    case .forgive: settings.crashes?.forgive(key)
    case .insert(let id, let needsReset):
      guard let backend = device.backend else { return [.insertFailed(id, "the backend is gone")] }
      run(guest, supervisor) { bus.insert(key, id, backend, needsReset: needsReset, $0) }
    case .claim: run(guest, supervisor) { [wish = device.wish] in bus.claim(key, wish, $0) }
    case .plug(let id):
      if let backend = device.backend { run(guest, supervisor) { bus.plug(key, id, backend, $0) } }
    case .remove:
      let job = bus.remove(key)
      run(guest, supervisor) { here in
        job(here)
        return .device(key, .removed)
      }
    case .leave: run(guest, supervisor) { bus.leave(key, $0) }
    case .connect(let sequence, let reference, let adopts):
      run(guest, supervisor) { bus.connect(key, sequence: sequence, reference: reference, adopts: adopts, $0) }
    case .disconnect: run(guest, supervisor) { bus.disconnect(key, $0) }
    case .writeConfiguration(let write): guest.buses.thread.run { bus.write(key, write, $0) }
    case .needReset: device.transport?.needReset()
    case .offer:
      if let (offer, configuration) = bus.offer(key) { writer.offer(key, offer, configuration: configuration) }
    case .publishConfiguration: publishConfiguration(key, guest)
    case .acknowledge(let sequence, let answer): writer.write(key, "vx-ack", "\(sequence) \(answer.text)")
    case .readFrontend: return view(key, guest).map { [$0] } ?? []
    case .writeError(let reason): if key.kind.isInXenstore { writer.writeError(key, reason) }
    case .writeState(let state, let over):
      if key.kind.isInXenstore { writer.writeState(key, state, over: over) }
    case .writeClosed: writer.writeClosed(key)
    case .assign(let image):
      let limits = guest.machine[key]?.rules.limits ?? RateLimits()
      device.entry = entries.spare(key, image: image, limits: limits, of: guest)
    case .empty: device.entry?.settings.image = ""
    case .saveAssignment: saveAssignment(device, guest)
    case .forgetAssignment: settings.stateFolder?.forgetAssignment(key)
    case .forgetState:
      settings.stateFolder?.forget(key)
      device.state = nil
    case .removeTraces: removeTraces(device, of: guest, for: supervisor)
    case .schedule(let timer, let pause):
      supervisor.later(pause) { $0.handle(.device(key, .timer(timer)), of: key.domain) }
    case .watchDrain(let number): watchDrain(number, key, supervisor)
    case .tell(let news, let reason): herald.tell(news, guest, device, reason: reason)
    case .unexpected(let words): herald.unexpected("\(device.name): \(words)", guest)
    case .removeEntry, .lookAgain, .retryBus, .leaving, .released: break  // the supervisor's, the guest machine's
    }
    return []
  }

  /// Does what concerns a guest as a whole.
  func perform(_ effect: GuestEffect<DeviceKey>, _ guest: Guest, for supervisor: Supervisor) {
    let (domain, server, uuid) = (guest.domain, guest.buses.server, guest.uuid)
    switch effect {
    // A guest that has no registers has no server to wait for either.
    case .startServer: run(guest, supervisor) { server?.start(uuid: uuid, $0) ?? .serverStarted }
    case .leaveServer: guest.buses.thread.run { server?.leave($0) }
    case .closeServer:
      run(guest, supervisor) {
        server?.close($0)
        return .serverClosed
      }
    case .releaseMemory:
      run(guest, supervisor) {
        server?.releaseMemory($0)
        return .memoryReleased
      }
    case .joinThread: guest.buses.thread.stopAndJoin()
    case .scheduleServer(let number, let pause):
      supervisor.later(pause) { $0.handle(.retryServer(number), of: domain) }
    case .limit(let limits): guest.keep(to: limits)
    case .reconsider: guest.reconsider()
    case .forgetState: settings.stateFolder?.forget(domain)
    case .tell(let news, let reason): herald.tell(news, guest, reason: reason)
    case .unexpected(let words): herald.unexpected(words, guest)
    case .device, .gone: break  // the table's
    }
  }

  /// Takes a device that an earlier daemon left, and that nobody has asked for, out of its place.
  func takeOut(_ key: DeviceKey, of bus: any GuestBus, _ guest: Guest) { guest.buses.thread.run(bus.remove(key)) }

  /// The same where nobody will.
  func discard(_ key: DeviceKey, on bus: any GuestBus, of guest: Guest) {
    takeOut(key, of: bus, guest)
    bus.forget(key)
  }

  /// Lets a guest look through its PCI bus, without devices that are in places of QEMU's; nil as for `GuestBus.answerScan`.
  func answerScan(of guest: Guest, without absent: [Displacement]?, for supervisor: Supervisor) {
    let buses = guest.buses.made
    guest.buses.thread.run { here in
      let gone = buses.flatMap { $0.answerScan(without: absent, here) }
      guard !gone.isEmpty else { return }
      supervisor.onLoop { supervisor in for device in gone { supervisor.displace(device) } }
    }
  }

  /// Hands a job to the guest's thread; its machine is told what comes of it.
  private func run(
    _ guest: Guest, _ supervisor: Supervisor, _ job: @escaping @Sendable (OnGuestThread) -> BusEvent?
  ) {
    let domain = guest.domain
    guest.buses.thread.run { here in
      if let event = job(here) { supervisor.post(event, of: domain) }
    }
  }

  /// Does what may wait for other programs on a thread of its own.
  ///
  /// - Returns: false where there is no thread for it.
  @discardableResult
  func aside(_ name: String, for supervisor: Supervisor, _ body: @escaping @Sendable () -> Void) -> Bool {
    do throws(Errno) {
      let thread = try LoopThread(name: name)
      thread.loop.enqueue {
        body()
        supervisor.onLoop { _ in thread.stopAndJoin() }
      }
      return true
    } catch {
      // Traces stay until the next start then, and QEMU is asked later.
      herald.note("no thread for \(name): \(error)")
      return false
    }
  }

  // MARK: Backends

  private func start(_ id: BackendID, _ device: Device, of guest: Guest, for supervisor: Supervisor) -> [DeviceEvent] {
    let entry: DeviceEntry
    var rules: [DeviceEvent] = []
    do throws(EntryFault) {
      let isNew: Bool
      (entry, isNew) = try makeEntry(device, of: guest)
      if isNew { rules = [.rules(entry.settings.restart, entry.settings.limits, isNews: false)] }
    } catch {
      // A driver that is at work keeps the device, and waits for a better entry.
      return [.startFailed(id, error.message, isFinal: true)]
    }
    // It is being taken out of its place, and has not left it yet: it gets another.
    if guest.machine[device.key]?.connection == .leaving { device.bus.vacate(device.key) }
    do throws(EntryFault) {
      try device.bus.admit(device.key, entry)
    } catch {
      let failed = DeviceEvent.startFailed(id, error.message, isFinal: true)
      // What no driver has found so far is taken out of a place that it cannot stay in.
      let isFound = device.transport?.currentStatus.isEmpty != true
      return rules + (isFound ? [failed] : [.command(.displace(error.message)), failed])
    }
    watchFrontend(device, guest)
    guard let source = device.bus.memory(of: device.key) else {
      return rules + [.startFailed(id, "the guest's memory cannot be reached", isFinal: false)]
    }
    var context = DeviceBackend.Context(
      name: "\(guest.name)/\(entry.name)", source: source, rate: device.rate, account: device.account,
      makeState: stateMaker(device, of: guest),
      report: { [key = device.key] report in supervisor.onLoop { $0.reported(key, id, report) } })
    context.fileName = Self.fileName(device.key, entry.name)
    context.isResumed = !device.wasOpened && (isKnown(device, guest) || isAdopted(device, guest))
    context.label = CrashRecord.label(device.key)
    context.consoleFolder = settings.consoleFolder
    context.mayAttach = settings.mayAttachConsoles
    context.decorate = settings.decorate
    let (logLine, guestName, deviceName) = (logLine, guest.name, entry.name)
    let quota = Mutex(LineQuota())
    context.logLine = { line in
      guard case .say(let left) = quota.withLock({ $0.next(at: EventLoop.now()) }) else { return }
      let more = left > 0 ? "(\(left) lines before this one were omitted) " : ""
      logLine(guestName, deviceName, more + line)
    }
    device.running = Device.Running(id: id)
    device.running?.threads = entry.settings.start(context) { [key = device.key] result in
      // The threads are known by the time that this job runs: it comes behind the present one.
      supervisor.onLoop { $0.opened(key, id, result) }
    }
    return rules
  }

  /// Whether the guest has found the device.
  private func isKnown(_ device: Device, _ guest: Guest) -> Bool {
    switch guest.machine[device.key]?.connection {
    case .inserting, .inserted, .xenbus: true
    // What is being taken away is not found any more.
    case nil, .absent, .leaveDue, .leaving: false
    }
  }

  /// Over Xenbus a device that an earlier daemon left has no connection before its first backend is there.
  private func isAdopted(_ device: Device, _ guest: Guest) -> Bool {
    if case .adoptable = guest.machine[device.key]?.earlier { true } else { false }
  }

  /// A device in names of files.
  private static func fileName(_ key: DeviceKey, _ name: String) -> String { "\(key.domain)-\(name)" }

  /// Has a backend changed by an operator's order; the outcome is an event.
  private func adjust(_ id: BackendID, _ adjustment: Adjustment, _ device: Device, for supervisor: Supervisor) {
    let key = device.key
    device.backend?.adjust(adjustment) { outcome in
      supervisor.post(.device(key, .adjusted(id, adjustment, outcome)), of: key.domain)
    }
  }

  /// A device that the guest does not know follows its entry and the profiles with each start; one that it knows keeps what it was made
  /// of, and the form in which its driver knows it, until its entry changes.
  ///
  /// - Returns: the entry, and whether it was made now.
  private func makeEntry(_ device: Device, of guest: Guest) throws(EntryFault) -> (DeviceEntry, isNew: Bool) {
    if let entry = device.entry, device.entryNodes == device.nodes, isKnown(device, guest) || device.key.kind == .spare
    {
      return (entry, false)
    }
    var entry = try entries.entry(device.key, device.nodes, of: guest)
    if let state = device.state {
      entry.settings.keep(state.layout.identity)
      if isKnown(device, guest) { entry.settings.keep(configuration: state.savedConfiguration) }
    }
    device.entry = entry
    device.entryNodes = device.nodes
    return (entry, true)
  }

  /// What the machine is told of a backend that was opened, or could not be.
  func opened(_ id: BackendID, _ device: Device, _ result: Result<DeviceBackend, StartFault>) -> DeviceEvent {
    switch result {
    case .success(let backend):
      device.running?.backend = backend
      device.wasOpened = true
      device.state = backend.state
      return .started(id, objection: device.key.kind == .spare ? backend.objectionAsSpare : nil)
    case .failure(let fault):
      // With the key of the entry that it is about, where there is one.
      let words = device.entry?.settings.image == nil ? fault.message : "params: \(fault.message)"
      return .startFailed(id, words, isFinal: false)
    }
  }

  private func stop(_ id: BackendID, _ device: Device, of guest: Guest, for supervisor: Supervisor) {
    guard let backend = device.backend else { return }
    device.running?.backend = nil
    let (key, bus) = (device.key, device.bus)
    var isLast = false
    if case .closed? = guest.machine[key]?.departure { isLast = true }
    guest.buses.thread.run { [isLast] here in
      bus.unplug(key, here)
      backend.stop {
        // On a data thread: another program may have to be waited for.
        if isLast { backend.retire() }
        supervisor.post(.device(key, .stopped(id)), of: key.domain)
      }
    }
  }

  private func join(_ id: BackendID, _ device: Device, of guest: Guest) {
    for thread in device.running?.threads ?? [] { thread.stopAndJoin() }
    device.running = nil
    // What the guest does not know takes nobody else's place; that of one that ends is its own for as long as its saved state names it.
    guard let machine = guest.machine[device.key], machine.connection == .absent, !machine.isEnding else { return }
    device.bus.vacate(device.key)
  }

  /// Gives a device its saved state with its first backend, on the data thread: that of the earlier daemon, or a new one.
  private func stateMaker(
    _ device: Device, of guest: Guest
  ) -> @Sendable (DeviceState.Layout) throws(StartFault) -> DeviceState {
    // Unless the device is in its place, a state of another one is not where a later daemon would have to put it.
    let isPresent = device.bus.transport(of: device.key) != nil
    let place = device.bus.place(of: device.key)
    let known = isPresent || device.state?.place == place ? device.state : nil
    let path = settings.stateFolder?.devicePath(device.key)
    let (logLine, guestName, deviceName) = (logLine, guest.name, device.name)
    return { layout throws(StartFault) in
      if let known {
        // The longest chain is the state's own: its journal has the room that it was made with.
        guard known.layout.slotCount == layout.slotCount,
          known.layout.identity.queueSizes == layout.identity.queueSizes
        else {
          throw .state(
            "the storage now supports \(layout.identity.queueSizes.count) queues, but the guest uses another number")
        }
        return known
      }
      if let path {
        do throws(Errno) {
          return try DeviceState(path: path, layout: layout, place: place)
        } catch {
          // A disk that does not survive a restart of vxd is better than none.
          logLine(
            guestName, deviceName,
            "cannot create \(path) (\(error)): the guest will have to reset this device after a restart of vxd")
        }
      }
      do throws(Errno) {
        return try DeviceState(layout: layout, place: place)
      } catch {
        throw .host(error)
      }
    }
  }

  // MARK: Xenstore

  private func watchFrontend(_ device: Device, _ guest: Guest) {
    guard let frontend = device.bus.frontend(of: device.key) else { return }
    let folder = frontend.split(separator: "/").dropLast().joined(separator: "/")
    if guest.watchedFrontends.insert(folder).inserted { reader.watch(frontends: folder) }
  }

  /// What the device's frontend says now; nil when nothing can be said.
  func view(_ key: DeviceKey, _ guest: Guest) -> DeviceEvent? {
    guard let device = guest.devices[key], let frontend = device.bus.frontend(of: key) else { return nil }
    do throws(XenError) {
      if let view = try reader.view(frontend: frontend) { return .frontend(view) }
      return try reader.hasFrontend(key, device.nodes) ? nil : .entry(.abandoned)
    } catch {
      return nil  // nothing follows from an answer that did not come
    }
  }

  func publishConfiguration(_ key: DeviceKey, _ guest: Guest) {
    if let text = guest.devices[key]?.bus.changedConfiguration(key) { writer.write(key, "vx-config", text) }
  }

  // MARK: Spares

  private func saveAssignment(_ device: Device, _ guest: Guest) {
    guard let image = device.entry?.settings.image, let limits = guest.machine[device.key]?.rules.limits else { return }
    do throws(Errno) {
      try settings.stateFolder?.save(StateFolder.SpareAssignment(image: image, limits: limits), of: device.key)
    } catch {
      logLine(guest.name, device.name, "cannot save which image is attached: \(error)")
    }
  }

  /// Looks every tenth of a second whether requests are under way still.
  func watchDrain(_ number: BackendID, _ key: DeviceKey, _ supervisor: Supervisor) {
    supervisor.later(0) { supervisor in
      guard let (guest, device) = supervisor.table.known(key), guest.machine[key]?.drain == number else { return }
      if device.inFlight == 0 { return supervisor.handle(.device(key, .drained(number)), of: key.domain) }
      supervisor.later(100) { $0.table.runner.watchDrain(number, key, $0) }
    }
  }

  // MARK: The end

  /// Removes what of a device outlives its backends, and ends with it.
  private func removeTraces(_ device: Device, of guest: Guest, for supervisor: Supervisor) {
    let (key, made) = (device.key, device.entry?.settings)
    let traces = DeviceTraces(
      fileName: Self.fileName(key, device.name), consoleFolder: settings.consoleFolder)
    run(guest, supervisor) { _ in
      made?.removeTraces(traces)
      return .device(key, .cleared)
    }
  }
}

extension DeviceEffect.Acknowledgement {
  /// As `vx-ack` says it.
  fileprivate var text: String {
    switch self {
    case .ok: "ok"
    case .wait: "wait"
    case .error(let reason): "error \(reason)"
    }
  }
}
