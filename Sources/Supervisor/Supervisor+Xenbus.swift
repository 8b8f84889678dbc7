import Backends
import Devices
import EventLoop
import Transport
import Xen

/// Devices that guests reach over Xenbus: the handshake by the `state` nodes (deploy/guest-module/PROTOCOL.md).
extension Supervisor {
  /// Begins the token of the watch on a guest's frontends.
  static let frontendToken = "frontends:"

  static func token(frontends folder: String) -> String { frontendToken + folder }

  /// Whether a guest's devices go over Xenbus: always in a driver domain, which has no rights over its guests; in dom0 for guests
  /// in which virtio-mmio cannot be had.
  func usesXenbus(_ domain: DomainID) -> Bool {
    if isDriverDomain { return true }
    let type = store?.read("/libxl/\(domain)/type")
    return type == "pv" || type == "pvh"
  }

  /// Prepares a device's link before its backend is started.
  func makeLink(_ record: DeviceRecord, of session: GuestSession, frontend: String) throws(EntryFault) {
    do throws(XenError) {
      if session.grants == nil { session.grants = try hypervisor.openGrants(session.domain) }
    } catch {
      throw EntryFault("frontend-id", "grants of the guest cannot be had: \(error)")
    }
    let link = XenbusLink(pool: GrantPool(budget: grantBudget), frontend: frontend)
    record.link = link
    let folder = frontend.split(separator: "/").dropLast().joined(separator: "/")
    if session.watchedFrontends.insert(folder).inserted {
      try? store?.watch("/" + folder, token: Self.token(frontends: folder))
      countWatches()
    }
    adopt(record, link)
  }

  /// What an earlier daemon served goes on, when the driver is still where that one left it.
  private func adopt(_ record: DeviceRecord, _ link: XenbusLink) {
    guard let folder = settings.stateFolder else { return }
    let frontend = frontendState(link)
    let isConnected =
      record.keys["state"] == XenbusState.connected.rawValue && (frontend == .connected || frontend == .initialised)
    guard isConnected, let state = try? DeviceState(path: folder.devicePath(record.key)), state.place.isXenbus,
      state.saved.status.contains(.driverOK)
    else { return folder.forget(record.key) }
    record.state = state
    link.adoptsEpoch = state.saved.registers.epoch
  }

  /// The device's first backend: its transport.
  func makeTransport(_ record: DeviceRecord, _ link: XenbusLink, _ backend: DeviceBackend) -> XenbusTransport {
    let key = record.key
    let relay = StatusRelay()
    let transport = XenbusTransport(
      device: backend, state: backend.state, onStatus: statusReporter(key, relay),
      onConfiguration: { [self] in onLoop { $0.publishConfiguration(key) } })
    link.transport = transport
    return transport
  }

  /// A device whose store is open, and which is in no guest's hands yet.
  func offerDevice(_ record: DeviceRecord, of session: GuestSession, _ link: XenbusLink, _ backend: DeviceBackend) {
    record.transport = makeTransport(record, link, backend)
    record.isAttached = true
    let state = record.keys["state"].flatMap(XenbusState.init(rawValue:))
    if let epoch = link.adoptsEpoch {
      link.epoch = epoch
      link.phase = .offered
      publishConfiguration(record.key)
    } else if state == .connected, frontendState(link) == .connected {
      // The driver is at work with a device that nobody remembers.
      mustReset(record, link)
      return guestFaulted(
        record, of: session, "nothing is known of the device's life so far: the guest must reset the device")
    } else if state == .initWait, let epoch = Self.epoch(record.keys["vx-offer"]) {
      // An offer that was made, and perhaps answered, before this daemon was there.
      link.epoch = epoch
      link.phase = .offered
      publishConfiguration(record.key)
    } else {
      offer(record, link)
    }
    xenbusAttached(record, of: session)
    frontendChanged(record.key)
  }

  private static func epoch(_ offer: String?) -> UInt32? {
    offer?.split(separator: " ").first { $0.hasPrefix("epoch=") }.flatMap { UInt32($0.dropFirst(6)) }
  }

  /// As with a device that is connected and broken: the driver's reset leads to a new life.
  private func mustReset(_ record: DeviceRecord, _ link: XenbusLink) {
    link.phase = .connected
    link.transport?.needReset()
    publishConfiguration(record.key)
  }

