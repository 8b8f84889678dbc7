package import Transport

/// One guest's grants and event channels: all that an unprivileged driver domain has of it. Calls may come from any thread.
package protocol GrantHandle: AnyObject, Sendable {
  /// Maps granted pages contiguously, all or none.
  ///
  /// The error does not tell a bad reference from a host without room (both are EINVAL in Linux): `copy` does.
  func map(_ references: [UInt32], writable: Bool) throws(XenError) -> UnsafeMutableRawPointer
  func unmap(_ start: UnsafeMutableRawPointer, count: Int)
  /// Copies within one granted page; works without room for mappings.
  ///
  /// - Parameters:
  ///   - offset: within the page; `offset + count` is at most 4096.
  ///   - toGuest: whether `local` is what is copied from.
  /// - Returns: false when the guest's reference cannot be used so.
  func copy(
    _ reference: UInt32, offset: Int, count: Int, local: UnsafeMutableRawPointer, toGuest: Bool
  ) throws(XenError) -> Bool
  /// Binds a port that the guest allocated for us, with a handle of its own.
  func doorbell(remotePort: UInt32) throws(XenError) -> any QueueDoorbell
}
