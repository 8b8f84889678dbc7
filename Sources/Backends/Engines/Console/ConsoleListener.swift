import EventLoop
import Glibc

/// A listening Unix socket on a loop.
final class ConsoleListener {
  private let descriptor: OwnedDescriptor
  private var accepting: AcceptLoop?
  private let path: String

  /// - Parameters:
  ///   - mode: who may connect.
  ///   - onClient: gets each connection, which is its from then on.
  init(path: String, mode: mode_t = 0o660, loop: EventLoop, onClient: @escaping (Int32) -> Void) throws(Errno) {
    self.path = path
    let raw = try UnixSocket.make(nonBlocking: true)
    descriptor = OwnedDescriptor(adopting: raw)
    try UnixSocket.removeLeft(path)
    try UnixSocket.withAddress(path) { address, length in bind(raw, address, length) }
    // Not by the mask of the process, as `UnixSocket.listen`: this is not the only thread that makes files.
    guard chmod(path, mode) == 0, listen(raw, 16) == 0 else { throw Errno.last }
    accepting = try AcceptLoop(raw, on: loop, onClient: onClient)
  }

  func close() {
    accepting?.close()
    unlink(path)
  }
}