  /// State 2, with what the driver needs to set the device up.
  private func offer(_ record: DeviceRecord, _ link: XenbusLink) {
    guard let transport = link.transport, !link.isLeaving else { return }
    link.epoch = UInt32.random(in: 1...UInt32.max)
    link.phase = .offered
    link.configurationWrites = nil
    // A driver that is loaded anew counts from one again.
    link.refusedSequence = nil
    link.published = transport.configurationText
    let space = link.published.split(separator: " ", omittingEmptySubsequences: false).last?.utf8.count ?? 0
    let text = link.offer(transport.profile, configurationBytes: space / 2).text
    let (path, published) = (record.key.path, link.published)
    do throws(XenError) {
      try store?.transaction { transaction throws(XenError) in
        guard let store, store.list(path, in: transaction) != nil else { return }
        // An end that the toolstack wants is not overwritten.
        let state = store.read("\(path)/state", in: transaction)
        guard state != XenbusState.closing.rawValue else { return }
        // What was said of an earlier setup is not about one of this offer.
        try store.remove("\(path)/vx-ack", in: transaction)
        try store.write("\(path)/vx-offer", text, in: transaction)
        try store.write("\(path)/vx-config", published, in: transaction)
        try store.write("\(path)/state", XenbusState.initWait.rawValue, in: transaction)
      }
    } catch {
      log.error("\(path): the offer cannot be written: \(error)")
    }
  }

  /// Writes `vx-config` when it would say something else than before.
  func publishConfiguration(_ key: DeviceKey) {
    guard let (_, record) = known(key), let link = record.link, let transport = link.transport else { return }
    let text = transport.configurationText
    guard text != link.published else { return }
    link.published = text
    write(key, "vx-config", text)
  }

  // MARK: The frontend

  func frontendState(_ link: XenbusLink) -> XenbusState? {
    store?.read("\(link.frontend)/state").flatMap(XenbusState.init(rawValue:))
  }

  /// The devices that a changed path of a frontend belongs to: /local/domain/FE/device/KIND/DEVICE/..., or one above.
  func frontendKeys(_ path: String) -> [DeviceKey] {
    let parts = path.split(separator: "/")
    guard parts.count >= 3, let domain = DomainID(parts[2]), let session = sessions[domain] else { return [] }
    let kind = parts.count >= 5 ? DeviceKey.Kind(rawValue: String(parts[4])) : nil
    let device = parts.count >= 6 ? UInt32(parts[5]) : nil
    return session.devices.keys.filter { key in
      (kind == nil || key.kind == kind) && (device == nil || key.device == device)
    }
  }

  /// Looks at what the driver says, and does what follows. May be called at any time.
  func frontendChanged(_ key: DeviceKey) {
    guard let store, !isStopping, let (session, record) = known(key), let link = record.link, record.isAttached,
      record.phase != .closing
    else { return }
    let state: XenbusState?
    do throws(XenError) {
      guard let text = try store.readIfVisible("\(link.frontend)/state") else { return reconcile(key) }
      state = XenbusState(rawValue: text)
    } catch {
      return log.warning("cannot read \(link.frontend)/state: \(error)")
    }
    switch (link.phase, state) {
    case (.offered, .initialised), (.offered, .connected):
      setUp(record, of: session, link)
    case (.connected, .initialised), (.connected, .connected):
      configurationWritten(record, of: session, link)
    case (.connected, _):
      disconnect(record, of: session, link)
    case (.closed, .initialising):
      if !link.isLeaving { offer(record, link) }
    case (.offered, .closing), (.offered, .closed), (.offered, .initialising):
      // A driver that was refused, and begins again.
      if link.refusedSequence != nil { offer(record, link) }
    default: break
    }
    if link.isLeaving, link.phase == .offered || link.phase == .closed, state != .initialised, state != .connected {
      close(record, of: session, wantsClosedState: true)
    }
  }

