import EventLoop
import Glibc
import TestSupport

/// The real vxd of this build as a process of its own.
final class DaemonProcess: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: used by one test at a time.
  let arguments: [String]
  let logPath: String
  private let wrapper: [String]
  private var child: ChildProcess?

  init(_ arguments: [String], log: String, under wrapper: [String] = []) {
    self.arguments = arguments
    self.wrapper = wrapper
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

  /// 0 when it has ended.
  var pid: pid_t { child?.pid ?? 0 }

  var descriptorCount: Int { TemporaryFolder.names("/proc/\(child?.pid ?? 0)/fd").count }

  /// What its descriptors lead to: paths, and kinds such as "socket" and "anon_inode:[eventfd]" without their inode.
  var descriptors: [String] {
    let folder = "/proc/\(child?.pid ?? 0)/fd"
    return TemporaryFolder.names(folder).compactMap { name in
      var target = [UInt8](repeating: 0, count: 4096)
      let count = readlink("\(folder)/\(name)", &target, target.count)
      guard count > 0 else { return nil }
      let text = String(decoding: target[..<count], as: UTF8.self)
      return ["socket", "pipe"].first { text.hasPrefix("\($0):") } ?? text
    }
  }

  /// Memory that is in use, in KiB, with what it has mapped of its guests; 0 when it has ended.
  var residentKilobytes: Int { kilobytes(of: ["VmRSS:"]) }

  /// Memory of its own that is in use, in KiB: without its guests', which is in memory files here and which Linux does not count on Xen.
  var ownKilobytes: Int { kilobytes(of: ["RssAnon:", "RssFile:"]) }

  private func kilobytes(of fields: [String]) -> Int { sum(of: fields, in: "status") }

  /// Calls of read and write, of all kinds and by all threads, so far: work that can be counted.
  var readsAndWrites: Int { sum(of: ["syscr:", "syscw:"], in: "io") }

  private func sum(of fields: [String], in name: String) -> Int {
    guard let file = fopen("/proc/\(child?.pid ?? 0)/\(name)", "re") else { return 0 }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 256)
    var sum = 0
    while fgets(&bytes, 256, file) != nil {
      let line = String(decoding: bytes.prefix { $0 != 0 && $0 != 10 }, as: UTF8.self)
      let words = line.split { $0 == " " || $0 == "\t" }
      guard words.count > 1, fields.contains(String(words[0])) else { continue }
      sum += Int(words[1]) ?? 0
    }
    return sum
  }

  /// Processor time of all its threads so far, also of those that have ended, in milliseconds.
  var processorMilliseconds: Int {
    guard let file = fopen("/proc/\(child?.pid ?? 0)/stat", "re") else { return 0 }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1024)
    let count = fread(&bytes, 1, bytes.count, file)
    // Behind the name, which may have spaces: fields 14 and 15 of all (linux: proc_pid_stat(5)), in ticks.
    let behind = String(decoding: bytes[..<count], as: UTF8.self).split(separator: ")").last
    let fields = behind?.split(separator: " ") ?? []
    guard fields.count > 12, let user = Int(fields[11]), let system = Int(fields[12]) else { return 0 }
    return (user + system) * 1000 / max(1, sysconf(Int32(_SC_CLK_TCK)))
  }

  /// For a failure: its threads and its last words.
  var report: String { "threads: \(threads.joined(separator: " "))\n\(log.suffix(3000))" }

  func start() throws {
    let descriptor = open(logPath, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
    defer { close(descriptor) }
    // Swift's own report of a crash takes half a minute, and ours must not need it.
    let command = wrapper + [ChildProcess.products + "/vxd"] + arguments
    child = try ChildProcess(
      command[0], Array(command.dropFirst()), environment: ["SWIFT_BACKTRACE": "enable=no"], output: descriptor)
  }

  /// kill -9, and waits for the end.
  func kill() {
    child?.kill()
    child = nil
  }

  /// Sends a signal to one of its threads, which has this name, and waits for the end of the process.
  ///
  /// - Returns: whether there was such a thread.
  func strike(_ signal: Int32, thread name: String) -> Bool {
    guard let child else { return false }
    let threads = TemporaryFolder.names("/proc/\(child.pid)/task").compactMap { pid_t($0) }
    guard let thread = threads.first(where: { Self.name(of: $0, in: child.pid) == name }) else { return false }
    // Glibc's module hides it, as GNU's own.
    typealias Signal = @convention(c) (pid_t, pid_t, Int32) -> Int32
    guard let symbol = dlsym(nil, "tgkill") else { return false }
    guard unsafeBitCast(symbol, to: Signal.self)(child.pid, thread, signal) == 0 else { return false }
    return child.wait(seconds: 20) != nil
  }

  private static func name(of thread: pid_t, in process: pid_t) -> String? {
    guard let file = fopen("/proc/\(process)/task/\(thread)/comm", "re") else { return nil }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 32)
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes.prefix(count).prefix { $0 != 10 }, as: UTF8.self)
  }

  /// Asks for a good end; the exit status, or nil when it does not come.
  func terminate(seconds: Int = 30) -> Int32? {
    child?.signal(SIGTERM)
    defer { kill() }
    return child?.wait(seconds: seconds)
  }
}
