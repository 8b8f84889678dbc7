package import Virtqueue

/// Feature bits of a network device (virtio 1.2, 5.1.3).
extension FeatureBits {
  package static let netChecksum = FeatureBits(rawValue: 1 << 0)  // VIRTIO_NET_F_CSUM
  package static let netGuestChecksum = FeatureBits(rawValue: 1 << 1)  // VIRTIO_NET_F_GUEST_CSUM
  package static let netControlOffloads = FeatureBits(rawValue: 1 << 2)  // VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
  package static let netMTU = FeatureBits(rawValue: 1 << 3)  // VIRTIO_NET_F_MTU
  package static let netMAC = FeatureBits(rawValue: 1 << 5)  // VIRTIO_NET_F_MAC
  package static let netGuestTSO4 = FeatureBits(rawValue: 1 << 7)
  package static let netGuestTSO6 = FeatureBits(rawValue: 1 << 8)
  package static let netGuestECN = FeatureBits(rawValue: 1 << 9)
  package static let netGuestUFO = FeatureBits(rawValue: 1 << 10)
  package static let netHostTSO4 = FeatureBits(rawValue: 1 << 11)
  package static let netHostTSO6 = FeatureBits(rawValue: 1 << 12)
  package static let netHostECN = FeatureBits(rawValue: 1 << 13)
  package static let netHostUFO = FeatureBits(rawValue: 1 << 14)
  package static let netMergeable = FeatureBits(rawValue: 1 << 15)  // VIRTIO_NET_F_MRG_RXBUF
  package static let netStatus = FeatureBits(rawValue: 1 << 16)  // VIRTIO_NET_F_STATUS
  package static let netControlQueue = FeatureBits(rawValue: 1 << 17)  // VIRTIO_NET_F_CTRL_VQ
  package static let netControlReceive = FeatureBits(rawValue: 1 << 18)  // VIRTIO_NET_F_CTRL_RX
  package static let netControlVLAN = FeatureBits(rawValue: 1 << 19)  // VIRTIO_NET_F_CTRL_VLAN
  package static let netControlReceiveExtra = FeatureBits(rawValue: 1 << 20)  // VIRTIO_NET_F_CTRL_RX_EXTRA
  package static let netGuestAnnounce = FeatureBits(rawValue: 1 << 21)  // VIRTIO_NET_F_GUEST_ANNOUNCE
  package static let netQueues = FeatureBits(rawValue: 1 << 22)  // VIRTIO_NET_F_MQ
  package static let netControlMAC = FeatureBits(rawValue: 1 << 23)  // VIRTIO_NET_F_CTRL_MAC_ADDR
  package static let netNotificationCoalescing = FeatureBits(rawValue: 1 << 53)  // VIRTIO_NET_F_NOTF_COAL
  package static let netGuestUSO4 = FeatureBits(rawValue: 1 << 54)
  package static let netGuestUSO6 = FeatureBits(rawValue: 1 << 55)
  package static let netHostUSO = FeatureBits(rawValue: 1 << 56)
  package static let netSpeedDuplex = FeatureBits(rawValue: 1 << 63)  // VIRTIO_NET_F_SPEED_DUPLEX

  /// Packets that are larger than the wire's may come to the guest.
  package static let netGuestLarge: FeatureBits = [
    .netGuestTSO4, .netGuestTSO6, .netGuestECN, .netGuestUFO, .netGuestUSO4, .netGuestUSO6,
  ]
  /// What VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET may name (virtio 1.2, 5.1.6.5.6.1).
  package static let netGuestOffloads: FeatureBits = netGuestLarge.union(.netGuestChecksum)
}

