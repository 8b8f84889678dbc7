import Backends
import ControlAPI
import Devices
import EventLoop
import Glibc
import Transport
import Xen

/// Devices whose backends fail: started again by their policy, or left alone.
extension Supervisor {
  /// A backend in service failed: its requests wait in the journals.
  func backendFailed(_ record: DeviceRecord, of session: GuestSession, _ reason: String) {
    guard record.phase != .closing else { return }
    guard record.policy.mode != .never else { return quarantine(record, of: session, reason) }
    switch record.restarts.next(record.policy, at: EventLoop.now(), random: .random(in: 0...1)) {
    case .quarantine: quarantine(record, of: session, reason)
    case .restart(let pause):
      record.phase = .restarting(reason: reason)
      tell(.deviceRestarting, session, record, reason: "\(reason); again in \(pause) ms")
      unplug(record, of: session, then: .start(afterMilliseconds: pause))
    }
    publish(session)
  }

  /// The guest broke a queue: too often, and the device is left alone.
  func guestFaulted(_ record: DeviceRecord, of session: GuestSession, _ reason: String) {
    record.phase = .faulted(reason: reason)
    tell(.deviceFaulted, session, record, reason: reason)
    var budget = record.policy
    budget.limit = settings.faultLimit
    guard record.faults.next(budget, at: EventLoop.now(), random: 0) == .quarantine else {
      if record.policy.mode == .always { backendFailed(record, of: session, reason) }
      return
    }
    quarantine(
      record, of: session, "\(reason); that was fault \(settings.faultLimit + 1) within \(budget.windowSeconds) s")
  }

  private func quarantine(_ record: DeviceRecord, of session: GuestSession, _ reason: String) {
    let words = "\(reason); left alone until 'vxctl device restart \(session.name)/\(record.name)'"
    record.phase = .quarantined(reason: words)
    tell(.deviceQuarantined, session, record, reason: words)
    unplug(record, of: session, then: .rest)
    publish(session)
  }

  /// An operator's word for a device, by its key.
  func restart(_ key: DeviceKey) {
    guard let (session, record) = known(key), record.phase != .closing else { return }
    guard record.isAttached else {
      // It was never served: as if its entry had come just now.
      session.devices[key] = nil
      return open(key, record.keys, of: session)
    }
    restart(record, of: session)
  }

  func pause(_ key: DeviceKey) {
    guard let (session, record) = known(key), record.isAttached, record.phase != .closing else { return }
    pause(record, of: session)
  }

  /// A spare gets another store: as a restart, without its trouble.
  func exchange(_ record: DeviceRecord, of session: GuestSession, _ reason: String) {
    guard record.phase != .closing else { return }
    record.phase = .restarting(reason: reason)
    publish(session)
    unplug(record, of: session, then: .start(afterMilliseconds: 0))
  }

  // MARK: Limits

  func set(limits: RateLimits) {
    rate.set(limits)
    board.update { $0.limits = limits }
    for session in sessions.values { limitsChanged(session) }
  }

  func set(limits: RateLimits, of domain: DomainID) {
    guard let session = sessions[domain] else { return }
    session.limits = limits
    session.rate.set(limits)
    limitsChanged(session)
    publish(session)
  }

  func set(limits: RateLimits, of key: DeviceKey) {
    guard let (session, record) = known(key) else { return }
    record.limits = limits
    record.rate.set(limits)
    record.backend?.limitsChanged()
    tell(.deviceLimited, session, record, reason: JSONText.text(limits.json))
    publish(session)
  }

  private func limitsChanged(_ session: GuestSession) {
    for record in session.devices.values { record.backend?.limitsChanged() }
  }

  // MARK: Restarts

  /// An operator wants the device started again: its budget is whole, and what waits goes on.
  func restart(_ record: DeviceRecord, of session: GuestSession) {
    record.restarts.forgive()
    record.faults.forgive()
    record.restarts.noteRestart()
    tell(.deviceRestarting, session, record, reason: "an operator said so")
    record.phase = .restarting(reason: "an operator said so")
    publish(session)
    unplug(record, of: session, then: .start(afterMilliseconds: 0))
  }

