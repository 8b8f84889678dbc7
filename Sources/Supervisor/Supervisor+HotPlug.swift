import Backends
import ControlAPI
import Devices
import EventLoop
import Glibc
import Xen

/// Spare disks: declared in the profiles, there from the guest's start with no size, filled and emptied while it runs. virtio-mmio cannot
/// add a device to a running guest; a change of size is what every driver understands.
extension Supervisor {
  /// Makes a guest's spares, those of an earlier daemon included.
  func openSpares(_ session: GuestSession) {
    let wanted = profiles.options(guest: session.name, uuid: session.uuid).spareDisks
    let earlier = session.restored.keys.filter { $0.kind == .spare }.map(\.device)
    for number in Set(earlier).union((0..<UInt32(wanted)).map { $0 }).sorted() {
      let key = DeviceKey(kind: .spare, domain: session.domain, device: number)
      guard session.devices[key] == nil else { continue }
      open(key, [:], of: session)
    }
  }

  /// A spare's entry: what libxl's is for other disks.
  func spareEntry(_ key: DeviceKey) -> DeviceEntry {
    let name = "spare\(key.device)"
    var entry = DeviceEntry(
      frontend: "", name: name, settings: BlockSettings(path: "", readOnly: false, discard: true, serial: name),
      base: 0,
      irq: 0)
    if let filling = settings.stateFolder?.filling(key) {
      entry.settings.path = filling.image
      entry.settings.limits = filling.limits
    }
    return entry
  }

  /// The last slots are the spares', so that disks of the toolstack keep theirs.
  func spareSlot(_ session: GuestSession) throws(EntryFault) -> DeviceSlot {
    let taken = session.takenSlots
    guard let free = (0..<settings.slots).last(where: { !taken.contains($0) }) else {
      throw EntryFault("spareDisks", "the guest's \(settings.slots) virtio-mmio slots are all in use (vxd --slots)")
    }
    return SlotTable.slot(free)
  }

  /// Spares end with the last disk of the toolstack's.
  func closeSparesIfAlone(_ session: GuestSession) {
    let others = session.devices.values.filter { $0.key.kind != .spare }
    guard others.allSatisfy({ $0.phase == .closing }) else { return }
    for spare in session.devices.values where spare.key.kind == .spare {
      settings.stateFolder?.forgetFilling(spare.key)
      close(spare, of: session, wantsClosedState: false)
    }
  }

  // MARK: Attach and detach

  func attach(_ key: DeviceKey, image: String, limits: RateLimits?) {
    guard let (session, record) = known(key), var entry = record.entry, entry.settings.path.isEmpty else { return }
    entry.settings.path = image
    profiles.apply(to: &entry.settings, guest: session.name, uuid: session.uuid, device: entry.name, number: key.device)
    record.attaching = entry.settings.path
    entry.settings.direct = settings.direct && entry.settings.direct
    record.entry = entry
    if let limits {
      record.limits = limits
      record.rate.set(limits)
    }
    exchange(record, of: session, "'\(image)' is attached")
  }

  func detach(_ key: DeviceKey, deadlineMilliseconds: UInt64) {
    guard let (session, record) = known(key), record.entry?.settings.path.isEmpty == false else { return }
    let deadline = EventLoop.now() &+ deadlineMilliseconds &* 1_000_000
    drainThenEmpty(record, of: session, deadline)
  }

  /// Looks every tenth of a second whether requests are under way still.
  private func drainThenEmpty(_ record: DeviceRecord, of session: GuestSession, _ deadline: UInt64) {
    let inFlight = record.account.all.reduce(0) { $0 + $1.counters.inFlight.load(ordering: .relaxed) }
    guard inFlight > 0, EventLoop.now() < deadline else {
      record.entry?.settings.path = ""
      settings.stateFolder?.forgetFilling(record.key)
      record.isDetaching = true
      return exchange(record, of: session, inFlight > 0 ? "detached by force, \(inFlight) requests fail" : "detached")
    }
    let (key, identity) = (record.key, ObjectIdentifier(record))
    loop.schedule(afterMilliseconds: 100) { [self] in
      assumeIsolated { supervisor in
        guard let (session, record) = supervisor.current(key, identity) else { return }
        supervisor.drainThenEmpty(record, of: session, deadline)
      }
    }
  }

  /// A backend of an attached image was opened, or could not be.
  ///
  /// - Returns: whether it is to be used; else the disk is made empty again.
  func judgeAttached(_ record: DeviceRecord, of session: GuestSession, _ backend: BlockBackend?, _ reason: String?)
    -> Bool
  {
    guard let image = record.attaching else { return true }
    record.attaching = nil
    var words = reason
    if let backend, backend.geometry.logicalBlock > 512 {
      words = "'\(image)' has blocks of \(backend.geometry.logicalBlock) bytes; a spare disk has 512"
    }
    guard let words else {
      do throws(Errno) {
        try settings.stateFolder?.save(
          StateFolder.Filling(image: image, limits: record.limits), of: record.key)
      } catch {
        log.warning("\(session.name)/\(record.entry?.name ?? ""): what is attached cannot be saved: \(error)")
      }
      tell(.deviceAttached, session, record, reason: image)
      return true
    }
    tell(.deviceNotAttached, session, record, reason: words)
    record.entry?.settings.path = ""
    exchange(record, of: session, "nothing is attached")
    return false
  }
}
