import ControlAPI
import EventLoop
import Glibc
import Supervisor

/// A client's connection to the control socket, with the daemon's own methods, events and replays: the input is what it sends, byte 1 in
/// it stands for an event that happens meanwhile, byte 2 for the client's reading of what waits, byte 3 for a piece of the stream that
/// ends here.
enum ConnectionTarget {
  private static let methods = SupervisorControl.methods(board: StatusBoard(), isSimulated: true)
  private static let roles: [ControlRole] = [.view, .operate, .admin]
  // Touched by libFuzzer's one thread. One history whose first events are gone, one that begins.
  nonisolated(unsafe) private static let longHistory: EventHistory = {
    let history = EventHistory()
    for number: Int64 in 0..<5000 { _ = history.add(["event": "device.ready", "number": .integer(number)]) }
    return history
  }()

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let choice = input.byte()
    var pair: [Int32] = [0, 0]
    guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_NONBLOCK.rawValue), 0, &pair) == 0 else {
      fatalError("no socket pair")
    }
    let client = Client(pair[1])
    // Not often: to replay it takes its time.
    let history = choice & 0xc1 == 0xc1 ? longHistory : EventHistory()
    let connection = ControlConnection(
      OwnedDescriptor(adopting: pair[0]), methods: methods, caller: ControlCaller(role: roles[Int(choice >> 1) % 3]),
      history: history)
    var piece: [UInt8] = []
    func send() {
      guard !connection.isOver else { return }
      client.write(piece)
      piece = []
      connection.receive()
    }
    while !input.isEmpty, !connection.isOver {
      switch input.byte() {
      case 1:
        send()
        let (event, sequence) = history.add(["event": "device.ready"])
        if connection.isSubscribed { connection.send(event: event, sequence) }
      case 2:
        send()
        connection.flush()
        client.read()
      case 3: send()
      case let byte: piece.append(byte)
      }
    }
    piece.append(0x0a)
    send()
    for _ in 0..<64 {
      connection.flush()
      if !client.read() { break }
    }
    client.check()
  }

  /// What is at the other end.
  private final class Client {
    private let descriptor: OwnedDescriptor
    private var received: [UInt8] = []

    init(_ raw: Int32) { descriptor = OwnedDescriptor(adopting: raw) }

    func write(_ bytes: [UInt8]) {
      guard !bytes.isEmpty else { return }
      _ = Glibc.send(descriptor.raw, bytes, bytes.count, Int32(MSG_NOSIGNAL))
    }

    /// - Returns: whether there was anything.
    @discardableResult
    func read() -> Bool {
      var buffer = [UInt8](repeating: 0, count: 1 << 16)
      var isAny = false
      while case let count = recv(descriptor.raw, &buffer, buffer.count, 0), count > 0 {
        received += buffer[..<count]
        isAny = true
      }
      return isAny
    }

    /// Every whole line is a JSON object or batch, and tells of events in order.
    func check() {
      for line in received.split(separator: 0x0a).dropLast(received.last == 0x0a ? 0 : 1) {
        guard let message = try? JSONText.parse(Array(line)) else { fatalError("the connection sends what is no JSON") }
        guard message["method"] == "event.dropped" else { continue }
        guard let first = message["params"]?["from"]?.integerValue, let last = message["params"]?["to"]?.integerValue,
          first >= 1, first <= last
        else { fatalError("events are missing that cannot be") }
      }
    }
  }
}
