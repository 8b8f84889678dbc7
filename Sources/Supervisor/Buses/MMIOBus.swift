import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Transport
import Virtqueue
import Xen

/// Devices behind virtio-mmio registers: an ioreq server answers the guest's accesses, foreign mappings reach its memory. For guests of
/// dom0: where the toolstack has put the device into the guest's device tree (Arm), or in a slot of an HVM guest's table.
final class MMIOBus: GuestBus {
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
  var note: String? { guest.isParavirtual ? nil : RegisterServer.note }

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
  private var seats: [DeviceKey: Seat] = [:]

  init(_ ground: GuestGround) throws(XenError) {
    guest = ground.facts
    host = ground.host
    server = try ground.registers()
    server.prepare { [unowned self] in preparation }
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
    seats[key] = seat
    server.setPin(seat.slot.interrupt, of: key)
  }

  var unclaimed: [DeviceKey] { seats.filter { $0.value.restored != nil }.map(\.key) }

  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
    if let seat = seats[key], let state = seat.restored {
      seats[key]?.restored = nil
      return (.adoptable(seat.transport.map { Driver($0.currentStatus) } ?? .absent), state)
    }
    if host.settings.stateFolder != nil, nodes["state"] == XenbusState.connected.rawValue {
      return (.lost("no saved state for a device in use: the guest must reset it"), nil)
    }
    return (.nothing, nil)
  }

  // MARK: The server

  /// Slots are claimed as a row, windows of the device tree one by one.
  private var preparation: RegisterServer.Preparation {
    let restored = seats.values.compactMap { seat in seat.transport.map { ($0, seat.slot) } }
    let row = guest.isParavirtual ? nil : SlotTable.row(count: host.settings.slots)
    return { server throws(XenError) in
      if let row { try server.claim(first: row.lowerBound, last: row.upperBound) }
      for (transport, slot) in restored { try server.attach(transport, to: slot) }
    }
  }

  // MARK: Devices

  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    guard seats[key] == nil else { return }
    if let wanted = entry.settings.transport, wanted != .mmio, entry.base != 0 {
      throw EntryFault(
        "transport",
        "expected none, not '\(wanted)': the toolstack has put the device at 0x\(String(entry.base, radix: 16)) of the guest's device tree"
      )
    }
    let count = host.settings.slots
    var taken = Set(seats.values.compactMap(\.slot.index))
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
    seats[key] = nil
    server.setPin(nil, of: key)
  }

  func memory(of key: DeviceKey) -> (any GuestMemorySource)? { server.pool }

  func place(of key: DeviceKey) -> DevicePlace {
    guard let slot = seats[key]?.slot else { return .mmio(base: 0, index: 0, sharedInterrupt: 0) }
    var interrupt: UInt32 = 0
    if case .spi(let number) = slot.interrupt { interrupt = number }
    return .mmio(base: slot.base, index: slot.index ?? 0, sharedInterrupt: interrupt)
  }

  func transport(of key: DeviceKey) -> (any DeviceTransport)? { seats[key]?.transport }

  func facts(of key: DeviceKey) -> DeviceFacts {
    let slot = seats[key]?.slot
    let row = slot.map { slot in
      let base = "0x\(String(slot.base, radix: 16))"
      return slot.index.map { Fact(name: "slot", value: "\($0) at \(base)") } ?? Fact(name: "window", value: base)
    }
    return DeviceFacts(rows: { row.map { [$0] } ?? [] }, warning: server.warning(key), slot: slot)
  }

  func claim(_ key: DeviceKey, _ wish: DeviceWish) -> BusJob { server.claim(window: wish.base, of: key) }

  func insert(_ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool) -> BusJob {
    guard let slot = seats[key]?.slot else {
      return { .device(key, .insertFailed(id, "base: the device has no slot")) }
    }
    let transport = MMIOTransport(
      device: backend, line: slot.line(of: server.handle), state: backend.state, needsReset: needsReset,
      onStatus: host.statusReporter(key))
    seats[key]?.transport = transport
    // One whose claim has failed is the guest's window from here on.
    let note = slot.index == nil ? server.noting(window: slot.base) : nil
    let attach = server.use { server throws(XenError) in
      try server.attach(transport, to: slot)
      note?(server)
    }
    return {
      do throws(XenError) {
        try attach()
      } catch {
        return .device(key, .insertFailed(id, "base: \(error)"))
      }
      if needsReset { transport.interruptForConfiguration() }
      return .device(key, .plugged(id, Driver(transport.currentStatus)))
    }
  }

  func remove(_ key: DeviceKey) -> BusJob {
    let discard = discard(key)
    return {
      _ = discard()
      return .device(key, .removed)
    }
  }

  func discard(_ key: DeviceKey) -> BusJob {
    guard let slot = seats[key]?.slot else { return { nil } }
    let detach = server.use { $0.detach(slot) }
    return {
      try? detach()
      return nil
    }
  }
}
