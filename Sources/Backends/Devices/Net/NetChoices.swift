import Synchronization
package import Virtqueue

/// What the driver asked for by the control queue (virtio 1.2, 5.1.6.5); survives the backend and the daemon.
package struct NetChoices: Equatable, Sendable {
  /// Addresses of each of the two tables at most: one more, and all of that sort are taken.
  package static let tableLimit = 64

  package var promiscuous = true
  package var allMulticast = false
  package var allUnicast = false
  package var noMulticast = false
  package var noUnicast = false
  package var noBroadcast = false
  package var mac: MACAddress
  package var unicast: [MACAddress] = []
  package var multicast: [MACAddress] = []
  package var unicastOverflows = false
  package var multicastOverflows = false
  /// A bit for each VLAN.
  package var vlans = [UInt64](repeating: 0, count: 64)
  /// Queue pairs in use.
  package var pairs = 1
  /// Feature bits of the offloads that the driver has switched on, of those that were negotiated.
  package var offloads: UInt64
  /// How long notifications may be kept back in each direction.
  package var receiveLimits = NotificationLimits()
  package var transmitLimits = NotificationLimits()

  /// As a driver begins: every packet is its, since a driver without a control queue cannot say otherwise.
  package init(mac: MACAddress, offloads: UInt64) {
    self.mac = mac
    self.offloads = offloads
  }

  /// Choices that an earlier backend saved, as far as what is negotiated allows them.
  package mutating func limit(to features: FeatureBits) {
    offloads &= features.intersection(.netGuestOffloads).rawValue
    if !features.contains(.netQueues) { pairs = 1 }
    if !features.contains(.netNotificationCoalescing) {
      (receiveLimits, transmitLimits) = (NotificationLimits(), NotificationLimits())
    }
  }

  // MARK: Saved

  /// Words of the saved form.
  static let wordCount = 8 + 2 * tableLimit + 64

  package func save(to memory: UnsafeMutableRawBufferPointer) {
    guard memory.count >= Self.wordCount * 8 else { return }
    var flags: UInt64 = 1
    for (bit, isOn) in [
      promiscuous, allMulticast, allUnicast, noMulticast, noUnicast, noBroadcast, unicastOverflows, multicastOverflows,
    ].enumerated() where isOn { flags |= 2 << UInt64(bit) }
    let head = [mac.value, UInt64(pairs), offloads, UInt64(unicast.count), UInt64(multicast.count)]
    var index = 1
    func put(_ value: UInt64) {
      memory.storeBytes(of: value, toByteOffset: 8 * index, as: UInt64.self)
      index += 1
    }
    // Without its first word nothing is there: a death in between loses choices, and the driver's filter opens.
    memory.storeBytes(of: 0, as: UInt64.self)
    atomicMemoryFence(ordering: .releasing)
    for value in head { put(value) }
    for table in [unicast, multicast] {
      for place in 0..<Self.tableLimit { put(place < table.count ? table[place].value : 0) }
    }
    for word in vlans { put(word) }
    put(receiveLimits.word)
    put(transmitLimits.word)
    atomicMemoryFence(ordering: .releasing)
    memory.storeBytes(of: flags, as: UInt64.self)
  }

  /// What was saved; nil when nothing was.
  package init?(from memory: UnsafeMutableRawBufferPointer, maximumPairs: Int) {
    guard memory.count >= Self.wordCount * 8 else { return nil }
    func word(_ index: Int) -> UInt64 { memory.load(fromByteOffset: 8 * index, as: UInt64.self) }
    let flags = word(0)
    guard flags & 1 == 1, word(2) >= 1, word(2) <= UInt64(maximumPairs), word(4) <= UInt64(Self.tableLimit),
      word(5) <= UInt64(Self.tableLimit)
    else { return nil }
    func flag(_ bit: UInt64) -> Bool { flags & 2 << bit != 0 }
    self.init(mac: MACAddress(value: word(1)), offloads: word(3))
    (promiscuous, allMulticast, allUnicast) = (flag(0), flag(1), flag(2))
    (noMulticast, noUnicast, noBroadcast) = (flag(3), flag(4), flag(5))
    (unicastOverflows, multicastOverflows) = (flag(6), flag(7))
    pairs = Int(word(2))
    unicast = (0..<Int(word(4))).map { MACAddress(value: word(6 + $0)) }
    multicast = (0..<Int(word(5))).map { MACAddress(value: word(6 + Self.tableLimit + $0)) }
    vlans = (0..<64).map { word(6 + 2 * Self.tableLimit + $0) }
    // Nothing, where an earlier vxd saved them.
    receiveLimits = NotificationLimits(word: word(Self.wordCount - 2))
    transmitLimits = NotificationLimits(word: word(Self.wordCount - 1))
  }
}

