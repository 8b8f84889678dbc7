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
      frontend: "", name: name, form: .disk(BlockSettings(path: "", readOnly: false, discard: true, serial: name)),
      base: 0, irq: 0)
    if let filling = settings.stateFolder?.filling(key) {
      entry.form.disk?.path = filling.image
      entry.form.disk?.limits = filling.limits
    }
    return entry
  }

  /// The last slots are for what the toolstack does not know of, so that its disks keep theirs.
  func lastSlot(_ session: GuestSession) throws(EntryFault) -> DeviceSlot {
    let taken = session.takenSlots
    guard let free = (0..<settings.slots).last(where: { !taken.contains($0) }) else {
      throw EntryFault("devices", "the guest's \(settings.slots) virtio-mmio slots are all in use (vxd --slots)")
    }
    return SlotTable.slot(free)
  }

  /// Spares and declared devices end with the last device of the toolstack's.
  func closeSparesIfAlone(_ session: GuestSession) {
    let others = session.devices.values.filter { $0.key.kind.isInXenstore }
    guard others.allSatisfy({ $0.phase == .closing }) else { return }
    for spare in session.devices.values where !spare.key.kind.isInXenstore {
      settings.stateFolder?.forgetFilling(spare.key)
      close(spare, of: session, wantsClosedState: false)
    }
  }

  // MARK: Attach and detach

  func attach(_ key: DeviceKey, image: String, limits: RateLimits?) {
    guard let (session, record) = known(key), var entry = record.entry, var disk = entry.form.disk,
      disk.path.isEmpty
    else { return }
    disk.path = image
    profiles.apply(to: &disk, guest: session.name, uuid: session.uuid, device: entry.name, number: key.device)
    record.attaching = disk.path
    disk.direct = settings.direct && disk.direct
    entry.form = .disk(disk)
    record.entry = entry
    if let limits {
      record.limits = limits
      record.rate.set(limits)
    }
    exchange(record, of: session, "'\(image)' is attached")
  }

  func detach(_ key: DeviceKey, deadlineMilliseconds: UInt64) {
    guard let (session, record) = known(key), record.entry?.form.disk?.path.isEmpty == false else { return }
    let deadline = EventLoop.now() &+ deadlineMilliseconds &* 1_000_000
    drainThenEmpty(record, of: session, deadline)
  }

  /// Looks every tenth of a second whether requests are under way still.
  private func drainThenEmpty(_ record: DeviceRecord, of session: GuestSession, _ deadline: UInt64) {
    let inFlight = record.account.all.reduce(0) { $0 + $1.counters.inFlight.load(ordering: .relaxed) }
    guard inFlight > 0, EventLoop.now() < deadline else {
      record.entry?.form.disk?.path = ""
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
  func judgeAttached(_ record: DeviceRecord, of session: GuestSession, _ backend: DeviceBackend?, _ reason: String?)
    -> Bool
  {
    guard let image = record.attaching else { return true }
    record.attaching = nil
    var words = reason
    if let backend = backend as? BlockBackend, backend.geometry.logicalBlock > 512 {
      words = "'\(image)' has blocks of \(backend.geometry.logicalBlock) bytes; a spare disk has 512"
    }
    guard let words else {
      do throws(Errno) {
        try settings.stateFolder?.save(
          StateFolder.Filling(image: image, limits: record.limits), of: record.key)
      } catch {
        log.warning("\(session.name)/\(record.name): what is attached cannot be saved: \(error)")
      }
      tell(.deviceAttached, session, record, reason: image)
      return true
    }
    tell(.deviceNotAttached, session, record, reason: words)
    record.entry?.form.disk?.path = ""
    exchange(record, of: session, "nothing is attached")
    return false
  }
}
