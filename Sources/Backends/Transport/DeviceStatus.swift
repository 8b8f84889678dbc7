/// The device status byte (virtio 1.2, 2.1), in the order in which a driver sets its bits:
///
///     0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK        any -> FAILED
///     the device adds NEEDS_RESET when it cannot go on; a write of 0 resets from anywhere
package struct DeviceStatus: OptionSet, Sendable {
  package let rawValue: UInt32

  package init(rawValue: UInt32) { self.rawValue = rawValue }

  package static let acknowledge = DeviceStatus(rawValue: 1)
  package static let driver = DeviceStatus(rawValue: 2)
  package static let driverOK = DeviceStatus(rawValue: 4)
  package static let featuresOK = DeviceStatus(rawValue: 8)
  package static let needsReset = DeviceStatus(rawValue: 0x40)
  package static let failed = DeviceStatus(rawValue: 0x80)

  /// The bits that a driver may set; NEEDS_RESET is the device's.
  package static let driversBits: DeviceStatus = [.acknowledge, .driver, .driverOK, .featuresOK, .failed]
}
