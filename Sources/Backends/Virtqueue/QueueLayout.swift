/// A virtqueue as the driver set it up. Untrusted until `validate` accepts it.
package struct QueueLayout: Equatable, Sendable {
  /// Entries; a power of two for a split ring, at most 32768.
  package var size: UInt16 = 0
  /// Guest-physical address of the descriptor area, 16-byte aligned.
  package var descriptorArea: UInt64 = 0
  /// Guest-physical address of the driver area (available ring), 2-byte aligned.
  package var driverArea: UInt64 = 0
  /// Guest-physical address of the device area (used ring), 4-byte aligned.
  package var deviceArea: UInt64 = 0
  /// Where the device goes on taking available entries; 0 except when a live queue is adopted.
  package var nextAvailable: UInt16 = 0
  /// The used index; 0 except when a live queue is adopted.
  package var nextUsed: UInt16 = 0

  package init() {}

  /// Bytes of each part with the event index field (virtio 1.2, 2.7: 16n, 6 + 2n, 6 + 8n).
  package var descriptorBytes: Int { 16 * Int(size) }
  package var driverBytes: Int { 6 + 2 * Int(size) }
  package var deviceBytes: Int { 6 + 8 * Int(size) }

  /// - Throws: `badLayout` for a size that is 0, no power of two or above `maximum`, and for addresses that are unaligned or
  ///   overflow.
  package func validate(maximum: UInt16) throws(VirtqueueFault) {
    guard size > 0, size <= maximum, size & (size &- 1) == 0 else { throw .badLayout }
    guard descriptorArea & 15 == 0, driverArea & 1 == 0, deviceArea & 3 == 0 else { throw .badLayout }
    for (address, bytes) in [
      (descriptorArea, descriptorBytes), (driverArea, driverBytes), (deviceArea, deviceBytes),
    ] where address.addingReportingOverflow(UInt64(bytes)).overflow {
      throw .badLayout
    }
  }
}
