/// The PCI configuration space of a virtio function, as a value (PCI Local Bus Specification 3.0, chapter 6 and 6.8.2; virtio 1.2,
/// 4.1.2 and 4.1.4). It is read and written with any width at any offset; what is read-only stays as it is.
package struct PCIFunction: Equatable, Sendable {
  /// Bytes of the space: no more can be reached by the ports 0xcf8 and 0xcfc.
  package static let bytes = 256

  /// What VIRTIO_PCI_CAP_PCI_CFG asks for: an access to the BAR by way of the configuration space (virtio 1.2, 4.1.4.9). Firmware
  /// uses it where it cannot reach the BAR.
  struct Window: Equatable, Sendable {
    var bar: UInt8 = 0
    var offset: UInt32 = 0
    var length: UInt32 = 0
    var data: UInt32 = 0

    /// Where in the BAR, and how wide; nil for an access that the specification does not have.
    var access: (offset: Int, width: Int)? {
      guard bar == 0, length == 1 || length == 2 || length == 4, offset & (length - 1) == 0,
        offset <= PCILayout.bytes - length
      else { return nil }
      return (Int(offset), Int(length))
    }
  }

  private enum Command {
    static let memory: UInt32 = 1 << 1
    static let master: UInt32 = 1 << 2
    static let intxDisable: UInt32 = 1 << 10
    static let writable = memory | master | intxDisable
  }

  private enum Place {
    static let command = 1
    static let bar = 4
    static let interrupt = 15
    static let msixControl = 0x40 / 4
    static let window = 0x94 / 4
    static let windowData = window + 4
  }

  /// The words that never change, with 0 where the driver may write.
  private let fixed: [UInt32]
  private var command: UInt32 = 0
  private(set) var base: UInt32 = 0
  /// Written by firmware for the operating system: which line of the interrupt controller the pin leads to. Nothing here looks at it.
  private var interruptLine: UInt32 = 0
  /// Bits 15 (enable) and 14 (function mask) of the MSI-X message control word.
  private var msix: UInt32 = 0
  var window = Window()

  /// - Parameters:
  ///   - deviceID: the virtio device number.
  ///   - vectors: MSI-X vectors, from 1 to 65.
  init(deviceID: UInt32, vectors: Int) {
    fixed = Self.words(deviceID: deviceID, vectors: min(max(vectors, 1), PCILayout.maximumVectors))
  }

  // MARK: What it means

  /// The addresses that the BAR claims; nil while memory accesses are not decoded.
  package var memory: ClosedRange<UInt64>? {
    guard command & Command.memory != 0 else { return nil }
    return UInt64(base)...UInt64(base) + UInt64(PCILayout.bytes) - 1
  }

  var isMSIXEnabled: Bool { msix & 0x8000 != 0 }
  var isMSIXMasked: Bool { msix & 0x4000 != 0 }
  /// Whether the function may reach memory by itself: queues, and interrupts as messages.
  var isMaster: Bool { command & Command.master != 0 }
  var isINTxDisabled: Bool { command & Command.intxDisable != 0 }

  /// Whether an access touches the data of `window`.
  static func touchesWindow(_ offset: Int, _ width: Int) -> Bool {
    offset < 4 * Place.windowData + 4 && offset + width > 4 * Place.windowData
  }

  // MARK: Accesses

  /// - Parameter isPending: whether INTx would be asserted, if it is not disabled.
  func read(_ offset: Int, _ width: Int, isPending: Bool) -> UInt64 {
    PCIWords.read(offset, width) { word($0, isPending) }
  }

  private func word(_ index: Int, _ isPending: Bool) -> UInt32 {
    // Behind the space there is nothing.
    guard fixed.indices.contains(index) else { return .max }
    let changeable: UInt32 =
      switch index {
      case Place.command: command | (isPending ? 1 << 19 : 0)
      case Place.bar: base
      case Place.interrupt: interruptLine
      case Place.msixControl: msix << 16
      case Place.window + 1: UInt32(window.bar)
      case Place.window + 2: window.offset
      case Place.window + 3: window.length
      case Place.windowData: window.data
      default: 0
      }
    return fixed[index] | changeable
  }

  mutating func write(_ offset: Int, _ width: Int, _ value: UInt64) {
    PCIWords.write(offset, width, value) { write(word: $0, $1, $2) }
  }

  private mutating func write(word index: Int, _ value: UInt32, _ mask: UInt32) {
    switch index {
    case Place.command: command = command.replaced(by: value, mask & Command.writable)
    // Bits below the size read 0: that is how it is found out.
    case Place.bar: base = base.replaced(by: value, mask & ~(PCILayout.bytes - 1))
    case Place.interrupt: interruptLine = interruptLine.replaced(by: value, mask & 0xff)
    case Place.msixControl: msix = msix.replaced(by: value >> 16, mask >> 16 & 0xc000)
    case Place.window + 1: window.bar = UInt8(UInt32(window.bar).replaced(by: value, mask & 0xff))
    case Place.window + 2: window.offset = window.offset.replaced(by: value, mask)
    case Place.window + 3: window.length = window.length.replaced(by: value, mask)
    case Place.windowData: window.data = window.data.replaced(by: value, mask)
    default: break
    }
  }

  // MARK: What never changes

  /// Class codes as QEMU gives them, which drivers and firmware know. None is one that hvmloader treats apart (0x0300, 0x0680, 0x0101).
  private static func classCode(_ deviceID: UInt32) -> UInt32 {
    switch deviceID {
    case 1: 0x02_0000  // Ethernet
    case 2: 0x01_0000  // SCSI storage
    case 3: 0x07_8000  // communication, other
    default: 0x00_ff00
    }
  }

  private static func words(deviceID: UInt32, vectors: Int) -> [UInt32] {
    var words = [UInt32](repeating: 0, count: bytes / 4)
    words[0] = 0x1af4 | (0x1040 + deviceID) << 16
    words[1] = 0x0010 << 16  // there are capabilities
    words[2] = classCode(deviceID) << 8 | 1  // revision 1: not transitional
    words[11] = 0x1af4 | 0x1100 << 16  // as QEMU: drivers for Windows look at it
    words[13] = 0x40
    words[Place.interrupt] = 1 << 8  // INTA
    // MSI-X: control, then offset and BAR of the table and of the pending bits.
    words[Place.msixControl] = 0x11 | 0x50 << 8 | UInt32(vectors - 1) << 16
    words[Place.msixControl + 1] = UInt32(PCILayout.table.lowerBound)
    words[Place.msixControl + 2] = UInt32(PCILayout.pending.lowerBound)
    func add(_ place: Int, next: UInt32, type: UInt32, length: UInt32 = 16, _ range: Range<Int>) {
      words[place / 4] = 0x09 | next << 8 | length << 16 | type << 24
      words[place / 4 + 2] = UInt32(range.lowerBound)
      words[place / 4 + 3] = UInt32(range.count)
    }
    add(0x50, next: 0x60, type: 1, PCILayout.common)
    add(0x60, next: 0x70, type: 3, PCILayout.isr)
    add(0x70, next: 0x80, type: 4, PCILayout.device)
    add(0x80, next: 0x94, type: 2, length: 20, PCILayout.notify)
    words[0x90 / 4] = PCILayout.notifyMultiplier
    add(0x94, next: 0, type: 5, length: 20, 0..<0)
    return words
  }

  // MARK: Saving

  /// What of it changes, as it is kept for a later process.
  var saved: [UInt32] {
    [command, base, interruptLine, msix, UInt32(window.bar), window.offset, window.length, window.data]
  }

  mutating func restore(_ words: [UInt32]) {
    for (place, value) in zip(
      [
        Place.command, Place.bar, Place.interrupt, Place.msixControl, Place.window + 1, Place.window + 2,
        Place.window + 3, Place.windowData,
      ], words)
    {
      // Through the masks: what an access could not have made is not restored either.
      write(word: place, place == Place.msixControl ? value << 16 : value, .max)
    }
  }
}
