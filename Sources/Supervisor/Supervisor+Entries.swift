import Backends
import Xen

/// Entries in Xenstore, and what follows from them: devices are started, closed, tried again, or left alone.
extension Supervisor {
  /// Brings one device in line with its entry. May be called at any time, for the same device again and again.
  func reconcile(_ key: DeviceKey) {
    guard let store, !isStopping else { return }
    let keys: [String: String]?
    let hasFrontend: Bool
    do throws(XenError) {
      if let some = try readWhatMatters(key, store) { keys = some } else { keys = try read(key, store) }
      hasFrontend = try !isFrontendGone(key, keys ?? [:], store)
    } catch {
      // Nothing follows from an answer that did not come: a xenstored that is gone takes no device with it.
      return log.warning("cannot read \(key.path): \(error)")
    }
    guard let keys, !keys.isEmpty else {
      // The entry is gone: nobody waits for a state any more.
      if let (session, record) = known(key) { close(record, of: session, wantsClosedState: false) }
      return
    }
    let state = keys["state"].flatMap(XenbusState.init(rawValue:))
    if state == .closing || keys["online"] == "0" && state != .closed {
      if let (session, record) = known(key) {
        if !waitsForDriver(record) { close(record, of: session, wantsClosedState: true) }
      } else {
        writeClosedState(key)
        removeEntryLater(key)
      }
      return
    }
    if !hasFrontend {
      if let (session, record) = known(key) { close(record, of: session, wantsClosedState: true) }
      return
    }
    // Over Xenbus a driver that resets its device is answered with this state, and begins again.
    let isBetweenLives = state == .closed && keys["online"] == "1" && usesXenbus(key.domain)
    guard state != .closed || isBetweenLives else {
      if let (session, record) = known(key) { close(record, of: session, wantsClosedState: false) }
      return
    }
    if let (session, record) = known(key) {
      guard case .failed = record.phase, Self.changed(record.keys, keys) else { return }
      guard !record.isAttached else { return }
      session.devices[key] = nil  // a refused device holds nothing
      open(key, keys, of: session)
      return
    }
    do throws(XenError) {
      if let session = try session(for: key.domain) { open(key, keys, of: session) }
    } catch {
      let reason = "frontend-id: the guest cannot be reached: \(error)"
      guard keys["error"] != reason else { return }
      log.error("domain \(key.domain): \(reason)")
      announce(SupervisorEvent(kind: .guestFailed, domain: key.domain, guest: "domain-\(key.domain)", reason: reason))
      write(key, "error", reason)
    }
  }

  /// The keys that can end a device that runs: most events are echoes of states that were written here, and a host with hundreds of
  /// devices has many.
  ///
  /// - Returns: nil when all keys are wanted.
  private func readWhatMatters(_ key: DeviceKey, _ store: XenStore) throws(XenError) -> [String: String]? {
    guard let (_, record) = known(key) else { return nil }
    if case .failed = record.phase { return nil }
    guard let state = try store.readIfThere("\(key.path)/state") else { return nil }
    var keys = record.keys
    keys["state"] = state
    keys["online"] = try store.readIfThere("\(key.path)/online")
    return keys
  }

  /// All keys of an entry as of one moment; nil when there is none.
  private func read(_ key: DeviceKey, _ store: XenStore) throws(XenError) -> [String: String]? {
    try store.transaction { transaction throws(XenError) -> [String: String]? in
      guard let names = try store.listIfThere(key.path, in: transaction) else { return nil }
      var keys: [String: String] = [:]
      for name in names { keys[name] = try store.readIfThere("\(key.path)/\(name)", in: transaction) }
      return keys
    }
  }

  func known(_ key: DeviceKey) -> (GuestSession, DeviceRecord)? {
    guard let session = sessions[key.domain], let record = session.devices[key] else { return nil }
    return (session, record)
  }

  /// A toolstack that died halfway leaves entries behind whose guest is no more: the frontend's directory is gone then, or
  /// belongs to another backend.
  func isFrontendGone(
    _ key: DeviceKey, _ keys: [String: String], _ store: XenStore, in transaction: UInt32 = 0
  ) throws(XenError) -> Bool {
    // `parse` names a key that is missing or wrong.
    guard let frontend = keys["frontend"], frontend.hasPrefix("/") else { return false }
    guard let backend = try store.readIfVisible("\(frontend)/backend", in: transaction) else { return true }
    return !backend.hasSuffix("/" + key.path)
  }

  /// Whether keys differ that describe the device, rather than its progress.
  private static func changed(_ old: [String: String], _ new: [String: String]) -> Bool {
    func described(_ keys: [String: String]) -> [String: String] {
      keys.filter { !["state", "error", "online", "hotplug-status"].contains($0.key) }
    }
    return described(old) != described(new)
  }
}
