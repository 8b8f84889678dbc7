package import Devices
package import Engines
package import Lifecycle
package import Virtqueue

/// Options of a network device.
package struct NetSettings: DeviceSettings {
  package var restart = RestartPolicy()
  package var limits = RateLimits()
  package var offered: FeatureBits?
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

  mutating func keep(queueSizes: [UInt16]) {
    pairs = max(1, (queueSizes.count - 1) / 2)
    queueSize = queueSizes.first ?? queueSize
  }

  /// What the device offers on a tap.
  func features(segmentsUDP: Bool) -> FeatureBits {
    var features: FeatureBits = [
      .version1, .indirectDescriptors, .eventIndex, .ringReset, .netMAC, .netMTU, .netStatus, .netControlQueue,
      .netControlReceive, .netControlReceiveExtra, .netControlVLAN, .netGuestAnnounce,
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
