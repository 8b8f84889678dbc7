package import EventLoop
import Glibc

/// One side of a stream of bytes between two domains that share nothing but Xenstore. It joins a socket to two directories, one that this side
/// writes and one that the other side writes, each of which has
///
///     out    "NUMBER PIECE": the piece that is under way; pieces are numbered from 1 on
///     taken  "NUMBER": the last piece of the other side that was passed on
///     end    "REASON": this side sends and takes no more
///
/// One piece is under way at a time in each direction, so that what either side can make the other one keep is a piece. Confined to the thread of
/// its loop and its `XenStore`; it is told by `step` that a node may have changed.
package final class StoreStream {
  /// Bytes of a piece. xenstored lets an unprivileged domain write 2048 bytes to a node, with its permissions, and anybody 4096.
  package static let pieceBytes = 1536

  private let xenstore: XenStore
  private let own: String
  private let other: String
  private let socket: OwnedDescriptor
  /// The last piece that was written here, and the last one that the other side has taken.
  private var sent: UInt64 = 0
  private var acknowledged: UInt64 = 0
  /// The last piece of the other side.
  private var received: UInt64 = 0
  /// What of that the socket has not taken yet.
  private var waiting: ArraySlice<UInt8> = []
  /// Why the stream is over; nil while it is not.
  package private(set) var end: String?
  private let loop: EventLoop
  private let onEnd: () -> Void
  private var token: EventLoop.Token?

  /// - Parameters:
  ///   - own: the directory that this side writes.
  ///   - other: the one that the other side writes.
  ///   - socket: a stream socket, which is made non-blocking.
  ///   - loop: listens to the socket.
  ///   - onEnd: called once when the stream is over by itself, for the reason in `end`.
  package init(
    _ xenstore: XenStore, own: String, other: String, socket: consuming OwnedDescriptor, loop: EventLoop,
    onEnd: @escaping () -> Void
  ) {
    self.loop = loop
    self.onEnd = onEnd
    self.xenstore = xenstore
    self.own = own
    self.other = other
    self.socket = socket
    _ = fcntl(self.socket.raw, F_SETFL, fcntl(self.socket.raw, F_GETFL) | O_NONBLOCK)
  }

  /// Moves what can be moved.
  package func step() {
    guard end == nil else { return }
    do throws(XenError) {
      try receive()
      if end == nil { try send() }
    } catch {
      end = "\(error)"
    }
    listen()
    if end != nil { onEnd() }
  }

  /// Says to the other side that this one is done.
  package func close(_ reason: String) {
    if end == nil { end = reason }
    listen()
    try? xenstore.write("\(own)/end", reason)
  }

  /// Waits for what the socket can do next. While that is nothing, it is not listened to at all: a peer that is gone would be told of without end.
  private func listen() {
    let interest =
      end == nil ? (sent == acknowledged ? EventLoop.input : 0) | (waiting.isEmpty ? 0 : EventLoop.output) : 0
    if let token {
      if interest != 0, (try? loop.modify(token, events: interest)) != nil { return }
      loop.remove(token)
      self.token = nil
    }
    guard interest != 0 else { return }
    token = try? loop.add(socket.raw, events: interest, source: ActionSource { [unowned self] _ in step() })
  }

  private func receive() throws(XenError) {
    // Looked at first: what was written before the end is taken all the same.
    let ending = xenstore.read("\(other)/end")
    while flush(), let (number, piece) = Self.piece(xenstore.readBytes("\(other)/out")), number != received {
      guard number == received &+ 1, !piece.isEmpty, piece.count <= Self.pieceBytes else {
        end = "the other side breaks the rules"
        return
      }
      received = number
      waiting = piece
      guard flush() else { return }
    }
    if let ending, waiting.isEmpty { end = ending }
  }

  /// - Returns: whether the socket has taken all that was received; the other side is told then.
  private func flush() -> Bool {
    guard !waiting.isEmpty else { return true }
    while !waiting.isEmpty {
      let count = waiting.withUnsafeBytes { Glibc.send(socket.raw, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
      if count < 0 && errno == EINTR { continue }
      if count < 0 && errno == EAGAIN { return false }
      guard count > 0 else {
        end = "closed"
        return false
      }
      waiting = waiting.dropFirst(count)
    }
    do throws(XenError) { try xenstore.write("\(own)/taken", "\(received)") } catch { end = "\(error)" }
    return end == nil
  }

  private func send() throws(XenError) {
    if acknowledged != sent, xenstore.read("\(other)/taken") == "\(sent)" { acknowledged = sent }
    guard acknowledged == sent, end == nil else { return }
    var buffer = [UInt8](repeating: 0, count: Self.pieceBytes)
    var count: Int
    repeat { count = read(socket.raw, &buffer, buffer.count) } while count < 0 && errno == EINTR
    if count < 0 && errno == EAGAIN { return }
    guard count > 0 else {
      end = "closed"
      return
    }
    sent += 1
    try xenstore.write("\(own)/out", bytes: Array("\(sent) ".utf8) + buffer[..<count])
  }

  /// A piece with its number; nil for what is none.
  package static func piece(_ value: [UInt8]?) -> (UInt64, ArraySlice<UInt8>)? {
    guard let value, let space = value.prefix(21).firstIndex(of: 0x20), space > 0,
      value[..<space].allSatisfy({ (0x30...0x39).contains($0) }),
      let number = UInt64(String(decoding: value[..<space], as: UTF8.self))
    else { return nil }
    return (number, value[(space + 1)...])
  }
}
