import Glibc

/// What became of a request for memory behind a mapping.
package enum Population {
  case done
  /// The kernel does not know the request (before Linux 5.14).
  case unknown
  /// There is no memory, or no room in the file system: a store would end the process.
  case refused
}

/// Asks for memory behind a mapping of this process, so that stores find it there.
///
/// - Parameter start: of a page; all of the pages up to `start + bytes` are mapped.
package func populate(_ start: UnsafeMutableRawPointer, _ bytes: Int) -> Population {
  // linux: include/uapi/asm-generic/mman-common.h, MADV_POPULATE_WRITE.
  if madvise(start, bytes, 23) == 0 { return .done }
  return errno == EINVAL ? .unknown : .refused
}
