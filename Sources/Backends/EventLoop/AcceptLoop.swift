import CLinux
import Glibc

/// A listening socket on a loop: passes each connection on. Where the process or the host has no descriptor left, it rests for a second:
/// the socket would stay readable, and its thread spin.
package final class AcceptLoop: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: made, used and closed on the loop's thread only.

  /// Connections before other sources of the thread have their turn.
  private static let limit = 64
  private static let restMilliseconds: UInt64 = 1000

  private let descriptor: Int32
  private let loop: EventLoop
  private let onClient: (Int32) -> Void
  private var token: EventLoop.Token?
  private var timer: UInt64 = 0

  /// On the loop's thread.
  ///
  /// - Parameters:
  ///   - descriptor: listens, and is non-blocking; stays open until `close`.
  ///   - onClient: gets each connection, which is its from then on.
  package init(_ descriptor: Int32, on loop: EventLoop, onClient: @escaping (Int32) -> Void) throws(Errno) {
    self.descriptor = descriptor
    self.loop = loop
    self.onClient = onClient
    try listen()
  }

  private func listen() throws(Errno) {
    token = try loop.onReadable(descriptor) { [unowned self] in accept() }
  }

  private func accept() {
    for _ in 0..<Self.limit {
      let client = clinux_accept(descriptor)
      guard client >= 0 else {
        if [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(errno) { rest() }
        return
      }
      onClient(client)
      // Whoever got the connection may have closed this.
      guard token != nil else { return }
    }
  }

  private func rest() {
    if let token { loop.remove(token) }
    token = nil
    timer = loop.schedule(afterMilliseconds: Self.restMilliseconds) { [weak self] in
      guard let self else { return }
      timer = 0
      do throws(Errno) { try listen() } catch { rest() }
    }
  }

  /// Ends it; the descriptor is its owner's. On the loop's thread.
  package func close() {
    if let token { loop.remove(token) }
    token = nil
    if timer != 0 { loop.cancel(timer: timer) }
    timer = 0
  }
}
