import EventLoop
import Glibc
import TestSupport

/// The real vxd of this build as a process of its own.
final class DaemonProcess: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: used by one test at a time.
  let arguments: [String]
  let logPath: String
  private var child: ChildProcess?

  init(_ arguments: [String], log: String) {
    self.arguments = arguments
    logPath = log
  }

  deinit { kill() }

  /// The end of what it and those before it wrote.
  var log: String {
    guard let file = fopen(logPath, "re") else { return "" }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 16)
    if fseek(file, -bytes.count, SEEK_END) != 0 { rewind(file) }
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes[..<count], as: UTF8.self)
  }

  /// Names of its threads; none when it has ended.
  var threads: [String] {
    let folder = "/proc/\(child?.pid ?? 0)/task"
    return TemporaryFolder.names(folder).compactMap { task in
      guard let file = fopen("\(folder)/\(task)/comm", "re") else { return nil }
      defer { fclose(file) }
      var name = [CChar](repeating: 0, count: 32)
      guard fgets(&name, 32, file) != nil else { return nil }
      return String(decoding: name.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
  }

  var descriptorCount: Int { TemporaryFolder.names("/proc/\(child?.pid ?? 0)/fd").count }

  /// For a failure: its threads and its last words.
  var report: String { "threads: \(threads.joined(separator: " "))\n\(log.suffix(3000))" }

  func start() throws {
    let descriptor = open(logPath, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
    defer { close(descriptor) }
    child = try ChildProcess(ChildProcess.products + "/vxd", arguments, output: descriptor)
  }

  /// kill -9, and waits for the end.
  func kill() {
    child?.kill()
    child = nil
  }

  /// Asks for a good end; the exit status, or nil when it does not come.
  func terminate(seconds: Int = 30) -> Int32? {
    child?.signal(SIGTERM)
    defer { kill() }
    return child?.wait(seconds: seconds)
  }
}
