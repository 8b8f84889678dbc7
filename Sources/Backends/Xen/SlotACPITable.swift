/// The SSDT of the virtio-mmio slots, compiled: the same bytes as iasl makes of deploy/acpi/slots.asl for eight slots.
///
/// ACPI 6.4, 5.2.6 (header), 20.2 (AML), 6.4.3 (resource descriptors).
package enum SlotACPITable {
  /// - Parameter slots: 1 to `SlotTable.maximumCount`.
  package static func compiled(slots: Int) -> [UInt8] {
    var devices: [UInt8] = []
    for index in 0..<slots { devices += device(index) }
    let scope = [0x10] + package(name("\\_SB_") + devices)  // ScopeOp
    var table = header(length: 36 + scope.count) + scope
    table[9] = UInt8(truncatingIfNeeded: 256 - table.reduce(0) { ($0 + Int($1)) & 0xff })
    return table
  }

  private static func header(length: Int) -> [UInt8] {
    Array("SSDT".utf8) + bytes(UInt32(length)) + [2, 0] + padded("VXD", 6) + padded("VXDSLOTS", 8) + bytes(UInt32(1))
      + Array("INTL".utf8) + bytes(UInt32(0x2020_0925))
  }

  private static func device(_ index: Int) -> [UInt8] {
    let slot = SlotTable.slot(index)
    let digits = String(index, radix: 16, uppercase: true)
    let body =
      name("VX" + (index < 16 ? "0" : "") + digits)
      + [0x08] + name("_HID") + [0x0d] + Array("LNRO0005".utf8) + [0]
      + [0x08] + name("_UID") + integer(index)
      + [0x08] + name("_CRS") + buffer(resources(base: UInt32(slot.base), gsi: SlotTable.gsi(slot: index)))
    return [0x5b, 0x82] + package(body)  // DeviceOp
  }

  private static func resources(base: UInt32, gsi: Int) -> [UInt8] {
    // Memory32Fixed(ReadWrite), then Interrupt(Consumer, Level, ActiveLow, Shared), then the end tag.
    [0x86, 9, 0, 1] + bytes(base) + bytes(UInt32(0x200)) + [0x89, 6, 0, 0x0d, 1] + bytes(UInt32(gsi)) + [0x79, 0]
  }

  private static func buffer(_ contents: [UInt8]) -> [UInt8] {
    [0x11] + package(integer(contents.count) + contents)  // BufferOp
  }

  private static func integer(_ value: Int) -> [UInt8] {
    switch value {
    case 0: [0x00]  // ZeroOp
    case 1: [0x01]  // OneOp
    default: [0x0a, UInt8(value)]  // BytePrefix
    }
  }

  /// A name segment; a leading backslash is the root.
  private static func name(_ text: String) -> [UInt8] { Array(text.utf8) }

  /// PkgLength and what it covers (ACPI 6.4, 20.2.4): it counts its own bytes too.
  private static func package(_ contents: [UInt8]) -> [UInt8] {
    if contents.count + 1 < 64 { return [UInt8(contents.count + 1)] + contents }
    if contents.count + 2 < 1 << 12 {
      let length = contents.count + 2
      return [0x40 | UInt8(length & 0x0f), UInt8(length >> 4)] + contents
    }
    let length = contents.count + 3
    return [0x80 | UInt8(length & 0x0f), UInt8(length >> 4 & 0xff), UInt8(length >> 12)] + contents
  }

  private static func bytes(_ value: UInt32) -> [UInt8] {
    (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(8 * $0)) }
  }

  private static func padded(_ text: String, _ count: Int) -> [UInt8] {
    Array(text.utf8) + [UInt8](repeating: 0, count: count - text.utf8.count)
  }
}
