import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Transport
import Virtqueue
import Xen

/// Devices behind virtio-mmio registers: an ioreq server answers the guest's accesses, foreign mappings reach its memory. For guests of
/// dom0: where the toolstack has put the device into the guest's device tree (Arm), or in a slot of an HVM guest's table.
final class MMIOBus: RegisterBus {
  static let name = "mmio"
  static let remedy = "reset it"

  var guestNeeds: String {
    let slots =
      guest.isParavirtual
      ? "" : ", and the slots' ACPI table: acpi_firmware=\"/usr/share/vxd/slots.aml\" in its configuration"
    return "virtio_mmio and the device's driver\(slots)"
  }

  /// xl has no such commands for guests on Arm.
  var note: GuestNote? { guest.isParavirtual ? nil : RegisterServer.savingNote }

  static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool {
    !guest.isDriverDomain && (device.base != 0 || !guest.isParavirtual)
  }

  /// A kernel on Arm dies of an access that nobody answers; those on x86 read ones.
  static func hasWindow(_ device: DeviceWish) -> Bool { device.base != 0 }

  static func restores(_ place: DevicePlace) -> Bool {
    if case .mmio = place { true } else { false }
  }

  private let guest: GuestFacts
  let host: BusHost
  let server: RegisterServer
  let seats = RegisterSeats<DeviceSlot, MMIOTransport>()

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
    restore(key, slot, transport, state)
  }

  // MARK: The server

  /// Slots are claimed as a row, windows of the device tree one by one.
  func prepare(_ server: IOReqServer, _ here: OnGuestThread) throws(XenError) {
    if !guest.isParavirtual, let row = SlotTable.row(count: host.settings.slots) {
      try server.claim(first: row.lowerBound, last: row.upperBound)
    }
    try attachRestored(server, here)
  }

  // MARK: Devices

  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    let slots = seats.places
    guard slots[key] == nil else { return }
    if let wanted = entry.settings.transport, wanted != .mmio, entry.base != 0 {
      throw EntryFault(
        "transport",
        "expected none, not '\(wanted)': the toolstack has put the device at 0x\(String(entry.base, radix: 16)) in the guest's device tree"
      )
    }
    let count = host.settings.slots
    var taken = Set(slots.values.compactMap(\.index))
    taken.formUnion((0..<count).filter { server.isTaken(SlotTable.slot($0).interrupt) })
    guard !key.kind.isInXenstore else {
      return take(key, try entry.slot(key, taken: taken, count: count))
    }
    // The last slots are for what the toolstack does not know of, so that its disks keep theirs.
    guard let free = (0..<count).last(where: { !taken.contains($0) }) else {
      throw EntryFault("devices", "the guest's \(count) virtio-mmio slots are all in use (vxd --slots)")
    }
    take(key, SlotTable.slot(free))
  }

  func place(of key: DeviceKey) -> DevicePlace {
    guard let slot = seats.place(of: key) else { return .mmio(base: 0, index: 0, sharedInterrupt: 0) }
    var interrupt: UInt32 = 0
    if case .spi(let number) = slot.interrupt { interrupt = number }
    return .mmio(base: slot.base, index: slot.index ?? 0, sharedInterrupt: interrupt)
  }

  func facts(of key: DeviceKey) -> DeviceFacts {
    let slot = seats.place(of: key)
    let row = slot.map { slot in
      let base = "0x\(String(slot.base, radix: 16))"
      return slot.index.map { Fact(name: "slot", value: "\($0) at \(base)") } ?? Fact(name: "window", value: "\(base)")
    }
    return DeviceFacts(rows: row.map { [$0] } ?? [], warning: server.warning(key), slot: slot)
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

  static func pin(_ slot: DeviceSlot) -> DeviceSlot.Interrupt { slot.interrupt }
  static func name(_ slot: DeviceSlot) -> String { "base" }

  func makeTransport(
    _ key: DeviceKey, _ slot: DeviceSlot, _ backend: DeviceBackend, needsReset: Bool
  ) -> MMIOTransport {
    MMIOTransport(
      device: backend, line: slot.line(of: server.handle), state: backend.state, needsReset: needsReset,
      onStatus: host.statusReporter(key))
  }

  func attach(
    _ transport: MMIOTransport, _ slot: DeviceSlot, _ server: IOReqServer, _ here: OnGuestThread
  ) throws(XenError) {
    try server.attach(transport, to: slot)
    // One whose claim has failed is the guest's window from here on.
    if slot.index == nil { self.server.remember(window: slot.base, of: server, here) }
  }

  func detach(_ slot: DeviceSlot, _ server: IOReqServer) { server.detach(slot) }
}
