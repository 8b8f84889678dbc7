import Backends
import Devices
import EventLoop
import Synchronization
import Transport
import Virtqueue
import Xen

/// The devices' side of the supervisor: from checked entries to running backends.
extension Supervisor {
  // MARK: Opening

  /// - Parameter failed: how often it could not be started before, and why the last time. It stays `failed` for everybody who asks
  ///   until its store is open: a device in trouble must not look well for the moment of another try.
  func open(
    _ key: DeviceKey, _ keys: [String: String], of session: GuestSession, failed: (starts: Int, reason: String)? = nil
  ) {
    let record = DeviceRecord(key: key, keys: keys, rate: RateNode(parent: session.rate))
    if let failed {
      record.failedStarts = failed.starts
      record.phase = .failed(reason: failed.reason)
    }
    session.devices[key] = record
    do throws(EntryFault) {
      var entry = try makeEntry(key, keys, of: session)
      record.policy = entry.form.common.restart
      record.limits = entry.form.common.limits
      record.rate.set(record.limits)
      if session.mmio == nil {
        try makeLink(record, of: session, frontend: entry.frontend)
        if let state = record.state { entry.form.keep(state.shape.profile) }
      } else if let restored = session.restored.removeValue(forKey: key) {
        take(restored, record, &entry)
      } else {
        record.slot =
          key.kind.isInXenstore
          ? try entry.slot(key, taken: session.takenSlots, count: settings.slots) : try lastSlot(session)
        // The guest's driver is at work, with a device that nobody remembers.
        record.mustBeReset = session.lost.removeValue(forKey: key)
        if record.mustBeReset == nil, settings.stateFolder != nil, keys["state"] == XenbusState.connected.rawValue {
          record.mustBeReset = "nothing is known of the device's life so far: the guest must reset it"
        }
      }
      record.entry = entry
      if case .failed(let reason) = session.phase { return fail(record, of: session, reason) }
      startBackend(record, entry, of: session)
    } catch {
      fail(record, of: session, error.message)
    }
    publish(session)
  }

  /// A device that an earlier daemon served keeps the form in which its driver knows it.
  private func take(_ restored: RestoredDevice, _ record: DeviceRecord, _ entry: inout DeviceEntry) {
    record.state = restored.state
    record.transport = restored.transport
    record.slot = restored.slot
    record.isAttached = true
    entry.form.keep(restored.state.shape.profile)
  }

  /// An entry with all its options.
  private func makeEntry(_ key: DeviceKey, _ keys: [String: String], of session: GuestSession) throws(EntryFault)
    -> DeviceEntry
  {
    var entry: DeviceEntry
    switch key.kind {
    case .disk, .generic: entry = try DeviceEntry.parse(key, keys)
    case .spare: entry = spareEntry(key)
    case .network, .console, .entropy: entry = try declaredEntry(key, of: session)
    }
    if key.kind == .generic { try addOptions(&entry, key, keys, session) }
    if var disk = entry.form.disk {
      disk.direct = settings.direct
      profiles.apply(to: &disk, guest: session.name, uuid: session.uuid, device: entry.name, number: key.device)
      disk.stopsWhenStoreIsGone = disk.restart.mode != .never
      entry.form = .disk(disk)
    }
    return entry
  }

  func startBackend(_ record: DeviceRecord, _ entry: DeviceEntry, of session: GuestSession) {
    guard let source: any GuestMemorySource = record.link?.pool ?? session.mmio?.pool else { return }
    let key = record.key
    let identity = ObjectIdentifier(record)
    let ticket = record.restartTicket
    var surroundings = DeviceBackend.Surroundings(
      name: "\(session.name)/\(entry.name)", source: source, rate: record.rate, account: record.account,
      makeState: stateMaker(record),
      report: { [self] report in onLoop { $0.reported(key, identity, ticket, report) } })
    surroundings.fileName = "\(key.domain)-\(entry.name)"
    surroundings.consoleFolder = settings.consoleFolder
    surroundings.mayAttach = settings.mayAttachConsoles
    let (log, guest, device) = (log, session.name, entry.name)
    let quota = Mutex(LineQuota())
    surroundings.logLine = { line in
      guard case .say(let left) = quota.withLock({ $0.next(at: EventLoop.now()) }) else { return }
      let more = left > 0 ? "(\(left) lines before this one are left out) " : ""
      log.info("\(guest)/\(device): \(more)\(line)", metadata: ["GUEST": "\(guest)", "DEVICE": "\(device)"])
    }
    record.threads = entry.form.start(
      surroundings, decorate: settings.decorate,
      completion: { [self] result in
        // The threads are known to the supervisor by the time that this job runs: it comes behind the present one.
        onLoop { $0.opened(key, identity, result) }
      })
  }

