import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Synchronization
import Transport
import Virtqueue
import Xen

/// Devices as functions on an HVM guest's PCI bus, which every operating system and its firmware look through: an ioreq server answers
/// for their configuration spaces and BARs, foreign mappings reach the guest's memory. For guests and devices of dom0 whose profile says so.
final class PCIBus: RegisterBus {
  static let name = "pci"
  static let style = BusStyle.registers
  static let hasServer = true
  static let hostNodes = ["evtchn", "privcmd"]

  let guestNeeds = "virtio_pci and the device's driver"
  func note() -> GuestNote? { server.savingNote }

  static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool {
    device.transport == .pci && device.base == 0 && !guest.isParavirtual && !guest.isDriverDomain
  }

  static func restores(_ place: DevicePlace) -> Bool {
    if case .pci = place { true } else { false }
  }

  /// Device numbers on the bus that are ours. QEMU fills the bus from below: its chipset is 0 and 1, the Xen platform device, graphics,
  /// network cards and passed-through devices follow.
  static let devices: ClosedRange<UInt8> = 16...31

  /// Where a device is, and with what the guest's thread answers for it.
  private struct Seat {
    var address: PCIAddress
    var transport: PCITransport?
    /// Of an earlier daemon, until its entry asks for it.
    var restored: DeviceState?
  }

  private let host: BusHost
  private let server: RegisterServer
  private let messages: GuestMessages
  private let seats = Mutex<[DeviceKey: Seat]>([:])
  /// Devices of an earlier daemon, until they are taken out of their places; the server has claims of theirs, also when nobody asks for them.
  private let left = Mutex<[DeviceKey: Seat]>([:])
  /// What QEMU has on the bus, as its monitor said; nil before.
  private let others = Mutex<Set<PCIAddress>?>(nil)

  init(_ ground: GuestGround) throws(XenError) {
    host = ground.host
    server = try ground.registers()
    messages = GuestMessages(guest: server.handle)
    server.add(self)
  }

  var facts: [Fact] {
    let refused = messages.refused.load(ordering: .relaxed)
    return refused > 0 ? [Fact(name: "interrupts that Xen refused", value: "\(refused)")] : []
  }

  // MARK: What an earlier daemon left

  func restore(_ key: DeviceKey, _ state: DeviceState) {
    guard case .pci(let device) = state.place else { return }
    let address = PCIAddress(device: device)
    let saved = state.saved
    let transport = PCITransport(
      restoring: state.layout.identity, saved.registers, saved.status, state.savedFunction,
      configuration: saved.configuration, line: line(address), sender: messages, state: state,
      onStatus: host.statusReporter(key))
    take(key, Seat(address: address, transport: transport, restored: state))
  }

  private func take(_ key: DeviceKey, _ seat: Seat) {
    seats.withLock { $0[key] = seat }
    if seat.restored != nil { left.withLock { $0[key] = seat } }
    server.setPin(Self.pin(seat.address.device), of: key)
  }

  /// The pin that a function without MSI-X drives.
  private static func pin(_ device: UInt8) -> DeviceSlot.Interrupt { .pciIntx(device: device, pin: 0) }

  private func line(_ address: PCIAddress) -> any InterruptLine {
    IntxLine(guest: server.handle, device: address.device, pin: 0)
  }

