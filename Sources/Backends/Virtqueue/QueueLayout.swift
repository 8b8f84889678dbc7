/// A virtqueue as the driver set it up. Untrusted until `validate` accepts it.
package struct QueueLayout: Equatable, Sendable {
  /// Entries, 1 to 32768; a power of two for a split ring.
  package var size: UInt16 = 0
  /// Guest-physical address of the descriptor area: table or packed ring, 16-byte aligned.
  package var descriptorArea: UInt64 = 0
  /// Guest-physical address of the driver area: available ring (2-byte aligned) or event suppression (4-byte aligned).
  package var driverArea: UInt64 = 0
  /// Guest-physical address of the device area: used ring or event suppression, 4-byte aligned.
  package var deviceArea: UInt64 = 0
  /// Guest address of a word for each head of a split ring, in which the device says what it has (`size` words of 32 bits); nil
  /// without one. See `Virtqueue.markTaken`.
  package var inFlightArea: UInt64?
  /// Where the device goes on taking available entries: an index of a split ring, a slot of a packed one. 0 except when a live
  /// queue is adopted.
  package var nextAvailable: UInt16 = 0
  /// Where the device goes on with used entries; 0 except when a live queue is adopted.
  package var nextUsed: UInt16 = 0
  /// Laps of a packed ring (virtio 1.2, 2.8.1): both start as 1.
  package var availableWrapCounter = true
  package var usedWrapCounter = true

  /// The largest size of a queue (virtio 1.2, 2.7 and 2.8.10.1).
  package static let maximumSize: UInt16 = 32768

  package init() {}

  /// Bytes of each part with the event fields (virtio 1.2, 2.7: 16n, 6 + 2n, 6 + 8n; 2.8.10: 4 each).
  package var descriptorBytes: Int { 16 * Int(size) }
  package var inFlightBytes: Int { 4 * Int(size) }
  package func driverBytes(packed: Bool) -> Int { packed ? 4 : 6 + 2 * Int(size) }
  package func deviceBytes(packed: Bool) -> Int { packed ? 4 : 6 + 8 * Int(size) }

  /// - Throws: `badLayout` for a size that is 0, above `maximum` or, in a split ring, no power of two; for addresses that are
  ///   unaligned or overflow; for positions of an adopted packed ring outside of it.
  package func validate(maximum: UInt16, packed: Bool = false) throws(VirtqueueFault) {
    guard size > 0, size <= maximum, size <= Self.maximumSize, packed || size & (size &- 1) == 0 else {
      throw .badLayout
    }
    guard descriptorArea & 15 == 0, driverArea & (packed ? 3 : 1) == 0, deviceArea & 3 == 0 else { throw .badLayout }
    guard !packed || nextAvailable < size && nextUsed < size else { throw .badLayout }
    if let inFlightArea {
      guard !packed, inFlightArea & 3 == 0, !inFlightArea.addingReportingOverflow(UInt64(inFlightBytes)).overflow
      else { throw .badLayout }
    }
    for (address, bytes) in [
      (descriptorArea, descriptorBytes), (driverArea, driverBytes(packed: packed)),
      (deviceArea, deviceBytes(packed: packed)),
    ] where address.addingReportingOverflow(UInt64(bytes)).overflow {
      throw .badLayout
    }
  }
}