  /// Stops a device's backend; the guest's requests wait.
  func pause(_ record: DeviceRecord, of session: GuestSession) {
    record.phase = .paused
    tell(.devicePaused, session, record)
    publish(session)
    unplug(record, of: session, then: .rest)
  }

  // MARK: Steps

  /// Takes the backend away from its transport, stops it, joins its threads; then `then`, unless something else has begun meanwhile.
  func unplug(_ record: DeviceRecord, of session: GuestSession, then: DeviceRecord.AfterStop) {
    record.restartTicket += 1
    record.heldQueues = [:]
    record.afterStop = then
    // A store that is being opened cannot be stopped: `opened` comes back to this.
    guard !record.isStoppingBackend, record.backend != nil || record.threads.isEmpty else { return }
    record.isStoppingBackend = true
    let (key, identity) = (record.key, ObjectIdentifier(record))
    let backend = record.backend
    record.backend = nil
    let transport = record.transport
    let next: @Sendable () -> Void = { [self] in onLoop { $0.backendStopped(key, identity) } }
    session.thread.loop.enqueue {
      transport?.unplug()
      if let backend { backend.stop(completion: next) } else { next() }
    }
  }

  private func backendStopped(_ key: DeviceKey, _ identity: ObjectIdentifier) {
    guard let (session, record) = current(key, identity) else { return }
    record.isStoppingBackend = false
    record.joinThreads()
    if record.phase == .closing {
      if record.isReleased { stopped(key, identity) } else { releaseLink(record, of: session) }
      return
    }
    let then = record.afterStop
    record.afterStop = nil
    if case .start(let pause) = then { startAgain(record, of: session, afterMilliseconds: pause) }
    publish(session)
    // What the driver did meanwhile.
    if record.link != nil { frontendChanged(key) }
  }

  /// A backend has been opened, or has failed to, that something else is to be done with by now.
  ///
  /// - Returns: whether that is so.
  func handledByAfterStop(_ record: DeviceRecord, of session: GuestSession) -> Bool {
    guard let then = record.afterStop, !record.isStoppingBackend else { return false }
    unplug(record, of: session, then: then)
    return true
  }

  private func startAgain(_ record: DeviceRecord, of session: GuestSession, afterMilliseconds pause: UInt64) {
    let (key, identity, ticket) = (record.key, ObjectIdentifier(record), record.restartTicket)
    let start: @Sendable () -> Void = { [self] in
      assumeIsolated { supervisor in
        guard let (session, record) = supervisor.current(key, identity), record.restartTicket == ticket,
          record.phase != .closing, let entry = record.entry, record.threads.isEmpty
        else { return }
        supervisor.startBackend(record, entry, of: session)
      }
    }
    if pause == 0 { start() } else { loop.schedule(afterMilliseconds: pause, start) }
  }

  /// A device that was never served could not start: it is tried again for as long as its entry stands, ever more slowly.
  func retryStart(_ record: DeviceRecord, of session: GuestSession) {
    guard record.policy.mode != .never, record.phase != .closing else { return }
    record.restartTicket += 1
    let pause = RestartHistory.pause(
      settings.startRetry, tries: record.failedStarts, random: .random(in: 0...1))
    record.failedStarts += 1
    let (key, identity, ticket) = (record.key, ObjectIdentifier(record), record.restartTicket)
    loop.schedule(afterMilliseconds: pause) { [self] in
      assumeIsolated { supervisor in
        guard let (session, record) = supervisor.current(key, identity), record.restartTicket == ticket,
          case .failed(let reason) = record.phase
        else { return }
        session.devices[key] = nil
        supervisor.open(key, record.keys, of: session, failed: (record.failedStarts, reason))
      }
    }
  }
}