  var unclaimed: [DeviceKey] { seats.withLock { seats in seats.keys.filter { seats[$0]?.restored != nil } } }

  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
    if let state = seats.withLock({ $0[key]?.restored.take() }) {
      return (.adoptable(transport(of: key).map { Driver($0.currentStatus) } ?? .absent), state)
    }
    if host.settings.stateFolder != nil, nodes["state"] == XenbusState.connected.rawValue {
      return (.lost("no saved state for a device in use: the guest must look for its devices again"), nil)
    }
    return (.nothing, nil)
  }

  // MARK: The server

  func prepare(_ server: IOReqServer, _ here: OnGuestThread) throws(XenError) {
    if others.withLock({ $0 == nil }) { self.server.holdScan(server, here) }
    for seat in left.withLock({ Array($0.values) }) {
      if let transport = seat.transport { try server.attach(transport, at: seat.address) }
    }
  }

  // MARK: Devices

  /// xvde is device 16, xvdf 17, and so on, so that the guest finds its disks in the order of their names; what the toolstack does not
  /// know of comes from 31 down.
  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    let places = seats.withLock { $0.mapValues(\.address.device) }
    if let place = places[key] { return try checkCollision(place) }
    // A slot of the guest's table drives a pin of one of these devices.
    let taken = Set(places.values + Self.devices.filter { server.isTaken(Self.pin($0)) })
    if let wanted = entry.settings.slot {
      guard !taken.contains(wanted) else {
        throw EntryFault(
          "slot",
          "another of the guest's devices is PCI device \(wanted) already; expected one that is free, from 3 to 31")
      }
      try checkCollision(wanted)
      return take(key, Seat(address: PCIAddress(device: wanted)))
    }
    guard let device = Self.place(key, taken: taken.union((others.withLock { $0 } ?? []).map(\.device))) else {
      throw EntryFault(
        key.kind.isInXenstore ? "params" : "devices",
        "the guest's PCI devices \(Self.devices.lowerBound) to \(Self.devices.upperBound) are all in use")
    }
    take(key, Seat(address: PCIAddress(device: device)))
  }

  private func checkCollision(_ device: UInt8) throws(EntryFault) {
    guard others.withLock({ $0?.contains { $0.device == device } }) == true else { return }
    throw EntryFault(
      "slot",
      "QEMU has PCI device \(device) (\(PCIAddress(device: device))) too, and the guest finds only one of them; give this one another with the "
        + "option \"slot\", or move QEMU's: look for pci= with '@' and for addr= in the guest's configuration")
  }

  // MARK: QEMU

  // QEMU starts behind state 2 of the guest's disks, with functions of ours in their places and claimed from Xen, which lets ours win. Before the
  // guest runs, libxl has waited for QEMU to say that it does, and its monitor is there earlier. So what QEMU has is known at the latest when the
  // guest asks for the first configuration space of ours: that access waits for QEMU's answer, and a function of ours in a place of QEMU's is
  // taken off the bus before it is answered. So nobody finds it there, with one exception: who waits with an access to just that place finds it empty,
  // since Xen has given that access to us, and what QEMU has there with the next one. hvmloader leaves such a device without addresses, which kernels
  // give it then. A guest without a monitor is answered at once; one whose QEMU does not answer after 3 s, as long as its thread has
  // (`QEMUMonitor.functions`), or 5 s (`RegisterServer.longestHold`), and what it collides with is refused later. What QEMU gets while the
  // guest runs (PCI hot-plug) is not looked for.

  var asksQEMU: Bool { others.withLock { $0 == nil } && seats.withLock { !$0.isEmpty } }

  func learn(_ functions: Set<PCIAddress>) -> [DeviceKey] {
    others.withLock { $0 = functions }
    let theirs = Set(functions.map(\.device))
    return seats.withLock { $0.filter { theirs.contains($0.value.address.device) } }.map(\.key)
  }

  func answerScan(without absent: [DeviceKey], _ here: OnGuestThread) {
    server.answerScan(without: absent.compactMap { address(of: $0) }, here)
  }

  /// The device number for a device; nil when all are taken.
  static func place(_ key: DeviceKey, taken: Set<UInt8>) -> UInt8? {
    let free = devices.filter { !taken.contains($0) }
    guard key.kind.isInXenstore else { return free.last }
    if key.kind == .disk, let index = DeviceEntry.diskIndex(key.device), index >= 4,
      let wanted = UInt8(exactly: Int(devices.lowerBound) + index - 4), free.contains(wanted)
    {
      return wanted
    }
    return free.first
  }

  func vacate(_ key: DeviceKey) { forget(key) }

  func forget(_ key: DeviceKey) {
    seats.withLock { $0[key] = nil }
    server.setPin(nil, of: key)
  }

  private func address(of key: DeviceKey) -> PCIAddress? { seats.withLock { $0[key]?.address } }

  func memory(of key: DeviceKey) -> (any GuestMemorySource)? { server.pool }

  func place(of key: DeviceKey) -> DevicePlace {
    .pci(device: address(of: key)?.device ?? Self.devices.lowerBound)
  }

  func transport(of key: DeviceKey) -> (any DeviceTransport)? { seats.withLock { $0[key]?.transport } }

  func facts(of key: DeviceKey) -> DeviceFacts {
    guard let seat = seats.withLock({ $0[key] }) else { return DeviceFacts() }
    let (address, transport) = (seat.address, seat.transport)
    return DeviceFacts(
      rows: {
        var rows = [Fact(name: "function", value: "\(address)")]
        guard let transport else { return rows }
        let base = transport.base.map { "0x\(String($0, radix: 16))" }
        rows.append(
          Fact(
            name: "BAR",
            value: base.map { transport.isClaimed ? $0 : "\($0), which the guest may not use for it" } ?? "not enabled")
        )
        rows.append(Fact(name: "vectors", value: "\(transport.vectorCount), \(transport.interrupts.sentCount) sent"))
        return rows
      }, warning: server.warning(key))
  }

  // MARK: The guest

  func insert(
    _ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool, _ here: OnGuestThread
  ) -> BusEvent {
    guard let address = address(of: key) else {
      return .device(key, .insertFailed(id, "the device has no place on the PCI bus"))
    }
    let transport = PCITransport(
      device: backend, line: line(address), sender: messages, state: backend.state, needsReset: needsReset,
      onStatus: host.statusReporter(key))
    do throws(XenError) {
      try server.server(preparedFor: self, here).attach(transport, at: address)
    } catch {
      return .device(key, .insertFailed(id, "PCI function \(address): \(error)"))
    }
    seats.withLock { $0[key]?.transport = transport }
    if needsReset { transport.interruptForConfiguration() }
    return .device(key, .plugged(id, Driver(transport.currentStatus)))
  }

  func remove(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent {
    empty(address(of: key), key, here)
    return .device(key, .removed)
  }

  func discard(_ key: DeviceKey) -> @Sendable (OnGuestThread) -> Void {
    let address = address(of: key)
    forget(key)
    return { [self] here in empty(address, key, here) }
  }

  private func empty(_ address: PCIAddress?, _ key: DeviceKey, _ here: OnGuestThread) {
    left.withLock { $0[key] = nil }
    if let address { try? server.server(here).detach(address) }
  }
}
