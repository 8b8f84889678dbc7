/// Where the device sits in its guest.
package struct DevicePlace: Equatable, Sendable {
  package var base: UInt64
  package var index: Int
  /// Number of the shared peripheral interrupt; 0 on x86.
  package var sharedInterrupt: UInt32
  /// No place at all: the device is reached over Xenbus.
  package var isXenbus: Bool
  /// The device's number on the PCI bus; nil for one that is elsewhere.
  package var pciDevice: UInt8?

  package static let xenbus = DevicePlace(base: 0, index: 0, sharedInterrupt: 0, isXenbus: true)

  /// A function of a PCI device.
  package init(pciDevice: UInt8) {
    self.init(base: 0, index: 0, sharedInterrupt: 0)
    self.pciDevice = pciDevice
  }

  package init(base: UInt64, index: Int, sharedInterrupt: UInt32, isXenbus: Bool = false) {
    self.isXenbus = isXenbus
    self.base = base
    self.index = index
    self.sharedInterrupt = sharedInterrupt
  }
}
