/// Limits of one node of the tree of limits: daemon, guest or device; nil is no limit.
package struct RateLimits: Hashable, Sendable {
  /// Requests a second.
  package var readOperations: UInt64?
  package var writeOperations: UInt64?
  /// Bytes a second.
  package var readBytes: UInt64?
  package var writeBytes: UInt64?
  /// How much of an unused rate may be caught up on, in milliseconds of it; 1 to 60 000.
  package var burstMilliseconds: UInt64 = 100
  /// Requests that are worked on at a time.
  package var inFlight: UInt64?

  package init() {}

  package var isEmpty: Bool {
    readOperations == nil && writeOperations == nil && readBytes == nil && writeBytes == nil && inFlight == nil
  }
}
