import CLinux
import EventLoop
import Glibc

/// A listening Unix socket on a loop.
final class ConsoleListener {
  private let descriptor: OwnedDescriptor
  private let loop: EventLoop
  private var token: EventLoop.Token?
  private let path: String

  /// - Parameter onClient: gets each connection, which is its from then on.
  init(path: String, loop: EventLoop, onClient: @escaping (Int32) -> Void) throws(Errno) {
    self.path = path
    self.loop = loop
    let raw = try UnixStream.make()
    descriptor = OwnedDescriptor(adopting: raw)
    guard var address = UnixStream.address(path) else { throw Errno(ENAMETOOLONG) }
    // What an earlier daemon left.
    unlink(path)
    guard UnixStream.with(&address, { bind(raw, $0, $1) }) == 0 else { throw Errno.last }
    guard chmod(path, 0o660) == 0, listen(raw, 16) == 0 else { throw Errno.last }
    token = try loop.onReadable(raw) {
      let client = clinux_accept(raw)
      if client >= 0 { onClient(client) }
    }
  }

  func close() {
    if let token { loop.remove(token) }
    token = nil
    unlink(path)
  }
}

/// Unix stream sockets.
enum UnixStream {
  static func make() throws(Errno) -> Int32 {
    try retrying { socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | clinux_socket_cloexec(), 0) }
  }

  /// nil when the path is too long for an address.
  static func address(_ path: String) -> sockaddr_un? {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(path.utf8)
    guard bytes.count < MemoryLayout.size(ofValue: address.sun_path) else { return nil }
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
    return address
  }

  static func with<Result>(_ address: inout sockaddr_un, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result)
    -> Result
  {
    withUnsafePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
      }
    }
  }

  /// A connection; nil when nobody listens.
  static func connect(_ path: String) -> Int32? {
    guard var address = address(path), let raw = try? make() else { return nil }
    // To a Unix socket: at once, or not at all.
    _ = fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) | O_NONBLOCK)
    guard with(&address, { Glibc.connect(raw, $0, $1) }) == 0 else {
      close(raw)
      return nil
    }
    return raw
  }
}
