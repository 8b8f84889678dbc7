import Devices
import Engines
import EventLoop
import Glibc
import TestSupport
import Testing

/// Paths of a console's profile that somebody else has put something at.
@Suite struct ConsoleFilesTests {
  private let folder = TemporaryFolder()

  private func open(_ change: (inout ConsolePortSettings) -> Void) throws {
    var settings = ConsolePortSettings(name: "", isConsole: true)
    settings.historyBytes = 0
    change(&settings)
    let thread = try LoopThread(name: "console")
    defer { thread.stopAndJoin() }
    let final = settings
    let outcome = Outcome()
    thread.perform {
      let place = ConsolePort.Place(
        loop: thread.loop, counters: QueueCounters(), viewerPath: nil, historyPath: nil, mayAttach: { _ in true },
        logLine: { _ in })
      do { try ConsolePort(final, place).close() } catch { outcome.fault = error as? ConsoleFault }
    }
    if let fault = outcome.fault { throw fault }
  }

  private final class Outcome: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: written before `perform` returns, read afterwards.
    var fault: ConsoleFault?
  }

  private func content(_ path: String) -> [UInt8]? {
    guard let file = fopen(path, "re") else { return nil }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 4096)
    return Array(bytes[..<fread(&bytes, 1, bytes.count, file)])
  }

  private func isLink(_ path: String) -> Bool {
    var status = stat()
    return lstat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFLNK
  }

  @Test func logIsNotWrittenThroughALink() throws {
    let target = folder.file("target", text: "secret")
    let path = folder.path + "/log"
    #expect(symlink(target, path) == 0)
    let fault = #expect(throws: ConsoleFault.self) { try open { $0.log = ConsoleLogSettings(path: path) } }
    #expect(fault?.message.contains("log.path") == true)
    #expect(content(target) == Array("secret".utf8))
    // A name that nobody has yet is a file of its own.
    try open { $0.log = ConsoleLogSettings(path: folder.path + "/new") }
    #expect(content(folder.path + "/new") == [])
  }

  @Test func fileInTheWayOfASocketStays() throws {
    let path = folder.file("agent", text: "precious")
    let fault = #expect(throws: ConsoleFault.self) { try open { $0.socket = .listen(path) } }
    #expect(fault?.message.contains("socket") == true)
    #expect(content(path) == Array("precious".utf8))
    // What an earlier daemon left is replaced.
    let left = folder.path + "/left"
    close(try UnixSocket.listen(left, mode: 0o600))
    try open { $0.socket = .listen(left) }
  }

  @Test func fileInTheWayOfAPtysLinkStays() throws {
    let path = folder.file("pty", text: "precious")
    let fault = #expect(throws: ConsoleFault.self) { try open { $0.pty = path } }
    #expect(fault?.message.contains("pty") == true)
    #expect(content(path) == Array("precious".utf8))
    let left = folder.path + "/left"
    #expect(symlink("/dev/pts/none", left) == 0)
    try open { $0.pty = left }
    #expect(!isLink(left))
  }

  @Test func fileInTheWayOfAListenerStays() throws {
    let path = folder.file("control", text: "precious")
    #expect(throws: Errno(EADDRINUSE)) { _ = try UnixSocket.listen(path, mode: 0o600) }
    #expect(content(path) == Array("precious".utf8))
  }
}
