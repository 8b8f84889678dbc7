import Glibc

/// What became of a request for memory behind a mapping.
package enum Population {
  case done
  /// The kernel does not know the request (before Linux 5.14).
  case unknown
  /// There is no memory, or no room in the file system: a store would end the process.
  case refused
}

/// Asks for memory behind a mapping of this process, so that stores find it there: in all pages that hold a part of the range.
package func populate(_ start: UnsafeMutableRawPointer, _ bytes: Int) -> Population {
  let page = UInt(sysconf(Int32(_SC_PAGESIZE)))
  let inPage = Int(UInt(bitPattern: start) & (page - 1))
  // linux: include/uapi/asm-generic/mman-common.h, MADV_POPULATE_WRITE. It rounds the length up by itself.
  if madvise(start - inPage, bytes + inPage, 23) == 0 { return .done }
  return errno == EINVAL ? .unknown : .refused
}
