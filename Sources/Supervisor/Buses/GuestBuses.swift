import DeviceHost
import EventLoop
import Lifecycle
import Xen

/// The buses of one guest. Each device has one, which is chosen by what its entry and its options say, and keeps it for its life; a guest
/// may have devices on several.
///
/// Confined to the supervisor's loop.
final class GuestBuses {
  /// Every transport, in the order in which they are asked.
  static let all: [any GuestBus.Type] = [XenbusBus.self, PCIBus.self, MMIOBus.self]

  private let ground: GuestGround
  private let types: [any GuestBus.Type]
  /// Made with their first devices.
  private(set) var made: [any GuestBus] = []
  /// Devices whose saved state cannot be used, and why.
  private var lost: [DeviceKey: String] = [:]

  init(_ facts: GuestFacts, _ host: BusHost) throws(XenError) {
    types = host.settings.buses
    ground = try GuestGround(facts, host)
  }

  /// Runs what all of them do to the guest.
  var thread: GuestThread { ground.thread }

  /// The bus of a device that appears; `bus` is asked only where an earlier daemon has not put it on one.
  func bus(for key: DeviceKey, _ wish: DeviceWish) throws(XenError) -> any GuestBus {
    if let known = made.first(where: { $0.unclaimed.contains(key) }) { return known }
    guard let type = Self.choice(ground.facts, wish, of: types) else { throw Self.isNotServed(ground.facts, wish) }
    return try bus(type)
  }

  /// Whether a device that nobody knows yet would be on another bus now.
  func moves(_ wish: DeviceWish, from bus: any GuestBus) -> Bool {
    Self.choice(ground.facts, wish, of: types).map { $0 != Swift.type(of: bus) } ?? true
  }

  static func choice(
    _ guest: GuestFacts, _ device: DeviceWish, of types: [any GuestBus.Type]
  ) -> (any GuestBus.Type)? {
    types.first { $0.serves(guest, device) }
  }

  /// Why no bus serves a device.
  static func isNotServed(_ guest: GuestFacts, _ device: DeviceWish) -> XenError {
    guard guest.isDriverDomain, device.base != 0 else {
      return XenError("no transport serves the device", Errno(95) /* EOPNOTSUPP */)
    }
    return XenError(
      "a driver domain cannot serve virtio-mmio devices, because it may not map its guests' memory: remove the line from the guest's configuration, and use "
        + "'vxctl attach'", Errno(95) /* EOPNOTSUPP */)
  }

  private func bus(_ type: any GuestBus.Type) throws(XenError) -> any GuestBus {
    if let known = made.first(where: { Swift.type(of: $0) == type }) { return known }
    let bus = try type.init(ground)
    made.append(bus)
    return bus
  }

  // MARK: What an earlier daemon left

  /// Puts the devices that an earlier daemon served back in their places, without backends: registers are answered at once, so no vCPU
  /// waits for an image to be opened.
  ///
  /// - Returns: what could not be used of it, for the log.
  /// - Throws: when the guest cannot be reached now; nothing is forgotten then.
  func restore(_ folder: StateFolder, uuid: String?) throws(XenError) -> [(DeviceKey, String)] {
    guard folder.guest(ground.facts.domain) != nil else { return [] }
    for key in try ground.registers().earlierDevices(folder, uuid: uuid) { try restore(key, folder) }
    return lost.map { ($0.key, $0.value) }
  }

  private func restore(_ key: DeviceKey, _ folder: StateFolder) throws(XenError) {
    let state: DeviceState
    do throws(StateFault) {
      state = try DeviceState(path: folder.devicePath(key))
    } catch {
      folder.forget(key)
      lost[key] = error.message
      return
    }
    // What is put back by nothing here is looked at when the device appears.
    guard let type = types.first(where: { $0.restores(state.place) }) else { return }
    try bus(type).restore(key, state)
  }

  /// Devices that `restore` found and nobody has asked for so far, with their buses.
  var unclaimed: [(key: DeviceKey, bus: any GuestBus)] {
    made.flatMap { bus in bus.unclaimed.map { ($0, bus) } }
  }

  /// What is there of a device that appears on a bus.
  func earlier(
    _ key: DeviceKey, on bus: any GuestBus, _ nodes: [String: String], frontend: XenbusState?
  ) -> (Earlier, DeviceState?) {
    if let reason = lost.removeValue(forKey: key), Swift.type(of: bus).hasServer { return (.lost(reason), nil) }
    return bus.earlier(key, nodes, frontend: frontend)
  }

  /// The server of the guest's registers, where one of its buses has any.
  var server: RegisterServer? { ground.server }

  // MARK: QEMU

  /// Whether what QEMU has on the guest's PCI bus is to be asked of its monitor.
  var asksQEMU: Bool { made.contains(where: \.asksQEMU) }

  /// Notes what QEMU has.
  ///
  /// - Returns: devices that are in a place of QEMU's.
  func learn(_ functions: Set<PCIAddress>) -> [Displacement] { made.flatMap { $0.learn(functions) } }
  func learnNothing(isGone: Bool) { for bus in made { bus.learnNothing(isGone: isGone) } }

  // MARK: For the status board

  var facts: ServerFacts {
    var facts = ground.server?.facts ?? ServerFacts()
    facts.rows += made.flatMap(\.facts)
    return facts
  }

  var guestNeeds: String { unique(made.map(\.guestNeeds)) ?? "" }
  /// What operators should know.
  var notes: Set<GuestNote> { Set(made.compactMap(\.note)) }

  private func unique(_ texts: [String]) -> String? {
    var seen: Set<String> = []
    let different = texts.filter { seen.insert($0).inserted }
    return different.isEmpty ? nil : different.joined(separator: "; ")
  }
}
