/// One block backend, as the supervisor wants it. Values are checked already.
package struct BlockSettings: Equatable, Sendable {
  /// The image: a raw file or a block device.
  package var path: String
  package var readOnly: Bool
  /// Whether the guest may discard; offered only where the image can.
  package var discard: Bool
  /// Answer to GET_ID, at most 20 bytes are used.
  package var serial: String
  /// Try O_DIRECT first.
  package var direct = true
  /// Copy through the bounce buffers also where the engine could reach guest memory: for measurements.
  package var copiesAlways = false
  /// Entries of the virtqueue at most: a power of two.
  package var queueSize: UInt16 = 256
  /// Memory for data on its way between the guest and the image, in bytes.
  package var bounceBytes = 4 << 20

  package init(path: String, readOnly: Bool, discard: Bool, serial: String) {
    self.path = path
    self.readOnly = readOnly
    self.discard = discard
    self.serial = serial
  }
}
