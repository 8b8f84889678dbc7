package import EventLoop
package import Glibc

/// A program that a test runs beside itself. It gets no descriptor of the test's but its standard ones: everything else is closed on exec.
package final class ChildProcess {
  /// Where the programs of this build are: beside the tests, so that a sanitized test runs sanitized ones.
  package static let products: String = {
    var path = [CChar](repeating: 0, count: 4096)
    let count = readlink("/proc/self/exe", &path, path.count)
    let words = path.prefix(max(count, 0)).map { UInt8(bitPattern: $0) }.split(separator: UInt8(ascii: "/"))
    return "/" + words.dropLast().map { String(decoding: $0, as: UTF8.self) }.joined(separator: "/")
  }()

  /// The root of the repository.
  package static let repository = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")

  /// Whether a program is in one of PATH's folders: a test that needs one that is not there is skipped.
  package static func isInstalled(_ program: String) -> Bool {
    let folders = getenv("PATH").map { String(cString: $0) } ?? "/usr/bin:/bin"
    return folders.split(separator: ":").contains { access("\($0)/\(program)", X_OK) == 0 }
  }

  package private(set) var pid: pid_t = 0

  /// - Parameters:
  ///   - program: a path, or a name that PATH leads to.
  ///   - environment: on top of the test's own.
  ///   - input: its standard input; nothing can be read where it is nil.
  ///   - output: its standard output and error; those of the test where it is nil.
  package init(
    _ program: String, _ arguments: [String], environment: [String: String] = [:], input: Int32? = nil,
    output: Int32? = nil
  ) throws(Errno) {
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    if let input {
      posix_spawn_file_actions_adddup2(&actions, input, 0)
    } else {
      posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    }
    if let output {
      posix_spawn_file_actions_adddup2(&actions, output, 1)
      posix_spawn_file_actions_adddup2(&actions, output, 2)
    }
    var inherited: [String] = []
    var next = environ
    while let entry = next.pointee {
      let text = String(cString: entry)
      if !environment.keys.contains(where: { text.hasPrefix("\($0)=") }) { inherited.append(text) }
      next += 1
    }
    let words = ([program] + arguments).map { strdup($0) } + [nil]
    let variables = (inherited + environment.map { "\($0.key)=\($0.value)" }).map { strdup($0) } + [nil]
    defer { (words + variables).forEach { free($0) } }
    let result = posix_spawnp(&pid, program, &actions, nil, words, variables)
    guard result == 0 else { throw Errno(result) }
  }

  deinit { kill() }

  package func signal(_ number: Int32) {
    if pid > 0 { _ = Glibc.kill(pid, number) }
  }

  /// Ends it by SIGKILL, if it has not ended yet, and waits for its end.
  package func kill() {
    signal(SIGKILL)
    _ = wait()
  }

  /// Waits for its end.
  ///
  /// - Returns: its exit status, or 128 and the signal that ended it; -1 when it had been waited for already.
  @discardableResult
  package func wait() -> Int32 {
    guard pid > 0 else { return -1 }
    var status: Int32 = 0
    while waitpid(pid, &status, 0) == -1 && errno == EINTR {}
    pid = 0
    return Self.code(status)
  }

  /// Its exit status as `wait` gives it; nil while it runs for longer than that.
  package func wait(seconds: Int) -> Int32? {
    var status: Int32 = 0
    guard pid > 0, eventually(seconds: seconds, { waitpid(self.pid, &status, WNOHANG) == self.pid }) else { return nil }
    pid = 0
    return Self.code(status)
  }

  private static func code(_ status: Int32) -> Int32 {
    status & 0x7f == 0 ? status >> 8 & 0xff : 128 + status & 0x7f
  }

  /// Runs a program to its end; what it wrote, and its exit status.
  package static func run(
    _ program: String, _ arguments: [String], environment: [String: String] = [:]
  ) throws(Errno) -> (output: String, status: Int32) {
    let ends = try pair()
    defer { close(ends.near) }
    let child: ChildProcess
    do {
      defer { close(ends.far) }
      child = try ChildProcess(program, arguments, environment: environment, output: ends.far)
    }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      let count = read(ends.near, &buffer, buffer.count)
      if count < 0 && errno == EINTR { continue }
      if count <= 0 { break }
      bytes += buffer[..<count]
    }
    return (String(decoding: bytes, as: UTF8.self), child.wait())
  }

  /// Two ends of a connection, for what a program reads or writes; the caller closes them.
  package static func pair() throws(Errno) -> (near: Int32, far: Int32) {
    var ends: [Int32] = [-1, -1]
    guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0 else {
      throw Errno.last
    }
    return (ends[0], ends[1])
  }
}
