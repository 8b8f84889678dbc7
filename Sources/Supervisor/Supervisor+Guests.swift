import Backends
import Devices
import EventLoop
import Logging
import Xen

/// The guests' side of the supervisor: sessions with their ioreq server.
extension Supervisor {
  /// The session of a guest, made when its first device appears.
  ///
  /// - Returns: nil while an earlier session of that domain ends; the device is looked at again after that.
  func session(for domain: DomainID) throws(XenError) -> GuestSession? {
    if let known = sessions[domain] { return known.phase == .closing ? nil : known }
    let name = store?.read("/local/domain/\(domain)/name") ?? "domain-\(domain)"
    let uuid = store?.read("/local/domain/\(domain)/vm").map { $0.split(separator: "/").last.map(String.init) ?? $0 }
    let isXenbus = usesXenbus(domain)
    let mmio = isXenbus ? nil : try mmioSide(domain)
    let thread: LoopThread
    do throws(Errno) {
      thread = try LoopThread(name: isXenbus ? "vxd-xenbus-\(domain)" : "vxd-ioreq-\(domain)")
    } catch {
      throw XenError("start of the ioreq thread", error)
    }
    let session = GuestSession(
      domain: domain, name: name, uuid: uuid, thread: thread, rate: RateNode(parent: rate))
    session.mmio = mmio
    sessions[domain] = session
    session.limits = profiles.options(guest: name, uuid: uuid).limits
    session.rate.set(session.limits)
    if let mmio {
      startServer(session, mmio, adopting: restore(session, mmio))
      openDeclared(session)
    } else {
      session.phase = .running
    }
    try? store?.watch("/local/domain/\(domain)/name", token: "\(Self.nameToken)\(domain)")
    countWatches()
    startWatchdog()
    tell(.guestAppeared, session)
    return session
  }

  private func mmioSide(_ domain: DomainID) throws(XenError) -> GuestSession.MMIOSide {
    let handle = try hypervisor.open(domain)
    return GuestSession.MMIOSide(
      handle: handle,
      pool: ForeignMappingPool(
        guest: handle, bucketShift: settings.bucketShift, budgetBytes: settings.mappingBudget))
  }

  /// The guest was renamed, or its name is looked at for the first time.
  func readName(_ domain: DomainID) {
    guard let session = sessions[domain], let name = store?.read("/local/domain/\(domain)/name"), name != session.name
    else { return }
    let old = session.name
    session.name = name
    tell(.guestRenamed, session, reason: "it was '\(old)'")
    publish(session)
  }

  func countWatches() {
    let watches = store?.watchCount ?? 0
    board.update { $0.watches = watches }
  }

  /// - Parameter adopting: the server of an earlier daemon, whose guest may be waiting for answers from it.
  private func startServer(_ session: GuestSession, _ mmio: GuestSession.MMIOSide, adopting earlier: UInt16?) {
    let domain = session.domain
    let restored = session.restored.values.map { ($0.transport, $0.slot) }
    let folder = settings.stateFolder
    let uuid = session.uuid
    let (cell, handle, pool, loop) = (session.cell, mmio.handle, mmio.pool, session.thread.loop)
    let ignoresInvalidations = settings.ignoresInvalidations
    #if arch(x86_64)
      let window: (UInt64, UInt64)? = (
        SlotTable.firstBase, SlotTable.firstBase + SlotTable.windowStride * UInt64(settings.slots) - 1
      )
    #else
      let window: (UInt64, UInt64)? = nil
    #endif
    loop.enqueue { [self] in
      do throws(XenError) {
        let server = try Self.makeServer(
          handle, pool, loop, earlier: earlier, ignoresInvalidations: ignoresInvalidations
        ) { identifier in
          // Known to a later daemon before it can hold up a vCPU.
          try? folder?.save(StateFolder.Guest(server: identifier, uuid: uuid), of: domain)
        }
        cell.server = server
        if let window { try server.claim(first: window.0, last: window.1) }
        for (transport, slot) in restored { try server.attach(transport, to: slot) }
        server.serveAll()
        let report = StatusBoard.IOReqServerReport(identifier: server.identifier, counters: server.counters)
        let vcpus = server.vcpuCount
        onLoop { $0.serverStarted(domain, report, vcpus) }
      } catch {
        cell.server?.close()
        cell.server = nil
        let reason = "\(error)"
        onLoop { $0.serverFailed(domain, reason) }
      }
    }
  }

  private static func makeServer(
    _ handle: any GuestHandle, _ pool: ForeignMappingPool, _ loop: EventLoop, earlier: UInt16?,
    ignoresInvalidations: Bool, onCreated: (UInt16) -> Void
  ) throws(XenError) -> IOReqServer {
    if let earlier {
      do throws(XenError) {
        return try IOReqServer(
          guest: handle, pool: pool, loop: loop, adopting: earlier, ignoresInvalidations: ignoresInvalidations)
      } catch {
        // It is gone, and with it whoever waited for it: a new one serves as well.
      }
    }
    return try IOReqServer(
      guest: handle, pool: pool, loop: loop, ignoresInvalidations: ignoresInvalidations, onCreated: onCreated)
  }

  private func serverStarted(_ domain: DomainID, _ report: StatusBoard.IOReqServerReport, _ vcpus: Int) {
    guard let session = sessions[domain] else { return }
    session.report = report
    session.vcpus = vcpus
    if session.phase == .starting { session.phase = .running }
    log.info(
      "guest \(session.name): ioreq server \(report.identifier), \(vcpus) vCPUs", metadata: ["GUEST": "\(session.name)"]
    )
    for record in session.devices.values { attachIfReady(record, of: session) }
    publish(session)
  }

