import Backends
import Engines
import EventLoop
import Glibc
import Xen

/// The end of devices, and what is written to Xenstore of them.
extension Supervisor {
  /// Ends a device: out of its slot, requests drained, image closed; then the state is written.
  func close(_ record: DeviceRecord, of session: GuestSession, wantsClosedState: Bool) {
    record.wantsClosedState = record.wantsClosedState || wantsClosedState
    guard record.phase != .closing else { return }
    record.phase = .closing
    record.backend?.retire()
    tell(.deviceClosing, session, record)
    if record.key.kind.isInXenstore { closeSparesIfAlone(session) }
    publish(session)
    if record.link != nil {
      // A backend that is being stopped may still be at work in the arena: `backendStopped` comes back to this.
      if !record.isStoppingBackend { releaseLink(record, of: session) }
      return
    }
    let (key, identity) = (record.key, ObjectIdentifier(record))
    guard record.isAttached, let slot = record.slot else { return released(key, identity) }
    let cell = session.cell
    session.thread.loop.enqueue { [self] in
      cell.server?.detach(slot)
      onLoop { $0.released(key, identity) }
    }
  }

  /// Takes a closing Xenbus device out of the guest's hands.
  func releaseLink(_ record: DeviceRecord, of session: GuestSession) {
    guard let link = record.link else { return }
    let (key, identity) = (record.key, ObjectIdentifier(record))
    release(link, of: session) { [self] in onLoop { $0.released(key, identity) } }
  }

  /// Nothing of the device reaches guest memory any more.
  private func released(_ key: DeviceKey, _ identity: ObjectIdentifier) {
    guard let (session, record) = current(key, identity) else { return }
    record.isReleased = true
    if record.backend != nil {
      stopBackend(record, of: session)
    } else if record.threads.isEmpty, !record.isStoppingBackend {
      stopped(key, identity)
    }
    closeIfUnused(session)
  }

  func stopBackend(_ record: DeviceRecord, of session: GuestSession) {
    let (key, identity) = (record.key, ObjectIdentifier(record))
    guard let backend = record.backend else { return }
    record.backend = nil
    record.transport = nil
    backend.stop { [self] in onLoop { $0.stopped(key, identity) } }
  }

  func stopped(_ key: DeviceKey, _ identity: ObjectIdentifier) {
    guard let (session, record) = current(key, identity) else { return }
    record.joinThreads()
    guard record.phase == .closing else { return }
    record.isStopped = true
    finishStopped(session)
  }

  // MARK: Writing to Xenstore

  /// What of a device outlives its backends, and ends with it.
  func removeTraces(_ record: DeviceRecord) {
    switch record.entry?.form {
    case .network(let settings):
      if case .created = settings.attachment { TapDevice.remove(settings.tapName) }
    case .console(let console):
      guard let folder = settings.consoleFolder else { return }
      for port in console.ports.indices {
        unlink(ConsoleBackend.historyPath(folder, "\(record.key.domain)-\(record.name)", port: port))
      }
    default: break
    }
  }

  func writeClosedState(_ record: DeviceRecord) {
    if record.wantsClosedState { writeClosedState(record.key) }
  }

  /// Tells the toolstack that everything of the device is given back.
  ///
  /// Only an entry whose end is wanted is told so, as it is now: the toolstack may have removed it meanwhile, which a write would undo, or
  /// have made the device anew, which would never be served then.
  func writeClosedState(_ key: DeviceKey) {
    do throws(XenError) {
      try store?.transaction { transaction throws(XenError) in
        guard let store, let state = try store.readIfThere("\(key.path)/state", in: transaction),
          state != XenbusState.closed.rawValue
        else { return }
        if state != XenbusState.closing.rawValue,
          try store.readIfThere("\(key.path)/online", in: transaction) != "0",
          let frontend = try store.readIfThere("\(key.path)/frontend", in: transaction),
          try !isFrontendGone(key, ["frontend": frontend], store, in: transaction)
        {
          return
        }
        try store.write("\(key.path)/state", XenbusState.closed.rawValue, in: transaction)
      }
    } catch {
      log.warning("cannot write \(key.path)/state: \(error)")
    }
  }

  func write(_ key: DeviceKey, _ name: String, _ value: String) {
    do throws(XenError) {
      try store?.transaction { transaction throws(XenError) in
        // An entry that was removed meanwhile must not come back by a write of ours.
        guard let store, store.list(key.path, in: transaction) != nil else { return }
        try store.write("\(key.path)/\(name)", value, in: transaction)
      }
    } catch {
      log.warning("cannot write \(key.path)/\(name): \(error)")
    }
  }
}
