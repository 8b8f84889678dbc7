import ConsoleLink
import Devices
import EventLoop
import Glibc

/// The clients of `vxctl console` at one port: any number who read, and one who writes.
final class ConsoleViewers {
  private final class Client {
    var stream: ConsoleStream?
    var reader = ConsoleFrameReader()
  }

  /// Clients at a time.
  private static let limit = 32

  private let loop: EventLoop
  private weak var port: ConsolePort?
  private var listener: ConsoleListener?
  private var clients: [Client] = []
  private weak var writer: Client?

  init(
    path: String, loop: EventLoop, port: ConsolePort, mayAttach: @escaping @Sendable (Int32) -> Bool
  ) throws(ConsoleFault) {
    self.loop = loop
    self.port = port
    // Who may attach is asked of each client, as on the control socket; whoever reaches that one is to reach this one.
    listener = try ConsoleListener(path: path, mode: 0o666, loop: loop) { [weak self] client in
      if mayAttach(client) {
        self?.accept(client)
      } else {
        let refusal = ConsoleFrame(.mode, [2]).encoded
        _ = Glibc.write(client, refusal, refusal.count)
        Glibc.close(client)
      }
    }
  }

  var hasClients: Bool { !clients.isEmpty }

  func close() {
    listener?.close()
    for client in clients { client.stream?.close() }
    clients = []
  }

  /// - Returns: whether anybody got it. A client that is too slow loses what it has no room for.
  func write(_ bytes: UnsafeRawBufferPointer) -> Bool {
    guard !clients.isEmpty else { return false }
    let frames = ConsoleFrame.data(bytes)
    for client in clients where (client.stream?.room ?? 0) >= frames.count { _ = client.stream?.write(frames) }
    return true
  }

  /// Who writes is listened to while there is room for it.
  func listen(_ hasRoom: Bool) { writer?.stream?.listen(hasRoom) }

  private func accept(_ raw: Int32) {
    guard clients.count < Self.limit else {
      Glibc.close(raw)
      return
    }
    let client = Client()
    let stream = try? ConsoleStream(
      adopting: raw, loop: loop,
      onInput: { [weak self, weak client] stream in
        // Held here: what is read may be the client's end.
        guard let self, let client else { return }
        client.reader.append(stream.read(min(4096, max(1, port?.inputRoom ?? 1))))
        serve(client)
      }, onRoom: {},
      onEnd: { [weak self, weak client] _ in
        if let client { self?.leave(client) }
      })
    guard let stream else { return }
    client.stream = stream
    clients.append(client)
    // The newest of it, when it is more than a client's buffer.
    let remembered = (port?.remembered ?? []).suffix(ConsoleStream.bufferLimit - 4096)
    _ = stream.write(ConsoleFrame.data(remembered))
    port?.onChange()
  }

  private func leave(_ client: Client) {
    if writer === client { writer = nil }
    clients.removeAll { $0 === client }
    port?.onChange()
  }

  private func serve(_ client: Client) {
    do throws(ConsoleFrameReader.Malformed) {
      while let frame = try client.reader.next() { take(frame, from: client) }
    } catch {
      client.stream?.end()
    }
  }

  private func take(_ frame: ConsoleFrame, from client: Client) {
    switch frame.kind {
    case .data:
      // Who may not write has been told so.
      if writer === client { port?.add(input: frame.bytes) }
    case .size:
      guard writer === client, frame.bytes.count == 4 else { return }
      let values = frame.bytes.map { UInt16($0) }
      port?.set(size: TerminalSize(columns: values[0] << 8 | values[1], rows: values[2] << 8 | values[3]))
    case .write:
      if let other = writer, other !== client {
        guard frame.bytes.first == 1 else { return say(false, to: client) }
        say(false, to: other)
      }
      writer = client
      say(true, to: client)
    case .mode: break
    }
  }

  private func say(_ writes: Bool, to client: Client) {
    _ = client.stream?.write(ConsoleFrame(.mode, [writes ? 1 : 0]).encoded)
  }
}