/// The header before each packet (virtio 1.2, 5.1.6), and the configuration space (5.1.4).
package enum NetConfiguration {
  package static let deviceID: UInt32 = 1
  /// Bytes of `virtio_net_hdr_v1`.
  package static let headerBytes = 12
  /// Where `num_buffers` is in it.
  static let bufferCountOffset = 10
  /// Ethernet's header, with a VLAN's tag.
  static let linkBytes = 18
  /// The largest packet that segmentation offload makes.
  static let largeBytes = 65550

  package static let statusLinkUp: UInt16 = 1
  package static let statusAnnounce: UInt16 = 2
  private static let statusOffset = 6

  /// - Parameter isLarge: whether packets that are to be segmented may come.
  static func receiveBytes(mtu: Int, isLarge: Bool) -> Int {
    headerBytes + max(isLarge ? largeBytes : 0, mtu + linkBytes)
  }

  /// What `speed` and `duplex` are where the host does not know.
  private static let unknownSpeed: UInt32 = 0xffff_ffff
  private static let unknownDuplex: UInt8 = 0xff
  private static let fullDuplex: UInt8 = 1

  /// - Parameter speed: of the link in Mbit/s, up to 2^31 - 1, full duplex; nil when it is not known.
  package static func bytes(mac: MACAddress, status: UInt16, pairs: Int, mtu: UInt16, speed: UInt32?) -> [UInt8] {
    var bytes = mac.bytes
    for value in [status, UInt16(clamping: pairs), mtu] {
      bytes.append(UInt8(truncatingIfNeeded: value))
      bytes.append(UInt8(truncatingIfNeeded: value >> 8))
    }
    for shift in stride(from: UInt32(0), to: 32, by: 8) {
      bytes.append(UInt8(truncatingIfNeeded: (speed ?? unknownSpeed) >> shift))
    }
    // Up to a whole word, by which drivers read.
    return bytes + [speed == nil ? unknownDuplex : fullDuplex, 0, 0, 0]
  }

  package static func set(status: UInt16, in bytes: inout [UInt8]) {
    bytes[statusOffset] = UInt8(truncatingIfNeeded: status)
    bytes[statusOffset + 1] = UInt8(truncatingIfNeeded: status >> 8)
  }

  package static func status(_ bytes: [UInt8]) -> UInt16 {
    UInt16(bytes[statusOffset]) | UInt16(bytes[statusOffset + 1]) << 8
  }

  /// Whether a driver's choice hangs together (virtio 1.2, 5.1.3.1).
  package static func accepts(_ features: FeatureBits) -> Bool {
    func needs(_ some: FeatureBits, _ required: FeatureBits) -> Bool {
      features.isDisjoint(with: some) || features.contains(required)
    }
    return needs(.netGuestLarge, .netGuestChecksum)
      && needs([.netHostTSO4, .netHostTSO6, .netHostECN, .netHostUFO, .netHostUSO], .netChecksum)
      && needs(
        [
          .netControlReceive, .netControlVLAN, .netControlReceiveExtra, .netGuestAnnounce, .netQueues, .netControlMAC,
          .netControlOffloads, .netNotificationCoalescing,
        ], .netControlQueue)
      && (!features.contains(.netGuestECN) || !features.isDisjoint(with: [.netGuestTSO4, .netGuestTSO6]))
      && (!features.contains(.netHostECN) || !features.isDisjoint(with: [.netHostTSO4, .netHostTSO6]))
  }
}

/// A hardware address.
package struct MACAddress: Equatable, Hashable, Sendable {
  /// The first byte is the highest of 48 bits.
  package var value: UInt64

  package init(value: UInt64) { self.value = value & 0xffff_ffff_ffff }

  /// Six pairs of hexadecimal digits with colons between.
  package init?(_ text: String) {
    let parts = text.split(separator: ":", omittingEmptySubsequences: false)
    guard parts.count == 6 else { return nil }
    var value: UInt64 = 0
    for part in parts {
      guard part.utf8.count == 2, part.utf8.first != UInt8(ascii: "+"), part.utf8.first != UInt8(ascii: "-"),
        let byte = UInt8(part, radix: 16)
      else { return nil }
      value = value << 8 | UInt64(byte)
    }
    self.value = value
  }

  package var bytes: [UInt8] { (0..<6).map { UInt8(truncatingIfNeeded: value >> UInt64(40 - 8 * $0)) } }
  package var isGroup: Bool { value >> 40 & 1 == 1 }

  package var text: String {
    bytes.map { byte in
      let digits = String(byte, radix: 16)
      return digits.utf8.count == 1 ? "0" + digits : digits
    }.joined(separator: ":")
  }
}
