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
  static let remedy = "look for its devices again"

  let guestNeeds = "virtio_pci and the device's driver"
  var note: GuestNote? { RegisterServer.savingNote }

  static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool {
    device.transport == .pci && device.base == 0 && !guest.isParavirtual && !guest.isDriverDomain
  }

  static func restores(_ place: DevicePlace) -> Bool {
    if case .pci = place { true } else { false }
  }

  /// Device numbers on the bus that are ours. QEMU fills the bus from below: its chipset is 0 and 1, the Xen platform device, graphics,
  /// network cards and passed-through devices follow.
  static let devices: ClosedRange<UInt8> = 16...31

  let host: BusHost
  let server: RegisterServer
  let seats = RegisterSeats<PCIAddress, PCITransport>()
  private let messages: GuestMessages
  private let knowledge = Mutex(Knowledge.unknown)

  /// What QEMU has on the bus, as its monitor says.
  private enum Knowledge {
    case unknown
    /// The guest has not looked through its bus: until it does, QEMU may be given more (libxl passes devices through when QEMU runs).
    case early
    /// `unanswered` is nil while this is taken to be true. Otherwise it may have changed, and QEMU is asked again: it counts the questions that
    /// QEMU has not answered since.
    case known(Set<PCIAddress>, unanswered: Int?)

    var functions: Set<PCIAddress>? { if case .known(let functions, _) = self { functions } else { nil } }
    var asks: Bool {
      switch self {
      case .unknown: true
      case .early: false
      case .known(_, let unanswered): unanswered != nil
      }
    }
  }

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
    restore(key, address, transport, state)
  }

  /// The pin that a function without MSI-X drives.
  static func pin(_ address: PCIAddress) -> DeviceSlot.Interrupt { .pciIntx(device: address.device, pin: 0) }
  static func name(_ address: PCIAddress) -> String { "PCI function \(address)" }

  private func line(_ address: PCIAddress) -> any InterruptLine {
    IntxLine(guest: server.handle, device: address.device, pin: 0)
  }

  // MARK: The server

  func prepare(_ server: IOReqServer, _ here: OnGuestThread) throws(XenError) {
    // A guest with a driver at work has looked already: it neither waits nor loses what it found.
    let isInUse = seats.restored.contains { !$0.1.currentStatus.isEmpty }
    let isEarly = knowledge.withLock { knowledge in
      guard !isInUse, knowledge.functions == nil else { return false }
      knowledge = .early
      return true
    }
    if isEarly { self.server.holdScan(server, here) }
    try attachRestored(server, here)
  }

  // MARK: Devices

  /// xvde is device 16, xvdf 17, and so on, so that the guest finds its disks in the order of their names; what the toolstack does not
  /// know of comes from 31 down.
  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    if let place = seats.place(of: key)?.device {
      guard seats.transport(of: key) == nil else {
        if !isInUse(key) { try checkCollision(place) }
        return
      }
      // It has not been put there, or was taken out again: another may be wanted now.
      forget(key)
    }
    let places = seats.places.mapValues(\.device)
    // A slot of the guest's table drives a pin of one of these devices.
    let taken = Set(places.values + Self.devices.filter { server.isTaken(Self.pin(PCIAddress(device: $0))) })
    if let wanted = entry.settings.slot {
      guard !taken.contains(wanted) else {
        throw EntryFault(
          "slot",
          "another of the guest's devices is PCI device \(wanted) already; expected one that is free, from 3 to 31")
      }
      try checkCollision(wanted)
      take(key, PCIAddress(device: wanted))
      return askAgain()
    }
    guard let device = Self.place(key, taken: taken.union((known ?? []).map(\.device))) else {
      throw EntryFault(
        key.kind.isInXenstore ? "params" : "devices",
        "the guest's PCI devices \(Self.devices.lowerBound) to \(Self.devices.upperBound) are all in use; give this one another with the option "
          + "\"slot\", from 3 on, or \"transport\": \"mmio\"")
    }
    take(key, PCIAddress(device: device))
    askAgain()
  }

  private var known: Set<PCIAddress>? { knowledge.withLock { $0.functions } }

  /// What is known may be old: QEMU is asked once more, soon.
  private func askAgain() {
    knowledge.withLock { if case .known(let functions, nil) = $0 { $0 = .known(functions, unanswered: 0) } }
  }

  private func checkCollision(_ device: UInt8) throws(EntryFault) {
    guard known?.contains(where: { $0.device == device }) == true else { return }
    // It may be gone by the time that an operator tries again.
    askAgain()
    throw EntryFault("slot", Self.collision(device))
  }

  private static func collision(_ device: UInt8) -> String {
    "QEMU has PCI device \(device) (\(PCIAddress(device: device))) too, and the guest finds only one of them; give this one another with the "
      + "option \"slot\", or move QEMU's: look for pci= with '@' and for addr= in the guest's configuration; then 'vxctl restart GUEST/DEVICE'"
  }

  // MARK: QEMU

  // QEMU starts after state 2 of the guest's disks, when our functions are in their places and claimed from Xen. In a place that both have, Xen asks
  // the ioreq server that was made last, which is QEMU's where the guest has devices of ours from its start. So the guest finds QEMU's device, until
  // that goes (kernels with Xen's drivers unplug emulated network cards): then it finds ours, refused and without a backend, and its driver hangs,
  // as seen on Xen 4.17 and 4.20. Therefore a function of ours in a place of QEMU's is off the bus before the guest finds anything: before the guest
  // runs, libxl has waited for QEMU to say that it does, and its monitor is there earlier. So QEMU is asked when the guest asks for the first
  // configuration space of ours, and that access waits for QEMU's answer: not before, since libxl passes devices through once QEMU runs. Where our server is the later one (the first
  // device of a guest that runs), an access that waits at just that place finds it empty. A guest without a monitor is answered at once; one whose QEMU does
  // not answer after the 3 s that its monitor is given (`QEMUMonitor.functions`), or 5 s (`SupervisorSettings.longestScanHold`), and what it collides with is
  // refused later, unless a driver is at work with it by then. What QEMU gets while the guest runs (PCI hot-plug) is
  // looked for when a device is put on the bus or has been refused.

  var asksQEMU: Bool { knowledge.withLock(\.asks) }

  func learn(_ functions: Set<PCIAddress>) -> [Displacement] {
    knowledge.withLock { $0 = .known(functions, unanswered: nil) }
    let theirs = Set(functions.map(\.device))
    // A device that a driver has found is the guest's, whatever QEMU has in its place.
    let disputed = seats.places.filter { theirs.contains($0.value.device) && !isInUse($0.key) }
    return disputed.sorted { $0.key.device < $1.key.device }.map { key, place in
      Displacement(
        key: key, place: place, reason: "slot: " + Self.collision(place.device),
        isPresent: seats.transport(of: key) != nil)
    }
  }

  func isAt(_ device: Displacement) -> Bool { seats.place(of: device.key) == device.place }

  /// Questions without an answer after which what a silent QEMU said last holds no longer: else it would refuse its places for ever.
  private static let patience = 3

  func learnNothing(isGone: Bool) {
    knowledge.withLock { knowledge in
      switch knowledge {
      case .early: knowledge = .unknown
      case .known(let functions, let unanswered?):
        let count = unanswered + 1
        knowledge = isGone || count >= Self.patience ? .unknown : .known(functions, unanswered: count)
      case .unknown, .known(_, nil): break
      }
    }
  }

  func answerScan(without absent: [Displacement]?, _ here: OnGuestThread) -> [Displacement] {
    let kept = Set(server.answerScan(without: absent?.map(\.place), here))
    // Their seats are emptied when the supervisor has heard of it, which alone knows what else is under way with them.
    return (absent ?? []).filter { !kept.contains($0.place) }
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

  func place(of key: DeviceKey) -> DevicePlace {
    .pci(device: seats.place(of: key)?.device ?? Self.devices.lowerBound)
  }

  func facts(of key: DeviceKey) -> DeviceFacts {
    guard let address = seats.place(of: key) else { return DeviceFacts() }
    let transport = seats.transport(of: key)
    let isShared = known?.contains { $0.device == address.device } == true
    let collision =
      "QEMU has PCI device \(address.device) too: detach QEMU's before the guest looks through its PCI bus again (reboot, rescan, kexec), "
      + "which may find either"
    var rows = [Fact(name: "function", value: "\(address)")]
    if let transport {
      let base = Reading.address(transport.base)
      let enabled = Reading.choice(transport.claimed, [.text([base, ", which the guest may not use for it"]), base])
      rows.append(Fact(name: "BAR", value: .choice(transport.base, ["not enabled", enabled])))
      let sent = Reading.count(transport.interrupts.sent)
      rows.append(Fact(name: "vectors", value: .text(["\(transport.vectorCount), ", sent, " sent"])))
    }
    return DeviceFacts(
      rows: rows, addressBesideQEMU: "\(address)",
      warning: isShared && isInUse(key) ? collision : server.warning(key))
  }

  // MARK: The guest

  func makeTransport(
    _ key: DeviceKey, _ address: PCIAddress, _ backend: DeviceBackend, needsReset: Bool
  ) -> PCITransport {
    PCITransport(
      device: backend, line: line(address), sender: messages, state: backend.state, needsReset: needsReset,
      onStatus: host.statusReporter(key))
  }

  func attach(
    _ transport: PCITransport, _ address: PCIAddress, _ server: IOReqServer, _ here: OnGuestThread
  ) throws(XenError) { try server.attach(transport, at: address) }

  func detach(_ address: PCIAddress, _ server: IOReqServer) { server.detach(address) }
}
