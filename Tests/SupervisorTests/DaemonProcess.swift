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
    // Swift's own report of a crash takes half a minute, and ours must not need it.
    let backtraces = strdup("SWIFT_BACKTRACE=enable=no")
    defer { free(backtraces) }
    var environment: [UnsafeMutablePointer<CChar>?] = [backtraces]
    var index = 0
    while let entry = environ[index] {
      environment.append(entry)
      index += 1
    }
    let result = posix_spawn(&pid, program, &actions, nil, words, environment + [nil])
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

  /// Sends a signal to one of its threads, which has this name, and waits for the end of the process.
  ///
  /// - Returns: whether there was such a thread.
  func strike(_ signal: Int32, thread name: String) -> Bool {
    let threads = TemporaryFolder.names("/proc/\(pid)/task").compactMap { pid_t($0) }
    guard let thread = threads.first(where: { Self.name(of: $0, in: pid) == name }) else { return false }
    // Glibc's module hides it, as GNU's own.
    typealias Signal = @convention(c) (pid_t, pid_t, Int32) -> Int32
    guard let symbol = dlsym(nil, "tgkill") else { return false }
    guard unsafeBitCast(symbol, to: Signal.self)(pid, thread, signal) == 0 else { return false }
    var status: Int32 = 0
    guard eventually(seconds: 20, { waitpid(self.pid, &status, WNOHANG) == self.pid }) else { return false }
    pid = 0
    return true
  }

  private static func name(of thread: pid_t, in process: pid_t) -> String? {
    guard let file = fopen("/proc/\(process)/task/\(thread)/comm", "re") else { return nil }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 32)
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes.prefix(count).prefix { $0 != 10 }, as: UTF8.self)
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