  private func setUp(_ record: DeviceRecord, of session: GuestSession, _ link: XenbusLink) {
    guard let text = store?.read("\(link.frontend)/vx-setup"), let transport = link.transport,
      let grants = session.grants
    else { return }
    let words = text.split(separator: " ", omittingEmptySubsequences: false)
    guard words.count == 2, let sequence = UInt32(words[0]), let reference = UInt32(words[1]) else {
      return refuse(record, of: session, link, sequence: 0, "vx-setup is not 'SEQUENCE GRANT'")
    }
    guard sequence != link.refusedSequence else { return }
    // Left alone until an operator restarts it; the guest waits.
    if case .quarantined = record.phase { return }
    link.phase = .connecting
    let adopts = link.adoptsEpoch != nil
    let saved = adopts ? record.state?.saved.registers : nil
    let (key, identity, pool, epoch) = (record.key, ObjectIdentifier(record), link.pool, link.epoch)
    let offer = link.offer(transport.profile, configurationBytes: 0)
    session.thread.loop.enqueue { [self] in
      do throws(ConnectFault) {
        let (setup, doorbells) = try XenbusConnection.open(grants, setup: reference, offer: offer, pool: pool)
        if let saved, !Self.fits(saved, setup) {
          pool.detach()
          throw .setup("the setup page is not what it was when the device was connected")
        }
        transport.connect(setup, epoch: epoch, doorbells: doorbells, adopts: adopts)
        onLoop { $0.setUpDone(key, identity, sequence, nil) }
      } catch {
        onLoop { $0.setUpDone(key, identity, sequence, error) }
      }
    }
  }

  /// Whether a setup page says what it did when the queues' journals began.
  private static func fits(_ saved: MMIOTransport.Registers, _ setup: XenbusSetup) -> Bool {
    guard saved.driverFeatures == setup.features.rawValue, saved.queues.count == setup.queues.count else {
      return false
    }
    return zip(zip(saved.queues, saved.ready), setup.queues).allSatisfy { old, new in
      guard let layout = new?.layout else { return !old.1 }
      return old.1 && old.0.size == layout.size && old.0.descriptorArea == layout.descriptorArea
        && old.0.driverArea == layout.driverArea && old.0.deviceArea == layout.deviceArea
    }
  }

  private func setUpDone(_ key: DeviceKey, _ identity: ObjectIdentifier, _ sequence: UInt32, _ fault: ConnectFault?) {
    guard let (session, record) = current(key, identity), let link = record.link, link.phase == .connecting else {
      return
    }
    let adopted = link.adoptsEpoch != nil
    link.adoptsEpoch = nil
    switch fault {
    case nil:
      link.phase = .connected
      link.tries = 0
      link.refusedSequence = nil
      write(key, "vx-ack", "\(sequence) ok")
      if !link.isLeaving { write(key, "state", XenbusState.connected.rawValue) }
      publishConfiguration(key)
    case .noRoom(let words):
      // The guest waits, as for a slow disk: another try a little later, ever more slowly.
      link.phase = .offered
      log.warning("\(session.name)/\(record.name): \(words); the guest waits")
      write(key, "vx-ack", "\(sequence) wait")
      let pause = RestartHistory.pause(settings.startRetry, tries: link.tries, random: 0.5)
      link.tries += 1
      loop.schedule(afterMilliseconds: pause) { [self] in assumeIsolated { $0.frontendChanged(key) } }
      return
    case .setup(let words):
      if adopted { mustReset(record, link) } else { link.phase = .offered }
      refuse(record, of: session, link, sequence: sequence, words)
    }
    frontendChanged(key)
    publish(session)
  }

  private func refuse(
    _ record: DeviceRecord, of session: GuestSession, _ link: XenbusLink, sequence: UInt32, _ words: String
  ) {
    link.refusedSequence = sequence
    write(record.key, "vx-ack", "\(sequence) error \(words)")
    guestFaulted(record, of: session, "the guest's setup is refused: \(words)")
  }

  private func disconnect(_ record: DeviceRecord, of session: GuestSession, _ link: XenbusLink) {
    // A backend that is being stopped may still be at work in the arena: `backendStopped` comes back to this.
    guard let transport = link.transport, !record.isStoppingBackend else { return }
    link.phase = .disconnecting
    let (key, identity, pool) = (record.key, ObjectIdentifier(record), link.pool)
    session.thread.loop.enqueue { [self] in
      transport.disconnect()
      pool.detach()
      onLoop { $0.disconnected(key, identity) }
    }
  }

