import Glibc
import TestSupport
import Testing

/// A program that was run to its end: what it wrote on both outputs, and its exit status.
struct ProgramRun {
  var output = ""
  var errors = ""
  var status: Int32 = -1

  /// A program of this build.
  static func path(_ program: String) -> String { "\(ChildProcess.products)/\(program)" }

  static func vxctl(_ arguments: String...) -> ProgramRun { ProgramRun(path("vxctl"), arguments) }

  init(_ program: String, _ arguments: [String]) {
    let folder = TemporaryFolder()
    let descriptors = ["output", "errors"].map {
      open("\(folder.path)/\($0)", O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
    }
    defer { for descriptor in descriptors { close(descriptor) } }
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, descriptors[0], 1)
    posix_spawn_file_actions_adddup2(&actions, descriptors[1], 2)
    let words: [UnsafeMutablePointer<CChar>?] = ([program] + arguments).map { strdup($0) } + [nil]
    defer { words.forEach { free($0) } }
    var pid: pid_t = 0
    guard posix_spawn(&pid, program, &actions, nil, words, environ) == 0 else { return }
    var code: Int32 = 0
    let ended = eventually(seconds: 60) { waitpid(pid, &code, WNOHANG) == pid }
    if !ended {
      kill(pid, SIGKILL)
      waitpid(pid, &code, 0)
    }
    // Of a signal: 128 and its number, as a shell has it.
    status = code & 0x7f == 0 ? code >> 8 & 0xff : 128 + code & 0x7f
    output = Self.text(descriptors[0])
    errors = Self.text(descriptors[1])
  }

  private static func text(_ descriptor: Int32) -> String {
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    let count = pread(descriptor, &bytes, bytes.count, 0)
    return String(decoding: bytes[..<max(count, 0)], as: UTF8.self)
  }
}