  private func serverFailed(_ domain: DomainID, _ reason: String) {
    guard let session = sessions[domain] else { return }
    let words = "no ioreq server can be had for the guest (\(reason)); virtio-mmio needs an HVM guest and, on x86, dom0"
    if session.phase != .closing { session.phase = .failed(reason: words) }
    tell(.guestFailed, session, reason: words)
    for record in session.devices.values where record.phase == .opening { fail(record, of: session, words) }
    publish(session)
  }

  /// Ends the guest's server and memory once no device of its uses them.
  func closeIfUnused(_ session: GuestSession) {
    guard session.phase != .closing, session.devices.values.allSatisfy({ $0.phase == .closing && $0.isReleased }) else {
      return
    }
    session.phase = .closing
    publish(session)
    let domain = session.domain
    let (cell, pool) = (session.cell, session.mmio?.pool)
    session.thread.loop.enqueue { [self] in
      cell.server?.close()
      cell.server = nil
      pool?.close()
      onLoop { $0.serverClosed(domain) }
    }
  }

  private func serverClosed(_ domain: DomainID) {
    guard let session = sessions[domain] else { return }
    session.thread.stopAndJoin()
    session.isServerClosed = true
    if !isHandingOver { settings.stateFolder?.forget(domain) }
    finishStopped(session)
  }

  /// Forgets the devices that are at their end, and the guest with the last of them.
  func finishStopped(_ session: GuestSession) {
    let isLast = session.devices.values.allSatisfy { $0.phase == .closing }
    for record in session.devices.values where record.isStopped && (session.isServerClosed || !isLast) {
      session.devices[record.key] = nil
      if !isHandingOver {
        settings.stateFolder?.forget(record.key)
        removeTraces(record)
      }
      writeClosedState(record)
      removeEntryLater(record.key)
      tell(.deviceGone, session, record)
      // Its entry may have been made anew meanwhile: events of that met a device that was closing.
      if record.key.kind.isInXenstore { onLoop { [key = record.key] in $0.reconcile(key) } }
    }
    guard session.devices.isEmpty else { return publish(session) }
    guard session.isServerClosed else {
      closeIfUnused(session)
      return
    }
    sessions[session.domain] = nil
    store?.unwatch("/local/domain/\(session.domain)/name", token: "\(Self.nameToken)\(session.domain)")
    for folder in session.watchedFrontends { store?.unwatch("/" + folder, token: Self.token(frontends: folder)) }
    countWatches()
    forget(session)
    tell(.guestGone, session)
    reconcileDomain(session.domain)
    stopIfEmpty()
  }

  /// An entry may have come back while the old session ended.
  private func reconcileDomain(_ domain: DomainID) {
    for kind in DeviceKey.Kind.watched {
      for device in store?.list("backend/\(kind.rawValue)/\(domain)") ?? [] {
        if let device = UInt32(device) { reconcile(DeviceKey(kind: kind, domain: domain, device: device)) }
      }
    }
  }

  /// Logs and announces.
  func tell(
    _ kind: SupervisorEvent.Kind, _ session: GuestSession, _ record: DeviceRecord? = nil, reason: String? = nil
  ) {
    let device = record?.name
    var reason = reason
    if let record, kind.isGuestsDoing {
      switch record.chatter.next(at: EventLoop.now()) {
      case .say: break
      case .sayLast: reason = (reason.map { "\($0); " } ?? "") + "more of this within a minute is not logged"
      case .silent: return
      }
    }
    var metadata: Logger.Metadata = ["GUEST": "\(session.name)"]
    if let device { metadata["DEVICE"] = "\(device)" }
    let subject = device.map { "\(session.name)/\($0)" } ?? "\(session.name) (domain \(session.domain))"
    log.log(
      level: kind.isTrouble ? .error : .info, "\(subject): \(kind.rawValue)\(reason.map { ": \($0)" } ?? "")",
      metadata: metadata)
    announce(
      SupervisorEvent(
        kind: kind, domain: session.domain, guest: session.name, device: device, reason: reason))
  }
}

extension GuestSession {
  /// What the status board shows of it.
  var snapshot: StatusBoard.Guest {
    let (phaseName, reason): (String, String?) =
      switch phase {
      case .starting: ("starting", nil)
      case .running: ("running", nil)
      case .failed(let reason): ("failed", reason)
      case .closing: ("closing", nil)
      }
    return StatusBoard.Guest(
      domain: domain, name: name, uuid: uuid, phase: phaseName, reason: reason, vcpus: vcpus,
      server: isServerClosed ? nil : report, pool: mmio?.pool, limits: limits,
      devices: devices.values.sorted { $0.key.device < $1.key.device }.map { record in
        StatusBoard.Device(
          key: record.key, name: record.name, guestName: name,
          phase: record.phase, slot: record.slot, type: record.entry?.form.typeName ?? "disk",
          path: record.entry?.form.disk?.path ?? record.keys["params"],
          readOnly: record.entry?.form.disk?.readOnly ?? false, backend: record.backend, transport: record.transport,
          stuck: record.stuck, account: record.account, limits: record.limits, restarts: record.restarts.count,
          faults: record.faults.count, policy: record.policy,
          isEmptySpare: record.key.kind == .spare && record.entry?.form.disk?.path.isEmpty != false,
          entryPath: record.keys["params"], bus: record.link == nil ? "mmio" : "xenbus", grants: record.link?.pool)
      })
  }
}