  /// The device that a late report is about, if it is still the same one.
  func current(_ key: DeviceKey, _ identity: ObjectIdentifier) -> (GuestSession, DeviceRecord)? {
    guard let (session, record) = known(key), ObjectIdentifier(record) == identity else { return nil }
    return (session, record)
  }

  private func opened(
    _ key: DeviceKey, _ identity: ObjectIdentifier, _ result: Result<DeviceBackend, StartFault>
  ) {
    guard let (session, record) = current(key, identity) else { return }
    switch result {
    case .success(let backend):
      record.backend = backend
      record.state = backend.state
      if record.phase == .closing { return stopBackend(record, of: session) }
      if handledByAfterStop(record, of: session) { return }
      guard judgeAttached(record, of: session, backend, nil) else { return publish(session) }
      if case .failed = record.phase { record.phase = .opening }
      attachIfReady(record, of: session)
    case .failure(let fault):
      record.joinThreads()
      if record.phase == .closing { return stopped(key, identity) }
      if handledByAfterStop(record, of: session) { return }
      guard judgeAttached(record, of: session, nil, fault.message) else { return publish(session) }
      if record.isAttached {
        backendFailed(record, of: session, Self.words(fault, record))
      } else {
        fail(record, of: session, Self.words(fault, record))
        retryStart(record, of: session)
      }
    }
    publish(session)
  }

  /// With the key of the entry that it is about, where there is one.
  private static func words(_ fault: StartFault, _ record: DeviceRecord) -> String {
    record.entry?.form.disk == nil ? fault.message : "params: \(fault.message)"
  }

  /// The device cannot be served. The entry says why; the guest and its other devices go on without it.
  func fail(_ record: DeviceRecord, of session: GuestSession, _ reason: String) {
    record.phase = .failed(reason: reason)
    record.slot = nil
    tell(.deviceFailed, session, record, reason: reason)
    write(record.key, "error", reason)
    // xl waits for this state and would take the whole guest down without it.
    if store?.read("\(record.key.path)/state") == XenbusState.initialising.rawValue {
      write(record.key, "state", XenbusState.initWait.rawValue)
    }
    if record.backend != nil { stopBackend(record, of: session) }
    publish(session)
  }

  // MARK: Running

  /// Puts a device into its slot when the image is open and the guest's server is there.
  func attachIfReady(_ record: DeviceRecord, of session: GuestSession) {
    guard session.phase == .running, let backend = record.backend else { return }
    let (key, identity, ticket) = (record.key, ObjectIdentifier(record), record.restartTicket)
    if record.isAttached {
      guard let transport = record.transport else { return }
      session.thread.loop.enqueue { [self] in
        transport.plug(backend)
        onLoop { $0.attached(key, identity, ticket) }
      }
      return
    }
    guard record.phase == .opening else { return }
    if let link = record.link { return offerDevice(record, of: session, link, backend) }
    guard let slot = record.slot, let mmio = session.mmio else { return }
    let mustBeReset = record.mustBeReset != nil
    let transport = MMIOTransport(
      device: backend, line: slot.line(of: mmio.handle), state: backend.state, needsReset: mustBeReset,
      onStatus: statusReporter(key, StatusRelay()))
    record.transport = transport
    record.isAttached = true
    let cell = session.cell
    session.thread.loop.enqueue { [self] in
      do throws(XenError) {
        try cell.server?.attach(transport, to: slot)
        if mustBeReset { transport.interruptForConfiguration() }
        onLoop { $0.attached(key, identity, ticket) }
      } catch {
        let reason = "base: \(error)"
        onLoop { supervisor in
          guard let (session, record) = supervisor.current(key, identity) else { return }
          supervisor.fail(record, of: session, reason)
        }
      }
    }
  }

  /// A Xenbus device is offered, or goes on where an earlier daemon was stopped.
  func xenbusAttached(_ record: DeviceRecord, of session: GuestSession) {
    record.failedStarts = 0
    record.phase = .ready
    if store?.read("\(record.key.path)/error") != nil { try? store?.remove("\(record.key.path)/error") }
    let words = record.servedBy
    tell(record.link?.adoptsEpoch == nil ? .deviceReady : .deviceAdopted, session, record, reason: words)
    publish(session)
  }

