/// Where a device sits in its guest, as its saved state says: a case for each kind of transport whose devices outlive the daemon.
package enum DevicePlace: Equatable, Sendable {
  /// Registers at `base`: in a slot of this number, or, with a shared peripheral interrupt (Arm), where the guest's device tree has them.
  case mmio(base: UInt64, index: Int, sharedInterrupt: UInt32)
  /// A function of the PCI device with this number, from 0 to 31.
  case pci(device: UInt8)
  /// No place at all: the guest finds the device by its frontend.
  case xenbus
}