  private func disconnected(_ key: DeviceKey, _ identity: ObjectIdentifier) {
    guard let (session, record) = current(key, identity), let link = record.link, link.phase == .disconnecting else {
      return
    }
    link.phase = .closed
    if !link.isLeaving { write(key, "state", XenbusState.closed.rawValue) }
    frontendChanged(key)
    publish(session)
  }

  /// The driver wrote to the configuration space: `vx-cfgw` is "NUMBER OFFSET BYTES-IN-HEX".
  private func configurationWritten(_ record: DeviceRecord, of session: GuestSession, _ link: XenbusLink) {
    guard let text = store?.read("\(link.frontend)/vx-cfgw"), let transport = link.transport else { return }
    let words = text.split(separator: " ", omittingEmptySubsequences: false)
    guard words.count == 3, let number = UInt32(words[0]), number != link.configurationWrites,
      let offset = Int(words[1]), (0...4096).contains(offset), let bytes = Self.bytes(words[2]), bytes.count <= 8
    else { return }
    link.configurationWrites = number
    session.thread.loop.enqueue { transport.write(offset: offset, bytes: bytes) }
  }

  /// The bytes of pairs of lower-case hexadecimal digits; nil for anything else.
  package static func bytes(_ hex: Substring) -> [UInt8]? {
    let digits = Array(hex.utf8)
    guard digits.count % 2 == 0 else { return nil }
    func value(_ digit: UInt8) -> UInt8? {
      switch digit {
      case UInt8(ascii: "0")...UInt8(ascii: "9"): digit - UInt8(ascii: "0")
      case UInt8(ascii: "a")...UInt8(ascii: "f"): digit - UInt8(ascii: "a") + 10
      default: nil
      }
    }
    var bytes: [UInt8] = []
    for index in stride(from: 0, to: digits.count, by: 2) {
      guard let high = value(digits[index]), let low = value(digits[index + 1]) else { return nil }
      bytes.append(high << 4 | low)
    }
    return bytes
  }

  // MARK: The end

  /// The toolstack wants the device gone (state 5): a driver that is at work ends its requests first.
  ///
  /// - Returns: whether the end is to be waited for; it comes with the frontend's state, or with its node's disappearance.
  func waitsForDriver(_ record: DeviceRecord) -> Bool {
    guard let link = record.link, record.isAttached, link.phase != .closed, link.phase != .idle,
      let state = frontendState(link), state == .connected || state == .initialised
    else { return false }
    link.isLeaving = true
    return true
  }

  /// Lets go of everything of a Xenbus device; `done` comes on the guest's thread.
  func release(_ link: XenbusLink, of session: GuestSession, done: @escaping @Sendable () -> Void) {
    let (transport, pool) = (link.transport, link.pool)
    link.phase = .disconnecting
    session.thread.loop.enqueue {
      transport?.disconnect()
      pool.detach()
      done()
    }
  }

  /// The toolstack of another domain leaves the removal of an entry to its backend's domain: behind state 6, when that has been seen.
  /// So does libxl before 4.18 in dom0 with generic devices, which it does not know.
  func removeEntryLater(_ key: DeviceKey, tries: Int = 20) {
    guard isDriverDomain || key.kind == .generic, tries > 0 else { return }
    loop.schedule(afterMilliseconds: 500) { [self] in
      assumeIsolated { supervisor in
        guard supervisor.known(key) == nil, let store = supervisor.store else { return }
        let isOver =
          store.read("\(key.path)/online") == "0" && store.read("\(key.path)/state") == XenbusState.closed.rawValue
        let isLeft = !supervisor.isDriverDomain && store.read("/local/domain/\(key.domain)/name") == nil
        if supervisor.isDriverDomain ? isOver : isLeft {
          try? store.remove(key.path)
          // As libxl does with what is empty then.
          let parent = "backend/\(key.kind.rawValue)"
          for path in ["\(parent)/\(key.domain)", parent] where store.list(path)?.isEmpty == true {
            try? store.remove(path)
          }
        } else if !supervisor.isDriverDomain, store.read("\(key.path)/frontend") != nil {
          // The toolstack is not done with the guest.
          supervisor.removeEntryLater(key, tries: tries - 1)
        }
      }
    }
  }
}
