import EventLoop
import Glibc
import Synchronization

/// A server that greets and goes on as it is told to, on as many connections as come.
final class LiarServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: what changes is atomic, the rest immutable after `init`.
  enum Behaviour {
    /// Says this, and hangs up.
    case says([UInt8])
    /// A right handshake, and hangs up.
    case hangsUp
    /// The same on the first connection; the others are accepted and left alone.
    case onceThenSilent
    /// Never silent for long, and never done.
    case drips
  }

  static let greeting: [UInt8] = Array("NBDMAGICIHAVEOPT".utf8) + [0, 3]

  static func reply(_ type: UInt32, _ data: [UInt8]) -> [UInt8] {
    let words: [UInt32] = [0x0003_e889, 0x0455_65a9, 7, type, UInt32(data.count)]
    return words.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (24 - 8 * $0)) } } + data
  }

  /// An export of 1 MiB, and the end of the handshake.
  static let export = reply(3, [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 1]) + reply(1, [])

  private let thread: LoopThread
  private let listener: OwnedDescriptor
  private let accepted = Atomic<Int>(0)
  private let isStopped = Atomic<Bool>(false)

  var connections: Int { accepted.load(ordering: .relaxed) }

  convenience init(path: String, answer: [UInt8]) throws { try self.init(path: path, behaviour: .says(answer)) }

  init(path: String, behaviour: Behaviour) throws {
    let raw = try UnixSocket.listen(path, mode: 0o600)
    _ = fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) & ~O_NONBLOCK)
    listener = OwnedDescriptor(adopting: raw)
    thread = try LoopThread(name: "liar")
    thread.loop.enqueue { [self] in
      var silent: [Int32] = []
      while case let client = accept(raw, nil, nil), client >= 0 {
        _ = fcntl(client, F_SETFD, FD_CLOEXEC)
        let count = accepted.wrappingAdd(1, ordering: .relaxed).newValue
        switch behaviour {
        case .says(let bytes): say(bytes, client)
        case .hangsUp: say(Self.greeting + Self.export, client)
        case .onceThenSilent where count == 1: say(Self.greeting + Self.export, client)
        case .onceThenSilent:
          silent.append(client)
          continue
        case .drips: drip(client)
        }
        shutdown(client, Int32(SHUT_WR))
        close(client)
      }
      for client in silent { close(client) }
    }
  }

  private func say(_ bytes: [UInt8], _ client: Int32) {
    _ = send(client, bytes, bytes.count, Int32(MSG_NOSIGNAL))
    // What the client asks for: it is to be through with that before the end.
    var asked = [UInt8](repeating: 0, count: 4096)
    _ = recv(client, &asked, asked.count, 0)
  }

  private func drip(_ client: Int32) {
    let bytes = Self.greeting + (0..<32).flatMap { _ in Self.reply(9, [UInt8](repeating: 0, count: 60_000)) }
    for byte in bytes {
      guard !isStopped.load(ordering: .relaxed) else { return }
      var one = byte
      guard send(client, &one, 1, Int32(MSG_NOSIGNAL)) == 1 else { return }
      usleep(20_000)
    }
  }

  func stop() {
    isStopped.store(true, ordering: .relaxed)
    shutdown(listener.raw, Int32(SHUT_RDWR))
    thread.stopAndJoin()
  }
}
