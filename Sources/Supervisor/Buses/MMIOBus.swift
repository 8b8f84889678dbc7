import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Transport
import Virtqueue
import Xen

/// Devices behind virtio-mmio registers: an ioreq server answers the guest's accesses, foreign mappings reach its memory. For HVM guests
/// of dom0.
final class MMIOBus: GuestBus {
  static let name = "mmio"
  static let style = BusStyle.registers
  static let hasServer = true
  static let hostNodes = ["evtchn", "privcmd"]
  static let guestNeeds =
    "virtio_mmio, the device's driver, and the slots' ACPI table: acpi_firmware=\"/usr/share/vxd/slots.aml\" in its configuration"
  static let note: String? =
    "xl save and migrate do not carry the state of these devices (ioreq-based): shut the guest down instead"

  static func serves(_ facts: GuestFacts) -> Bool { !facts.isDriverDomain }

  /// Where a device is, and with what the guest's thread answers for it.
  private struct Seat {
    var slot: DeviceSlot
    var transport: MMIOTransport?
    /// Of an earlier daemon, until its entry asks for it.
    var restored: DeviceState?
  }

  private let domain: DomainID
  private let host: BusHost
  private let server: RegisterServer
  private var seats: [DeviceKey: Seat] = [:]
  /// Devices whose saved state cannot be used, and why.
  private var lost: [DeviceKey: String] = [:]

  init(_ facts: GuestFacts, _ host: BusHost) throws(XenError) {
    domain = facts.domain
    self.host = host
    server = try RegisterServer(facts, host)
  }

  var thread: LoopThread { server.thread }
  var facts: BusFacts { server.facts }

  // MARK: What an earlier daemon left

  /// Puts the devices that an earlier daemon served back into the guest's slots, without backends: registers are answered at once, so no
  /// vCPU waits for an image to be opened.
  func restore(_ folder: StateFolder, uuid: String?) -> [(DeviceKey, String)] {
    for key in server.earlierDevices(folder, uuid: uuid) { restore(key, folder) }
    return lost.map { ($0.key, $0.value) }
  }

  private func restore(_ key: DeviceKey, _ folder: StateFolder) {
    let state: DeviceState
    do throws(StateFault) {
      state = try DeviceState(path: folder.devicePath(key))
    } catch {
      folder.forget(key)
      lost[key] = error.message
      return
    }
    let place = state.place
    guard !place.isXenbus, place.pciDevice == nil else { return folder.forget(key) }
    let slot =
      place.sharedInterrupt == 0
      ? SlotTable.slot(min(max(place.index, 0), SlotTable.maximumCount - 1))
      : DeviceSlot(index: 0, base: place.base, interrupt: .spi(place.sharedInterrupt))
    let saved = state.saved
    let transport = MMIOTransport(
      restoring: state.shape.profile, saved.registers, saved.status, configuration: saved.configuration,
      line: slot.line(of: server.handle), state: state, onStatus: statusReporter(key))
    seats[key] = Seat(slot: slot, transport: transport, restored: state)
  }

  var unclaimed: [DeviceKey] { seats.filter { $0.value.restored != nil }.map(\.key) }

  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
    if let seat = seats[key], let state = seat.restored {
      seats[key]?.restored = nil
      return (.adoptable(seat.transport.map { Driver($0.currentStatus) } ?? .absent), state)
    }
    if let reason = lost.removeValue(forKey: key) { return (.lost(reason), nil) }
    if host.settings.stateFolder != nil, nodes["state"] == XenbusState.connected.rawValue {
      return (.lost("no saved state for a device in use: the guest must reset it"), nil)
    }
    return (.nothing, nil)
  }

  /// What a device's transport calls at each change of its status.
  private func statusReporter(_ key: DeviceKey) -> @Sendable (DeviceStatus) -> Void {
    let (relay, report) = (StatusRelay(), host.report)
    return { status in if relay.put(status) { report(.driver(key, relay)) } }
  }

  // MARK: The server

  func startServer(uuid: String?) -> BusJob {
    let restored = seats.values.compactMap { seat in seat.transport.map { ($0, seat.slot) } }
    #if arch(x86_64)
      let window: (UInt64, UInt64)? = (
        SlotTable.firstBase, SlotTable.firstBase + SlotTable.windowStride * UInt64(host.settings.slots) - 1
      )
    #else
      let window: (UInt64, UInt64)? = nil
    #endif
    return server.start(
      uuid: uuid, transport: .mmio, needs: "virtio-mmio needs an HVM guest and, on x86, dom0"
    ) { server throws(XenError) in
      if let window { try server.claim(first: window.0, last: window.1) }
      for (transport, slot) in restored { try server.attach(transport, to: slot) }
    }
  }

  func leaveServer() -> BusJob { server.leave() }
  func closeServer() -> BusJob { server.close() }

  // MARK: Devices

  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    guard seats[key] == nil else { return }
    let taken = Set(seats.values.map(\.slot.index))
    let count = host.settings.slots
    guard !key.kind.isInXenstore else {
      seats[key] = Seat(slot: try entry.slot(key, taken: taken, count: count))
      return
    }
    // The last slots are for what the toolstack does not know of, so that its disks keep theirs.
    guard let free = (0..<count).last(where: { !taken.contains($0) }) else {
      throw EntryFault("devices", "the guest's \(count) virtio-mmio slots are all in use (vxd --slots)")
    }
    seats[key] = Seat(slot: SlotTable.slot(free))
  }

  func vacate(_ key: DeviceKey) { seats[key] = nil }
  func forget(_ key: DeviceKey) { seats[key] = nil }

  func memory(of key: DeviceKey) -> (any GuestMemorySource)? { server.pool }

  func place(of key: DeviceKey) -> DeviceState.Place {
    guard let slot = seats[key]?.slot else { return DeviceState.Place(base: 0, index: 0, sharedInterrupt: 0) }
    var interrupt: UInt32 = 0
    if case .spi(let number) = slot.interrupt { interrupt = number }
    return DeviceState.Place(base: slot.base, index: slot.index, sharedInterrupt: interrupt)
  }

  func transport(of key: DeviceKey) -> (any DeviceTransport)? { seats[key]?.transport }

  func facts(of key: DeviceKey) -> DeviceFacts {
    let slot = seats[key]?.slot
    let row = slot.map { Fact(name: "slot", value: "\($0.index) at 0x\(String($0.base, radix: 16))") }
    return DeviceFacts(rows: { row.map { [$0] } ?? [] }, warning: RegisterServer.warning(key), slot: slot)
  }

  func insert(_ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool) -> BusJob {
    guard let slot = seats[key]?.slot else {
      return { .device(key, .insertFailed(id, "base: the device has no slot")) }
    }
    let transport = MMIOTransport(
      device: backend, line: slot.line(of: server.handle), state: backend.state, needsReset: needsReset,
      onStatus: statusReporter(key))
    seats[key]?.transport = transport
    let attach = server.use { server throws(XenError) in try server.attach(transport, to: slot) }
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
