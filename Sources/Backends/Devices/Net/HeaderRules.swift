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
