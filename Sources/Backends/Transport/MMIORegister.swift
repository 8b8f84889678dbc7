/// Registers of virtio-mmio, version 2, by offset in the window (virtio 1.2, 4.2.2, table 4.1).
enum MMIORegister {
  static let magicValue: UInt64 = 0x000
  static let version: UInt64 = 0x004
  static let deviceID: UInt64 = 0x008
  static let vendorID: UInt64 = 0x00c
  static let deviceFeatures: UInt64 = 0x010
  static let deviceFeaturesSelect: UInt64 = 0x014
  static let driverFeatures: UInt64 = 0x020
  static let driverFeaturesSelect: UInt64 = 0x024
  static let queueSelect: UInt64 = 0x030
  static let queueSizeMaximum: UInt64 = 0x034
  static let queueSize: UInt64 = 0x038
  static let queueReady: UInt64 = 0x044
  static let queueNotify: UInt64 = 0x050
  static let interruptStatus: UInt64 = 0x060
  static let interruptAcknowledge: UInt64 = 0x064
  static let status: UInt64 = 0x070
  static let descriptorLow: UInt64 = 0x080
  static let descriptorHigh: UInt64 = 0x084
  static let driverLow: UInt64 = 0x090
  static let driverHigh: UInt64 = 0x094
  static let deviceLow: UInt64 = 0x0a0
  static let deviceHigh: UInt64 = 0x0a4
  static let sharedMemorySelect: UInt64 = 0x0ac
  static let sharedMemoryFirst: UInt64 = 0x0b0
  static let sharedMemoryLast: UInt64 = 0x0bc
  static let queueReset: UInt64 = 0x0c0
  static let configurationGeneration: UInt64 = 0x0fc
  static let configuration: UInt64 = 0x100

  /// "virt"
  static let magic: UInt64 = 0x7472_6976
  /// "VXD1": no registered vendor; drivers ignore it.
  static let vendor: UInt64 = 0x3144_5856
}
