import EventLoop
import Glibc
import Synchronization
import TestSupport
import Testing

@testable import ControlAPI

/// What vxd asks QEMU's monitor, and a QEMU that hangs.
@Suite struct QEMUMonitorTests {
  private static func listen(_ folder: TemporaryFolder) throws -> Int32 {
    let raw = try UnixSocket.make()
    try UnixSocket.withAddress(folder.path + "/qmp-libxenstat-5") { bind(raw, $0, $1) }
    guard Glibc.listen(raw, 0) == 0 else { throw Errno.last }
    return raw
  }

  /// A QEMU that is stopped takes no connection, and those that wait for it fill its queue.
  @Test func monitorThatTakesNoConnectionHoldsNobody() throws {
    let folder = TemporaryFolder()
    let listener = try Self.listen(folder)
    var waiting: [Int32] = []
    defer { for raw in waiting { close(raw) } }
    while let raw = try? UnixSocket.connect(folder.path + "/qmp-libxenstat-5", nonBlocking: true) {
      waiting.append(raw)
    }
    #expect(errno == EAGAIN && !waiting.isEmpty)
    let (thread, isOver) = (try LoopThread(name: "asks"), Latch())
    let path = folder.path
    thread.loop.enqueue {
      #expect(QEMUMonitor.functions(of: 5, folder: path) == nil)
      isOver.open()
    }
    let isInTime = isOver.wait(seconds: 20)
    #expect(isInTime, "it waits for a QEMU that does not answer")
    // Whoever waits for it still is refused now.
    close(listener)
    thread.stopAndJoin()
  }

  /// One that says something all the time, whole lines or a line without an end, and never what it was asked for, is not listened to without end.
  @Test(arguments: [#"{"event": "RTC_CHANGE"}"# + "\n", "{"]) func monitorThatNeverAnswersIsLeft(word: String) throws {
    let folder = TemporaryFolder()
    let listener = try Self.listen(folder)
    defer { close(listener) }
    let thread = try LoopThread(name: "monitor")
    thread.loop.enqueue {
      let client = OwnedDescriptor(adopting: accept(listener, nil, nil))
      // Until nobody listens any more, which a poll for nothing notices too.
      var poller = pollfd(fd: client.raw, events: 0, revents: 0)
      repeat {
        var bytes = Array(word.utf8)
        guard send(client.raw, &bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count else { return }
      } while poll(&poller, 1, 20) == 0
    }
    #expect(QEMUMonitor.functions(of: 5, folder: folder.path, within: 500) == nil)
    // Ends when the monitor is left; one that listens on hangs here.
    thread.stopAndJoin()
  }
}
