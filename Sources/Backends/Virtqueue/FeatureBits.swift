/// The 64-bit feature set (virtio 1.2, 2.2). Device bits are those of the device's type.
package struct FeatureBits: OptionSet, Sendable {
  package let rawValue: UInt64

  package init(rawValue: UInt64) { self.rawValue = rawValue }

  package static let indirectDescriptors = FeatureBits(rawValue: 1 << 28)  // VIRTIO_F_INDIRECT_DESC
  package static let eventIndex = FeatureBits(rawValue: 1 << 29)  // VIRTIO_F_EVENT_IDX
  package static let version1 = FeatureBits(rawValue: 1 << 32)  // VIRTIO_F_VERSION_1
  package static let accessPlatform = FeatureBits(rawValue: 1 << 33)  // VIRTIO_F_ACCESS_PLATFORM
  package static let ringPacked = FeatureBits(rawValue: 1 << 34)  // VIRTIO_F_RING_PACKED
  package static let inOrder = FeatureBits(rawValue: 1 << 35)  // VIRTIO_F_IN_ORDER
  package static let ringReset = FeatureBits(rawValue: 1 << 40)  // VIRTIO_F_RING_RESET
}