  private func attached(_ key: DeviceKey, _ identity: ObjectIdentifier, _ ticket: UInt64) {
    guard let (session, record) = current(key, identity), record.phase != .closing, record.restartTicket == ticket,
      let transport = record.transport
    else { return }
    let status = transport.currentStatus
    let wasRestarting: Bool
    if case .opening = record.phase { wasRestarting = false } else { wasRestarting = true }
    record.failedStarts = 0
    if status.contains(.needsReset) {
      record.phase = .faulted(reason: record.mustBeReset ?? "the guest must reset the device")
    } else if status.contains(.driverOK) {
      // The backend may have been held before this word of its being attached.
      record.phase = record.heldQueues.values.first.map { .held(reason: $0) } ?? .connected
    } else {
      record.phase = .ready
    }
    if store?.read("\(key.path)/error") != nil { try? store?.remove("\(key.path)/error") }
    // The server, its page, ranges and channels are ready: the guest's first instruction finds the device.
    if store?.read("\(key.path)/state") == XenbusState.initialising.rawValue {
      write(key, "state", XenbusState.initWait.rawValue)
    }
    let store = record.servedBy
    if record.isDetaching {
      record.isDetaching = false
      tell(.deviceDetached, session, record)
      return publish(session)
    }
    defer { if record.link != nil { frontendChanged(key) } }
    switch record.phase {
    case .faulted(let reason): tell(.deviceFaulted, session, record, reason: reason)
    case .connected where !wasRestarting: tell(.deviceAdopted, session, record, reason: store)
    default: tell(wasRestarting ? .deviceRestarted : .deviceReady, session, record, reason: store)
    }
    publish(session)
  }

  func statusChanged(_ key: DeviceKey, _ status: DeviceStatus) {
    // A transport belongs to one record; a late report of an earlier one meets a device that is opening, where it changes nothing.
    guard let (session, record) = known(key) else { return }
    switch record.phase {
    case .ready where status.contains(.driverOK),
      .faulted where status.contains(.driverOK) && !status.contains(.needsReset):
      // The second case: a reset and a new start whose reports were merged.
      record.phase = .connected
      // The guest runs, so creation is over and nobody waits for state 2 any more.
      let state = store?.read("\(key.path)/state")
      if record.link == nil, state == XenbusState.initWait.rawValue || state == XenbusState.initialising.rawValue {
        write(key, "state", XenbusState.connected.rawValue)
      }
      tell(.deviceConnected, session, record)
    case .connected where status.isEmpty, .faulted where status.isEmpty, .held where status.isEmpty:
      record.phase = .ready
      tell(.deviceReset, session, record)
    default: return
    }
    publish(session)
  }

  private func reported(
    _ key: DeviceKey, _ identity: ObjectIdentifier, _ ticket: UInt64, _ report: DeviceReport
  ) {
    // A backend that is being stopped has nothing to say any more: each queue of it may report the same.
    guard let (session, record) = current(key, identity), record.phase != .closing, record.restartTicket == ticket
    else { return }
    switch report {
    case .fault(let fault):
      guestFaulted(record, of: session, fault.message)
      // Reports of the status are merged, so that of a driver that has reset the device since may have been looked at before this.
      if let status = record.transport?.currentStatus, !status.contains(.needsReset) { statusChanged(key, status) }
    case .storeGone(let result):
      backendFailed(record, of: session, "the store is gone (\(Errno(Int32(clamping: -result))))")
    case .held(let queue, let result):
      let reason =
        "queue \(queue): the store fails (\(Errno(Int32(clamping: -result)))); the guest waits for 'vxctl resume'"
      record.heldQueues[queue] = reason
      if record.phase == .connected { record.phase = .held(reason: reason) }
      tell(.deviceHeld, session, record, reason: reason)
    case .resumed(let queue):
      record.heldQueues[queue] = nil
      guard record.heldQueues.isEmpty else { break }
      if case .held = record.phase { record.phase = .connected }
      tell(.deviceResumed, session, record)
    case .storeLost(let reason): tell(.deviceStoreLost, session, record, reason: reason)
    case .storeBack: tell(.deviceStoreBack, session, record)
    case .portsOpen(let mask):
      guard let console = record.backend as? ConsoleBackend else { return }
      let open = console.settings.ports.enumerated().filter { ConsolePortBoard.bit(mask, $0.offset) }
      let names = open.map { $0.element.name.isEmpty ? "\($0.offset)" : $0.element.name }
      return tell(
        .devicePorts, session, record,
        reason: names.isEmpty ? "the guest has none open" : "the guest has open: \(names.joined(separator: ", "))")
    }
    publish(session)
  }

  // MARK: For operators

  /// Follows the size of a device's store, see `BlockBackend.resize`; the outcome is an event.
  nonisolated func resize(_ key: DeviceKey, _ backend: BlockBackend, to bytes: UInt64?) {
    backend.resize(to: bytes) { [self] result in
      onLoop { supervisor in
        guard let (session, record) = supervisor.known(key), record.backend === backend else { return }
        switch result {
        case .success(let size): supervisor.tell(.deviceResized, session, record, reason: "\(size) bytes")
        case .failure(let fault): supervisor.tell(.deviceNotResized, session, record, reason: fault.message)
        }
      }
    }
  }
}
