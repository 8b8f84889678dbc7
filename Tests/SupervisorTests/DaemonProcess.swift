import EventLoop
import Glibc
import TestSupport

/// The real vxd as a process of its own, on a simulated Xen of the test's.
final class DaemonProcess: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: used by one test at a time.
  static let products =
    "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/") + "/.build/debug"

  let arguments: [String]
  let logPath: String
  private(set) var pid: pid_t = 0

  init(_ arguments: [String], log: String) {
    self.arguments = arguments
    logPath = log
  }

  deinit { kill() }

  var log: String {
    guard let file = fopen(logPath, "re") else { return "" }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes[..<count], as: UTF8.self)
  }

  func start() throws {
    let program = Self.products + "/vxd"
    let descriptor = open(logPath, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
    defer { close(descriptor) }
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, descriptor, 1)
    posix_spawn_file_actions_adddup2(&actions, descriptor, 2)
    let words: [UnsafeMutablePointer<CChar>?] = ([program] + arguments).map { strdup($0) } + [nil]
    defer { words.forEach { free($0) } }
    let result = posix_spawn(&pid, program, &actions, nil, words, environ)
    guard result == 0 else { throw Errno(result) }
  }

  /// kill -9, and waits for the end.
  func kill() {
    guard pid > 0 else { return }
    _ = Glibc.kill(pid, SIGKILL)
    var status: Int32 = 0
    while waitpid(pid, &status, 0) == -1 && errno == EINTR {}
    pid = 0
  }

  /// Asks for a good end; the exit status, or nil when it does not come.
  func terminate(seconds: Int = 20) -> Int32? {
    guard pid > 0 else { return nil }
    _ = Glibc.kill(pid, SIGTERM)
    var status: Int32 = 0
    guard eventually(seconds: seconds, { waitpid(self.pid, &status, WNOHANG) == self.pid }) else { return nil }
    pid = 0
    return status >> 8 & 0xff
  }
}
