package import EventLoop

/// A domain's number. Numbers wrap at 0x7FF0 and come again: a lower one is no older guest.
package typealias DomainID = UInt16

/// A call to Xen that failed.
package struct XenError: Error, CustomStringConvertible {
  /// The library call.
  package let operation: String
  package let errno: Errno

  package init(_ operation: String, _ errno: Errno) {
    self.operation = operation
    self.errno = errno
  }

  package var description: String { "\(operation): \(errno)" }
}
