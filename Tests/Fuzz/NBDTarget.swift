import Devices
import Engines
import EventLoop
import Glibc
import Synchronization

/// An NBD engine whose server says whatever the input has: in the handshake, in answers to requests, and on the next connection.
///
/// The input's first byte says how much of a right handshake comes before the rest of it, so that mutations reach all of the parts.
enum NBDTarget {
  private static let server = Server()
  // Touched by libFuzzer's one thread.
  nonisolated(unsafe) private static let buffer = UnsafeMutableRawPointer.allocate(byteCount: 1 << 16, alignment: 4096)
  nonisolated(unsafe) private static let vectors = UnsafeMutablePointer<DataVector>.allocate(capacity: 16)
  nonisolated(unsafe) private static let completions = UnsafeMutablePointer<EngineCompletion>.allocate(capacity: 16)
  private static let operations: [BlockOperation] = [.read, .write, .flush, .discard, .writeZeroes]

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let choice = input.byte()
    let plan = (0..<4).map { _ in input.byte() }
    var said = Array(input.rest())
    if choice & 1 == 0 { said = Server.greeting + (choice & 2 == 0 ? Server.export(flags: choice >> 2) : []) + said }
    server.says(said)
    guard let address = try? NBDAddress("nbd+unix:///disk?socket=\(server.path)"),
      let engine = try? NBDEngine(
        address: address, readOnly: false, discard: true, depth: 16, reconnectMilliseconds: choice & 0x80 != 0 ? 5 : 0,
        onNotice: { _ in })
    else { return }
    let (capacity, block) = (engine.geometry.capacity, engine.geometry.logicalBlock)
    precondition(capacity >= 512 && capacity % UInt64(block) == 0, "a disk that does not end with a block")
    precondition(block.nonzeroBitCount == 1, "blocks of a size that no disk has")
    var pending: Set<UInt32> = []
    func reap() {
      while case let count = engine.reap(into: completions, capacity: 16), count > 0 {
        for index in 0..<count {
          let tag = completions[index].tag
          precondition(pending.remove(tag) != nil, "an operation ends that was not begun")
        }
      }
    }
    for (index, step) in plan.enumerated() {
      let tag = UInt32(index * 3)
      var request = EngineRequest(
        operation: operations[Int(step) % operations.count], tag: tag, offset: 0, length: 4096,
        vectors: vectors + index, vectorCount: 0)
      if request.operation == .read || request.operation == .write {
        vectors[index] = DataVector(start: buffer + index * 16384, length: Int(step >> 3 & 3) << 12 | 512)
        request.vectorCount = 1
      }
      request.isDurable = step & 0x40 != 0
      pending.insert(tag)
      engine.submit(&request, count: 1)
      if step & 0x80 != 0 { reap() }
    }
    reap()
    engine.abandon()
    reap()
    precondition(pending.isEmpty, "an operation never ends")
    engine.close()
  }

  /// Says the same to each connection, or the rest of it: what it is told to by the run.
  private final class Server: Sendable {
    let path = Server.socketPath
    private static var socketPath: String { "/tmp/vxd-fuzz-nbd-\(getpid())" }
    private let words = Mutex<[UInt8]>([])
    private let thread: LoopThread
    private let listener: Int32

    init() {
      atexit { unlink(Server.socketPath) }
      guard let raw = try? UnixSocket.listen(path, mode: 0o600), let thread = try? LoopThread(name: "server") else {
        fatalError("no server")
      }
      listener = raw
      self.thread = thread
      _ = fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) & ~O_NONBLOCK)
      thread.loop.enqueue { [self] in serve() }
    }

    func says(_ bytes: [UInt8]) { words.withLock { $0 = bytes } }

    private func serve() {
      var earlier: Int32 = -1
      while true {
        let client = accept(listener, nil, nil)
        guard client >= 0 else { continue }
        // Held open until the next one: what the engine sends has somewhere to go.
        if earlier >= 0 { close(earlier) }
        earlier = client
        let bytes = words.withLock { $0 }
        _ = send(client, bytes, bytes.count, Int32(MSG_NOSIGNAL))
        shutdown(client, Int32(SHUT_WR))
      }
    }

    static let greeting: [UInt8] = Array("NBDMAGICIHAVEOPT".utf8) + [0, 3]

    private static func reply(_ type: UInt8, _ data: [UInt8]) -> [UInt8] {
      [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0, 0, 0, type, 0, 0, 0, UInt8(data.count)] + data
    }

    /// The description of an export of 1 MiB, and the end of the handshake.
    static func export(flags: UInt8) -> [UInt8] {
      reply(3, [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x01, (flags & 0x1f) << 2 | 1]) + reply(1, [])
    }
  }
}
