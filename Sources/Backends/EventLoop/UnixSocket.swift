package import Glibc

/// Unix stream sockets by path.
package enum UnixSocket {
  private static func address(_ path: String) throws(Errno) -> sockaddr_un {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(path.utf8)
    guard bytes.count < MemoryLayout.size(ofValue: address.sun_path) else { throw Errno(ENAMETOOLONG) }
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
    return address
  }

  /// Calls `body`, which answers as `bind` and `connect` do, with the address of a path.
  package static func withAddress(
    _ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
  ) throws(Errno) {
    var address = try address(path)
    let result = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
    }
    guard result == 0 else { throw Errno.last }
  }

  /// A stream socket without a name.
  package static func make(nonBlocking: Bool = false) throws(Errno) -> Int32 {
    let raw = socket(
      AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | (nonBlocking ? SOCK_NONBLOCK.rawValue : 0)), 0)
    guard raw >= 0 else { throw Errno.last }
    return raw
  }

  /// A connection: waited for, unless it is non-blocking, which a listener whose queue is full refuses.
  ///
  /// - Parameter timeoutMilliseconds: after which what waits for the peer, here and in later sends, ends with EAGAIN; nil for never.
  package static func connect(
    _ path: String, nonBlocking: Bool = false, timeoutMilliseconds: Int32? = nil
  ) throws(Errno) -> Int32 {
    let raw = try make(nonBlocking: nonBlocking)
    do throws(Errno) {
      if let timeoutMilliseconds {
        // 0 would be no limit.
        let limit = Int(max(timeoutMilliseconds, 1))
        var time = timeval(tv_sec: limit / 1000, tv_usec: limit % 1000 * 1000)
        guard setsockopt(raw, SOL_SOCKET, SO_SNDTIMEO, &time, socklen_t(MemoryLayout<timeval>.size)) == 0 else {
          throw Errno.last
        }
      }
      try withAddress(path) { Glibc.connect(raw, $0, $1) }
    } catch {
      close(raw)
      throw error
    }
    return raw
  }

  /// Removes a file that an earlier daemon left, of a type that it can have left: anything else at that place is somebody's.
  ///
  /// - Throws: EADDRINUSE for another type.
  package static func removeLeft(_ path: String, type: mode_t = S_IFSOCK) throws(Errno) {
    var status = stat()
    guard lstat(path, &status) == 0 else { return }
    guard status.st_mode & S_IFMT == type else { throw Errno(EADDRINUSE) }
    unlink(path)
  }

  /// A non-blocking listener. A socket file that nobody listens on any more is replaced.
  package static func listen(_ path: String, mode: UInt32) throws(Errno) -> Int32 {
    if let other = try? connect(path) {
      close(other)
      throw Errno(EADDRINUSE)
    }
    try removeLeft(path)
    let raw = try make(nonBlocking: true)
    // The mode must hold from the socket's first moment on.
    let mask = umask(0o777 & ~mode)
    defer { umask(mask) }
    do throws(Errno) {
      try withAddress(path) { bind(raw, $0, $1) }
      guard Glibc.listen(raw, 64) == 0 else { throw Errno.last }
    } catch {
      close(raw)
      throw error
    }
    return raw
  }
}