/// The receive filter as a pump asks it for each packet: the choices in a form that needs no reference count.
struct ReceiveFilter: ~Copyable {
  private var choices: NetChoices
  private let tables: UnsafeMutablePointer<UInt64>
  private var unicastCount = 0
  private var multicastCount = 0
  private var mac: UInt64 = 0
  private var flags = Flags()
  /// VLANs are told apart only when the driver can choose them.
  private var filtersVLANs = false

  private struct Flags {
    var promiscuous = true
    var allMulticast = false
    var allUnicast = false
    var noMulticast = false
    var noUnicast = false
    var noBroadcast = false
  }

  init(_ choices: NetChoices) {
    self.choices = choices
    tables = .allocate(capacity: 2 * NetChoices.tableLimit + 64)
    tables.initialize(repeating: 0, count: 2 * NetChoices.tableLimit + 64)
  }

  deinit { tables.deallocate() }

  mutating func set(_ new: NetChoices, filtersVLANs: Bool) {
    choices = new
    self.filtersVLANs = filtersVLANs
    mac = new.mac.value
    flags = Flags(
      promiscuous: new.promiscuous, allMulticast: new.allMulticast || new.multicastOverflows,
      allUnicast: new.allUnicast || new.unicastOverflows, noMulticast: new.noMulticast, noUnicast: new.noUnicast,
      noBroadcast: new.noBroadcast)
    unicastCount = min(new.unicast.count, NetChoices.tableLimit)
    multicastCount = min(new.multicast.count, NetChoices.tableLimit)
    for index in 0..<unicastCount { tables[index] = new.unicast[index].value }
    for index in 0..<multicastCount { tables[NetChoices.tableLimit + index] = new.multicast[index].value }
    for index in 0..<64 { tables[2 * NetChoices.tableLimit + index] = new.vlans[index] }
  }

  /// - Parameters:
  ///   - destination: the packet's, as `MACAddress.value`.
  ///   - vlan: 0 to 4095; -1 for an untagged packet.
  func passes(_ destination: UInt64, vlan: Int) -> Bool {
    // Everything, VLANs included (virtio 1.2, 5.1.6.5.1).
    if flags.promiscuous { return true }
    if filtersVLANs, vlan >= 0 {
      let word = tables[2 &* NetChoices.tableLimit &+ (vlan & 4095) >> 6]
      guard word & 1 << UInt64(vlan & 63) != 0 else { return false }
    }
    if destination == 0xffff_ffff_ffff { return !flags.noBroadcast }
    if destination >> 40 & 1 == 1 {
      guard !flags.noMulticast else { return false }
      return flags.allMulticast || contains(destination, NetChoices.tableLimit, multicastCount)
    }
    guard !flags.noUnicast else { return false }
    return flags.allUnicast || destination == mac || contains(destination, 0, unicastCount)
  }

  private func contains(_ address: UInt64, _ start: Int, _ count: Int) -> Bool {
    for index in 0..<count where tables[start &+ index] == address { return true }
    return false
  }
}
