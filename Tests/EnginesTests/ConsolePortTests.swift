import Devices
import Engines
import EventLoop
import Glibc
import Synchronization
import TestSupport
import Testing

/// Ends of a console port whose readers are slow, or quick.
@Suite struct ConsolePortTests {
  private let folder = TemporaryFolder()

  /// A port that waits for its reader, with one connected.
  private final class Stage: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: `port` and `result` are used within `perform`, on the loop's thread or while it waits for that.
    private let thread: LoopThread
    private var port: ConsolePort?
    private var result = 0
    let reader: Int32

    init(_ path: String) throws {
      let thread = try LoopThread(name: "console")
      self.thread = thread
      var settings = ConsolePortSettings(name: "channel", isConsole: false)
      settings.socket = .listen(path)
      settings.overflow = .wait
      settings.historyBytes = 0
      let place = ConsolePort.Place(
        loop: thread.loop, counters: QueueCounters(), viewerPath: nil, historyPath: nil, mayAttach: { _ in true },
        logLine: { _ in })
      let final = settings
      let made = Mutex<ConsolePort?>(nil)
      thread.perform { made.withLock { $0 = try? ConsolePort(final, place) } }
      port = made.withLock { $0 }
      reader = try UnixSocket.connect(path)
      #expect(eventually { self.perform { $0.isOpen ? 1 : 0 } == 1 })
    }

    func perform(_ body: @escaping @Sendable (ConsolePort) -> Int) -> Int {
      thread.perform { [self] in result = port.map(body) ?? 0 }
      return result
    }

    func end() {
      _ = perform {
        $0.close()
        return 0
      }
      thread.stopAndJoin()
      close(reader)
    }
  }

  private static func take(_ count: Int, _ port: ConsolePort) -> Int {
    [UInt8](repeating: 1, count: count).withUnsafeBytes { port.take($0) }
  }

  /// Bytes of pieces that a port takes before its reader reads.
  private func capacity(piece: Int, _ path: String) throws -> Int {
    let stage = try Stage(path)
    defer { stage.end() }
    return stage.perform { port in
      var all = 0
      while true {
        let taken = Self.take(piece, port)
        all += taken
        guard taken == piece else { return all }
      }
    }
  }

  @Test func readerThatMakesRoomWhileAPieceIsTakenLeavesNothingWaitingForAWordThatNeverComes() throws {
    // With a piece that does not fill what there is room for, the last one finds room for a part of itself.
    var (piece, room) = (1000, 0)
    for size in [1000, 1001, 1003] where room == 0 {
      let all = try capacity(piece: size, "\(folder.path)/\(size)")
      (piece, room) = (size, all % size)
    }
    try #require(room > 0)
    let (size, all) = (piece, try capacity(piece: piece, "\(folder.path)/again"))
    let stage = try Stage("\(folder.path)/port")
    defer { stage.end() }
    let reader = stage.reader
    let taken = stage.perform { port in
      for _ in 0..<all / size { #expect(Self.take(size, port) == size) }
      // All that the kernel holds is read before the loop has its turn: the next piece's first part takes the rest along, and nothing waits.
      var bytes = [UInt8](repeating: 0, count: 1 << 20)
      while recv(reader, &bytes, bytes.count, Int32(MSG_DONTWAIT)) > 0 {}
      return Self.take(size, port)
    }
    #expect(taken == size)
  }
}
