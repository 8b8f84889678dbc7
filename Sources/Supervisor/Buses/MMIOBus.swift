import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Synchronization
import Transport
import Virtqueue
import Xen

/// Devices behind virtio-mmio registers: an ioreq server answers the guest's accesses, foreign mappings reach its memory. For guests of
/// dom0: where the toolstack has put the device into the guest's device tree (Arm), or in a slot of an HVM guest's table.
final class MMIOBus: RegisterBus {
  static let name = "mmio"
  static let style = BusStyle.registers
  static let hasServer = true
  static let hostNodes = ["evtchn", "privcmd"]

  var guestNeeds: String {
    let slots =
      guest.isParavirtual
      ? "" : ", and the slots' ACPI table: acpi_firmware=\"/usr/share/vxd/slots.aml\" in its configuration"
    return "virtio_mmio and the device's driver\(slots)"
  }

  /// xl has no such commands for guests on Arm.
  func note() -> GuestNote? { guest.isParavirtual ? nil : server.savingNote }

  static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool {
    !guest.isDriverDomain && (device.base != 0 || !guest.isParavirtual)
  }

  /// A kernel on Arm dies of an access that nobody answers; those on x86 read ones.
  static func hasWindow(_ device: DeviceWish) -> Bool { device.base != 0 }

  static func restores(_ place: DevicePlace) -> Bool {
    if case .mmio = place { true } else { false }
  }

  /// Where a device is, and with what the guest's thread answers for it.
  private struct Seat {
    var slot: DeviceSlot
    var transport: MMIOTransport?
    /// Of an earlier daemon, until its entry asks for it.
    var restored: DeviceState?
  }

  private let guest: GuestFacts
  private let host: BusHost
  private let server: RegisterServer
  private let seats = Mutex<[DeviceKey: Seat]>([:])
  /// Devices of an earlier daemon, until they are taken out of their places; the server has claims of theirs, also when nobody asks for them.
  private let left = Mutex<[DeviceKey: Seat]>([:])

  init(_ ground: GuestGround) throws(XenError) {
    guest = ground.facts
    host = ground.host
    server = try ground.registers()
    server.add(self)
  }

  // MARK: What an earlier daemon left

  func restore(_ key: DeviceKey, _ state: DeviceState) {
    guard case .mmio(let base, let index, let sharedInterrupt) = state.place else { return }
    let slot =
      sharedInterrupt == 0
      ? SlotTable.slot(min(max(index, 0), SlotTable.maximumCount - 1))
      : DeviceSlot(index: nil, base: base, interrupt: .spi(sharedInterrupt))
    let saved = state.saved
    let transport = MMIOTransport(
      restoring: state.layout.identity, saved.registers, saved.status, configuration: saved.configuration,
      line: slot.line(of: server.handle), state: state, onStatus: host.statusReporter(key))
    take(key, Seat(slot: slot, transport: transport, restored: state))
  }

  private func take(_ key: DeviceKey, _ seat: Seat) {
    seats.withLock { $0[key] = seat }
    if seat.restored != nil { left.withLock { $0[key] = seat } }
    server.setPin(seat.slot.interrupt, of: key)
  }

