import Glibc

/// A failure that the kernel reports.
package struct Errno: Error, Equatable, CustomStringConvertible {
  package let code: Int32

  package init(_ code: Int32) { self.code = code }

  /// What the calling thread's last failed call left.
  package static var last: Errno { Errno(errno) }

  /// The kernel's words for it, as `strerror` gives them.
  package var description: String {
    var buffer = [CChar](repeating: 0, count: 128)
    _ = strerror_r(code, &buffer, buffer.count) as Int32
    return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}

/// Repeats a system call that a signal interrupted; -1 becomes the errno.
package func retrying<Result: SignedInteger>(_ call: () -> Result) throws(Errno) -> Result {
  while true {
    let result = call()
    if result != -1 { return result }
    if errno != EINTR { throw Errno.last }
  }
}
