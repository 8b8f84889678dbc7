/// Where the structures of a virtio function lie in its memory BAR (virtio 1.2, 4.1.4). One BAR of 16 KiB has them all.
enum PCILayout {
  /// Bytes of the BAR: a power of two.
  static let bytes: UInt32 = 0x4000
  /// struct virtio_pci_common_cfg, up to and with queue_reset.
  static let common = 0x0000..<0x0040
  static let isr = 0x0800..<0x0804
  static let device = 0x1000..<0x2000
  /// 16 bytes for each vector.
  static let table = 0x2000..<0x2800
  /// A bit for each vector.
  static let pending = 0x2800..<0x2810
  /// A doorbell of 4 bytes for each queue.
  static let notify = 0x3000..<0x3100
  static let notifyMultiplier: UInt32 = 4
  /// One for the configuration and one for each queue.
  static let maximumVectors = 65
  /// VIRTIO_MSI_NO_VECTOR (virtio 1.2, 4.1.5.1.2.1).
  static let noVector: UInt16 = 0xffff
}

/// Fields of the common configuration structure by their offset (virtio 1.2, 4.1.4.3).
enum PCICommon {
  static let deviceFeatureSelect = 0x00
  static let deviceFeature = 0x04
  static let driverFeatureSelect = 0x08
  static let driverFeature = 0x0c
  static let configurationVector = 0x10
  static let queueCount = 0x12
  static let status = 0x14
  static let generation = 0x15
  static let queueSelect = 0x16
  static let queueSize = 0x18
  static let queueVector = 0x1a
  static let queueEnable = 0x1c
  static let queueNotifyOffset = 0x1e
  static let queueDescriptors = 0x20
  static let queueDriver = 0x28
  static let queueDevice = 0x30
  static let queueNotifyData = 0x38
  static let queueReset = 0x3a
}