  var unclaimed: [DeviceKey] { seats.withLock { seats in seats.keys.filter { seats[$0]?.restored != nil } } }

  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
    if let state = seats.withLock({ $0[key]?.restored.take() }) {
      return (.adoptable(transport(of: key).map { Driver($0.currentStatus) } ?? .absent), state)
    }
    if host.settings.stateFolder != nil, nodes["state"] == XenbusState.connected.rawValue {
      return (.lost("no saved state for a device in use: the guest must reset it"), nil)
    }
    return (.nothing, nil)
  }

  // MARK: The server

  /// Slots are claimed as a row, windows of the device tree one by one.
  func prepare(_ server: IOReqServer, _ here: OnGuestThread) throws(XenError) {
    if !guest.isParavirtual, let row = SlotTable.row(count: host.settings.slots) {
      try server.claim(first: row.lowerBound, last: row.upperBound)
    }
    for seat in left.withLock({ Array($0.values) }) {
      if let transport = seat.transport { try server.attach(transport, to: seat.slot) }
    }
  }

  // MARK: Devices

  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    let slots = seats.withLock { $0.mapValues(\.slot) }
    guard slots[key] == nil else { return }
    if let wanted = entry.settings.transport, wanted != .mmio, entry.base != 0 {
      throw EntryFault(
        "transport",
        "expected none, not '\(wanted)': the toolstack has put the device at 0x\(String(entry.base, radix: 16)) of the guest's device tree"
      )
    }
    let count = host.settings.slots
    var taken = Set(slots.values.compactMap(\.index))
    taken.formUnion((0..<count).filter { server.isTaken(SlotTable.slot($0).interrupt) })
    guard !key.kind.isInXenstore else {
      return take(key, Seat(slot: try entry.slot(key, taken: taken, count: count)))
    }
    // The last slots are for what the toolstack does not know of, so that its disks keep theirs.
    guard let free = (0..<count).last(where: { !taken.contains($0) }) else {
      throw EntryFault("devices", "the guest's \(count) virtio-mmio slots are all in use (vxd --slots)")
    }
    take(key, Seat(slot: SlotTable.slot(free)))
  }

  func vacate(_ key: DeviceKey) { forget(key) }

  func forget(_ key: DeviceKey) {
    seats.withLock { $0[key] = nil }
    server.setPin(nil, of: key)
  }

  private func slot(of key: DeviceKey) -> DeviceSlot? { seats.withLock { $0[key]?.slot } }

  func memory(of key: DeviceKey) -> (any GuestMemorySource)? { server.pool }

  func place(of key: DeviceKey) -> DevicePlace {
    guard let slot = slot(of: key) else { return .mmio(base: 0, index: 0, sharedInterrupt: 0) }
    var interrupt: UInt32 = 0
    if case .spi(let number) = slot.interrupt { interrupt = number }
    return .mmio(base: slot.base, index: slot.index ?? 0, sharedInterrupt: interrupt)
  }

  func transport(of key: DeviceKey) -> (any DeviceTransport)? { seats.withLock { $0[key]?.transport } }

  func facts(of key: DeviceKey) -> DeviceFacts {
    let slot = slot(of: key)
    let row = slot.map { slot in
      let base = "0x\(String(slot.base, radix: 16))"
      return slot.index.map { Fact(name: "slot", value: "\($0) at \(base)") } ?? Fact(name: "window", value: base)
    }
    return DeviceFacts(rows: { row.map { [$0] } ?? [] }, warning: server.warning(key), slot: slot)
  }

  // MARK: The guest

  func claim(_ key: DeviceKey, _ wish: DeviceWish, _ here: OnGuestThread) -> BusEvent {
    do throws(XenError) {
      try server.claim(window: wish.base, here)
      return .device(key, .claimed(nil))
    } catch {
      return .device(key, .claimed("base: \(error)"))
    }
  }

  func insert(
    _ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool, _ here: OnGuestThread
  ) -> BusEvent {
    guard let slot = slot(of: key) else { return .device(key, .insertFailed(id, "base: the device has no slot")) }
    let transport = MMIOTransport(
      device: backend, line: slot.line(of: server.handle), state: backend.state, needsReset: needsReset,
      onStatus: host.statusReporter(key))
    do throws(XenError) {
      let ioreq = try server.server(preparedFor: self, here)
      try ioreq.attach(transport, to: slot)
      // One whose claim has failed is the guest's window from here on.
      if slot.index == nil { server.remember(window: slot.base, of: ioreq, here) }
    } catch {
      return .device(key, .insertFailed(id, "base: \(error)"))
    }
    seats.withLock { $0[key]?.transport = transport }
    if needsReset { transport.interruptForConfiguration() }
    return .device(key, .plugged(id, Driver(transport.currentStatus)))
  }

  func remove(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent {
    empty(slot(of: key), key, here)
    return .device(key, .removed)
  }

  func discard(_ key: DeviceKey) -> @Sendable (OnGuestThread) -> Void {
    let slot = slot(of: key)
    forget(key)
    return { [self] here in empty(slot, key, here) }
  }

  private func empty(_ slot: DeviceSlot?, _ key: DeviceKey, _ here: OnGuestThread) {
    left.withLock { $0[key] = nil }
    if let slot { try? server.server(here).detach(slot) }
  }
}
