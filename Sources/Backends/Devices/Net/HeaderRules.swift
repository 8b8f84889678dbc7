import Virtqueue

/// What the headers of a guest's packets may ask for, by the features that its driver took (virtio 1.2, 5.1.6.2). Made once, asked for
/// each packet.
struct HeaderRules {
  private let allowsChecksum: Bool
  private let allowsECN: Bool
  /// A bit for each type of segmentation (`gso_type`), 0 for none included.
  private let types: UInt8

  init(_ features: FeatureBits) {
    allowsChecksum = features.contains(.netChecksum)
    allowsECN = features.contains(.netHostECN)
    var types: UInt8 = 1
    for (type, feature): (UInt8, FeatureBits) in [
      (1, .netHostTSO4), (3, .netHostUFO), (4, .netHostTSO6), (5, .netHostUSO),
    ] where features.contains(feature) { types |= 1 << type }
    self.types = types
  }

  /// Whether a header asks for what was negotiated only, and speaks of the packet that follows. What it means beyond that is checked by
  /// the kernel.
  ///
  /// - Parameter header: a copy that the guest cannot change.
  func allows(_ header: UnsafeRawPointer, frameBytes: Int) -> Bool {
    let flags = header.load(as: UInt8.self)
    if flags & 1 != 0 {  // VIRTIO_NET_HDR_F_NEEDS_CSUM
      guard allowsChecksum else { return false }
      let start = Int(UInt16(littleEndian: header.load(fromByteOffset: 6, as: UInt16.self)))
      let offset = Int(UInt16(littleEndian: header.load(fromByteOffset: 8, as: UInt16.self)))
      guard start &+ offset &+ 2 <= frameBytes else { return false }
    }
    let typeAndECN = header.load(fromByteOffset: 1, as: UInt8.self)
    let type = typeAndECN & 0x7f
    guard type < 8, types >> type & 1 == 1, typeAndECN & 0x80 == 0 || allowsECN else { return false }
    guard type != 0 else { return true }
    let segment = UInt16(littleEndian: header.load(fromByteOffset: 4, as: UInt16.self))
    return segment > 0 && flags & 1 != 0
  }
}

/// What the headers of packets to the guest may say, by the offloads that its driver has on (virtio 1.2, 5.1.6.4.1).
struct GuestHeaderRules {
  private let allowsChecksum: Bool
  private let allowsECN: Bool
  private let types: UInt8

  init(_ offloads: FeatureBits) {
    allowsChecksum = offloads.contains(.netGuestChecksum)
    allowsECN = offloads.contains(.netGuestECN)
    var types: UInt8 = 1
    for (type, feature): (UInt8, FeatureBits) in [
      (1, .netGuestTSO4), (3, .netGuestUFO), (4, .netGuestTSO6), (5, .netGuestUSO4), (5, .netGuestUSO6),
    ] where offloads.contains(feature) { types |= 1 << type }
    self.types = types
  }

  /// Leaves out of a header what is only a hint and was not negotiated. Such headers come from the host's kernel, which may say that a
  /// checksum is good whatever it was told, and from the time before the driver chose.
  ///
  /// - Returns: false when the packet cannot be the driver's without what was not negotiated.
  func adapt(_ header: UnsafeMutableRawPointer) -> Bool {
    let flags = header.load(as: UInt8.self)
    let typeAndECN = header.load(fromByteOffset: 1, as: UInt8.self)
    let type = typeAndECN & 0x7f
    guard type < 8, types >> type & 1 == 1, typeAndECN & 0x80 == 0 || allowsECN else { return false }
    if allowsChecksum {
      // VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_F_DATA_VALID; others come with features that are not offered.
      header.storeBytes(of: flags & 3, as: UInt8.self)
    } else {
      guard flags & 1 == 0 else { return false }
      header.storeBytes(of: 0, as: UInt8.self)
    }
    return true
  }
}
