package import Devices
package import Engines
package import EventLoop
package import JSON
package import Lifecycle
package import Virtqueue
package import Xen

/// Options of a network device.
package struct NetSettings: DeviceSettings {
  package var restart = RestartPolicy()
  package var slot: UInt8?
  package var limits = RateLimits()
  package var offered: FeatureBits?
  package var transport: RegisterTransport?
  package var attachment: NetAttachment
  /// The tap's name where vxd makes it.
  package var tapName: String
  package var mac: MACAddress
  /// nil for the bridge's; a guest that negotiates it uses it.
  package var mtu: UInt16?
  /// Queue pairs, each with a thread of its own.
  package var pairs = 1
  package var queueSize: UInt16 = 256
  package var isLinkUp = true
  /// What the guest is told of the link's speed, in Mbit/s; nil for that of the interface.
  package var speed: UInt32?
  /// Drop what has another source than the guest's hardware address.
  package var locksMAC = true
  /// Drop what has another source than these; nil for no such lock.
  package var addresses: [InternetAddress]?
  /// VLANs whose tags the guest may send.
  package var vlans: Set<UInt16> = []
  /// The guest may be a router or a DHCP server.
  package var mayServe = false
  /// Groups of offloads, each on both sides.
  package var offloads = Offloads.all

  package struct Offloads: OptionSet, Sendable {
    package let rawValue: Int
    package init(rawValue: Int) { self.rawValue = rawValue }
    package static let checksum = Offloads(rawValue: 1)
    package static let tso = Offloads(rawValue: 2)
    package static let ufo = Offloads(rawValue: 4)
    package static let uso = Offloads(rawValue: 8)
    package static let mergeable = Offloads(rawValue: 16)
    package static let all: Offloads = [.checksum, .tso, .ufo, .uso, .mergeable]
  }

  package init(attachment: NetAttachment, tapName: String, mac: MACAddress) {
    self.attachment = attachment
    self.tapName = tapName
    self.mac = mac
  }

  // MARK: DeviceSettings

  package static let type = VirtioType.network

  package init(options members: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault) {
    let derived = owner.identity.map { MACAddress(of: $0, owner.device) }
    guard let mac = derived ?? (members.contains { $0.name == "mac" } ? MACAddress(value: 0) : nil) else {
      throw SettingFault(
        field: "\(field).mac",
        reason:
          "not given, and the guest's UUID is not known here; expected an address, or the UUID to derive one from: "
          + "run 'vxctl identify' in dom0, or give the device a 'mac'")
    }
    self.init(attachment: .created(bridge: nil), tapName: "vx\(owner.domain).\(owner.suffix)", mac: mac)
    try Self.checkAttachments(members, field)
    try Self.options.apply(members, to: &self, field)
  }

  package var optionTexts: [(name: String, value: String)] { Self.options.texts(self) }

  package static var documents: [OptionDocument] {
    let plain = NetSettings(attachment: .created(bridge: nil), tapName: "", mac: MACAddress(value: 0))
    return [options.document("Network devices", plain).withoutCommonOptions]
  }

  package mutating func keep(queueSizes: [UInt16]) {
    pairs = max(1, (queueSizes.count - 1) / 2)
    queueSize = queueSizes.first ?? queueSize
  }

  package func start(
    _ context: DeviceBackend.Context,
    completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    NetBackend.start(self, context) { completion($0.map { $0 }) }
  }

  /// The tap, and its place in the bridge.
  package func removeTraces(_ device: DeviceTraces) {
    if case .created = attachment { TapDevice.remove(tapName) }
  }

  /// Taps that vxd made and did not remove: their names say whose they are ("vxDOMAIN.SUFFIX").
  package static func removeOrphans(where isOrphan: (UInt16) -> Bool) {
    for name in NetworkInterface.all {
      if let domain = domain(ofTap: name), isOrphan(domain) { TapDevice.remove(name) }
    }
  }

  static func domain(ofTap name: String) -> UInt16? {
    guard name.hasPrefix("vx"), let dot = name.firstIndex(of: ".") else { return nil }
    return UInt16(name[name.index(name.startIndex, offsetBy: 2)..<dot])
  }

  /// The interface whose link the guest's is: behind a tap of our own, the bridge.
  var linkName: String? {
    switch attachment {
    case .created(let bridge): bridge
    case .tap(let name), .macvtap(let name): name
    }
  }

  /// What the device offers on a tap.
  func features(segmentsUDP: Bool) -> FeatureBits {
    var features: FeatureBits = [
      .version1, .indirectDescriptors, .eventIndex, .ringReset, .netMAC, .netMTU, .netStatus, .netControlQueue,
      .netControlReceive, .netControlReceiveExtra, .netControlVLAN, .netGuestAnnounce, .netSpeedDuplex,
      .netNotificationCoalescing,
    ]
    if offloads.contains(.mergeable) { features.insert(.netMergeable) }
    if pairs > 1 { features.insert(.netQueues) }
    // Another address would be of no use to a guest that is held to its own.
    if !locksMAC { features.insert(.netControlMAC) }
    guard offloads.contains(.checksum) else { return features }
    features.formUnion([.netChecksum, .netGuestChecksum, .netControlOffloads])
    if offloads.contains(.tso) {
      features.formUnion([
        .netHostTSO4, .netHostTSO6, .netHostECN, .netGuestTSO4, .netGuestTSO6, .netGuestECN,
      ])
    }
    if offloads.contains(.ufo) { features.formUnion([.netHostUFO, .netGuestUFO]) }
    if offloads.contains(.uso), segmentsUDP { features.formUnion([.netHostUSO, .netGuestUSO4, .netGuestUSO6]) }
    return features
  }
}
