/// Where an interrupt is sent and what is written there.
package struct MSIMessage: Hashable, Sendable {
  /// Passed on as it is: Xen reads more from it than an APIC would (event channels of drivers that run on Xen).
  package var address: UInt64
  package var data: UInt32

  package init(address: UInt64, data: UInt32) {
    self.address = address
    self.data = data
  }

  /// Whether it stands for an event channel of a driver that runs on Xen: vector 0, and the number of a pirq in place of a processor's
  /// (xen: arch/x86/hvm/irq.c, hvm_inject_msi). Such a vector is masked by its event channel and not by its table entry, whose mask
  /// bit the driver leaves as it was (Linux: arch/x86/pci/xen.c, pci_msi_ignore_mask; so does QEMU, hw/pci/msix.c).
  var isEventChannel: Bool { data & 0xff == 0 && (address >> 32 & 0xffff_ff00 | address >> 12 & 0xff) != 0 }
}

/// An MSI-X table as the driver writes it, as a value (PCI Local Bus Specification 3.0, 6.8.2.6 to 6.8.2.9).
struct MSIXTable: Equatable, Sendable {
  struct Entry: Equatable, Sendable {
    var message = MSIMessage(address: 0, data: 0)
    /// The mask bit: set until the driver says otherwise.
    var isMasked = true

    /// Whether messages have to wait.
    var holdsBack: Bool { isMasked && !message.isEventChannel }
  }

  static let entryBytes = 16
  private(set) var entries: [Entry]

  init(count: Int) { entries = Array(repeating: Entry(), count: count) }

  /// Reads with any width; behind the last entry there are zeros.
  func read(_ offset: Int, _ width: Int) -> UInt64 { PCIWords.read(offset, width) { word($0) } }

  func word(_ index: Int) -> UInt32 {
    guard entries.indices.contains(index >> 2) else { return 0 }
    let entry = entries[index >> 2]
    switch index & 3 {
    case 0: return UInt32(truncatingIfNeeded: entry.message.address)
    case 1: return UInt32(truncatingIfNeeded: entry.message.address >> 32)
    case 2: return entry.message.data
    default: return entry.isMasked ? 1 : 0
    }
  }

  /// Aligned writes of 4 or 8 bytes, the only ones that drivers may make (6.8.2); others are dropped.
  ///
  /// - Returns: the entry that was written, if there is one.
  mutating func write(_ offset: Int, _ width: Int, _ value: UInt64) -> Int? {
    guard width == 4 || width == 8, offset & (width - 1) == 0, entries.indices.contains(offset / Self.entryBytes)
    else { return nil }
    set(word: offset >> 2, UInt32(truncatingIfNeeded: value))
    if width == 8 { set(word: offset >> 2 | 1, UInt32(truncatingIfNeeded: value >> 32)) }
    return offset / Self.entryBytes
  }

  mutating func set(word index: Int, _ value: UInt32) {
    guard entries.indices.contains(index >> 2) else { return }
    let address = entries[index >> 2].message.address
    switch index & 3 {
    // The low two bits are reserved and read 0.
    case 0: entries[index >> 2].message.address = address & ~0xffff_ffff | UInt64(value & ~3)
    case 1: entries[index >> 2].message.address = address & 0xffff_ffff | UInt64(value) << 32
    case 2: entries[index >> 2].message.data = value
    default: entries[index >> 2].isMasked = value & 1 != 0
    }
  }
}
