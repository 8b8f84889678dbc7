import CLinux
import EventLoop
import Glibc

/// A stream that a port talks to without ever waiting for it: a connected socket, or a pty's master. On the port's loop.
final class ConsoleStream {
  /// Bytes that wait to be written at most.
  static let bufferLimit = 64 << 10

  private let descriptor: OwnedDescriptor
  private let loop: EventLoop
  private var token: EventLoop.Token?
  private var waiting: [UInt8] = []
  private var first = 0
  private let onInput: (ConsoleStream) -> Void
  /// There is room again where there was none.
  private let onRoom: () -> Void
  private let onEnd: (ConsoleStream) -> Void
  private var wantsInput = true
  private var hasEnded = false

  /// - Parameter descriptor: taken over; made non-blocking here.
  init(
    adopting raw: Int32, loop: EventLoop, onInput: @escaping (ConsoleStream) -> Void, onRoom: @escaping () -> Void,
    onEnd: @escaping (ConsoleStream) -> Void
  ) throws(Errno) {
    descriptor = OwnedDescriptor(adopting: raw)
    self.loop = loop
    self.onInput = onInput
    self.onRoom = onRoom
    self.onEnd = onEnd
    _ = fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) | O_NONBLOCK)
    token = try loop.add(
      raw, events: EPOLLIN.rawValue, source: ActionSource { [weak self] events in self?.ready(events) })
  }

  /// Bytes that `write` takes.
  var room: Int { hasEnded ? 0 : Self.bufferLimit - (waiting.count - first) }

  /// - Returns: how many bytes were taken.
  func write(_ bytes: UnsafeRawBufferPointer) -> Int {
    let taken = min(bytes.count, room)
    guard taken > 0 else { return 0 }
    waiting.append(contentsOf: bytes[..<taken])
    flush()
    return taken
  }

  func write(_ bytes: [UInt8]) -> Int { bytes.withUnsafeBytes { write($0) } }

  /// Takes what has come; empty when there is nothing. The end is reported by `onEnd`.
  func read(_ limit: Int) -> [UInt8] {
    guard !hasEnded, limit > 0 else { return [] }
    var bytes = [UInt8](repeating: 0, count: limit)
    let count = Glibc.read(descriptor.raw, &bytes, limit)
    if count > 0 { return Array(bytes[..<count]) }
    if count == 0 || errno != EAGAIN && errno != EINTR { end() }
    return []
  }

  /// Stops and goes on to look for input.
  func listen(_ wants: Bool) {
    guard wants != wantsInput else { return }
    wantsInput = wants
    update()
  }

  private func update() {
    guard let token, !hasEnded else { return }
    let output = first < waiting.count ? EPOLLOUT.rawValue : 0
    try? loop.modify(token, events: (wantsInput ? EPOLLIN.rawValue : 0) | output)
  }

  private func flush() {
    while first < waiting.count {
      let count = waiting.withUnsafeBytes { bytes in
        Glibc.write(descriptor.raw, bytes.baseAddress.map { $0 + first }, bytes.count - first)
      }
      if count > 0 {
        first += count
      } else if errno == EAGAIN {
        break
      } else if errno != EINTR {
        return end()
      }
    }
    if first == waiting.count {
      waiting.removeAll(keepingCapacity: true)
      first = 0
    } else if first > Self.bufferLimit {
      waiting.removeFirst(first)
      first = 0
    }
    update()
  }

  private func ready(_ events: UInt32) {
    if events & EPOLLOUT.rawValue != 0 {
      flush()
      if room > 0 { onRoom() }
    }
    if hasEnded { return }
    if events & EPOLLIN.rawValue != 0 {
      onInput(self)
    } else if events & (EPOLLHUP.rawValue | EPOLLERR.rawValue) != 0 {
      end()
    }
  }

  /// Ends the stream; `onEnd` is told.
  func end() {
    guard !hasEnded else { return }
    hasEnded = true
    close()
    onEnd(self)
  }

  /// Ends it without a word.
  func close() {
    hasEnded = true
    if let token { loop.remove(token) }
    token = nil
  }
}
