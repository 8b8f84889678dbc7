/// Where one virtio-mmio device sits in its guest: a register window and an interrupt.
package struct DeviceSlot: Equatable, Sendable {
  /// How the interrupt is asserted.
  package enum Interrupt: Equatable, Sendable {
    /// x86: pin of a PCI slot, see `SlotTable.interrupt`.
    case pciIntx(device: UInt8, pin: UInt8)
    /// Arm: number of a shared peripheral interrupt, as libxl allocated it.
    case spi(UInt32)
  }

  /// In the table of an HVM guest's slots; nil where the toolstack chose the place.
  package var index: Int?
  package var base: UInt64
  package var interrupt: Interrupt

  package init(index: Int?, base: UInt64, interrupt: Interrupt) {
    self.index = index
    self.base = base
    self.interrupt = interrupt
  }
}

/// The fixed slots of an x86 HVM guest (libxl allocates none there). The guest learns of them by the SSDT in deploy/acpi.
///
/// Windows lie in the free area below the IOAPIC (xen: hvmloader's map), a page apart. Interrupts are GSIs of the vIOAPIC,
/// asserted as INTx pins of PCI slots 24 to 31: each (slot, pin) there leads to a GSI of its own,
/// 16 + ((4 * slot + slot / 8 + pin) mod 32) (xen: hvm_pci_intx_gsi), and QEMU, which fills slots from below, has no device
/// in them. The first GSIs of the list are those that no INTA of a low slot uses.
package enum SlotTable {
  package static let defaultCount = 8
  package static let maximumCount = 32
  package static let firstBase: UInt64 = 0xfeb0_0000
  package static let windowStride: UInt64 = 0x1000

  /// Addresses of the first `count` windows, with what lies between them; nil where guests have no such slots.
  package static func row(count: Int) -> ClosedRange<UInt64>? {
    #if arch(x86_64)
      firstBase...firstBase + windowStride * UInt64(count) - 1
    #else
      nil
    #endif
  }

  /// Global system interrupt of a slot.
  package static func gsi(slot: Int) -> Int {
    // 47, 43, 39, ... (no 23: the UHCI controller's), then those one lower, and so on.
    var order: [Int] = []
    for remainder in [3, 2, 1, 0] {
      for gsi in stride(from: 44 + remainder, through: 16, by: -4) where gsi != 23 { order.append(gsi) }
    }
    order.append(23)
    return order[slot]
  }

  /// The PCI slot and pin whose level is the GSI's.
  package static func interrupt(gsi: Int) -> DeviceSlot.Interrupt {
    let step = (gsi - 16 - 3 + 32) % 32
    return .pciIntx(device: UInt8(24 + step / 4), pin: UInt8(step % 4))
  }

  /// Slot `index`, below `maximumCount`.
  package static func slot(_ index: Int) -> DeviceSlot {
    DeviceSlot(
      index: index, base: firstBase + windowStride * UInt64(index), interrupt: interrupt(gsi: gsi(slot: index)))
  }
}
