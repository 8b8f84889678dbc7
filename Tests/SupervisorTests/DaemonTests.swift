import ControlAPI
import Glibc
import TestSupport
import Testing

/// The daemon as a process: `vxd --simulate` with the real vxctl and the real xenstore-ls beside it.
@Suite(.serialized) struct DaemonTests {
  private static let products =
    "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/") + "/.build/debug"

  /// Runs a program to its end; its output and exit status.
  private func run(_ program: String, _ arguments: [String], environment: [String: String] = [:]) -> (String, Int32) {
    var ends: [Int32] = [0, 0]
    // Closed on exec: a server that a program leaves behind must not hold the other end open.
    guard pipe(&ends) == 0 else { return ("", -1) }
    for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
    let pid = spawn(program, arguments, environment, output: ends[1], other: ends[0])
    close(ends[1])
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 4096)
    while true {
      let count = read(ends[0], &buffer, buffer.count)
      if count <= 0 { break }
      bytes += buffer[..<count]
    }
    close(ends[0])
    var status: Int32 = 0
    waitpid(pid, &status, 0)
    return (String(decoding: bytes, as: UTF8.self), status >> 8 & 0xff)
  }

  private func spawn(
    _ program: String, _ arguments: [String], _ environment: [String: String], output: Int32, other: Int32
  ) -> pid_t {
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, output, 1)
    posix_spawn_file_actions_adddup2(&actions, output, 2)
    if other >= 0 { posix_spawn_file_actions_addclose(&actions, other) }
    func strings(_ list: [String]) -> [UnsafeMutablePointer<CChar>?] { list.map { strdup($0) } + [nil] }
    let words = strings([program] + arguments)
    let variables = strings(environment.map { "\($0.key)=\($0.value)" } + ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"])
    defer { (words + variables).forEach { free($0) } }
    var pid: pid_t = 0
    let result = posix_spawnp(&pid, program, &actions, nil, words, variables)
    #expect(result == 0, "\(program) cannot be started")
    return pid
  }

  /// Runs `body` while `vxd --simulate` serves its guest.
  private func withDaemon(_ body: (_ socket: String, _ log: () -> String) throws -> Void) throws {
    let folder = TemporaryFolder()
    let socket = folder.path + "/control.sock"
    let logPath = folder.path + "/log"
    let descriptor = open(logPath, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
    let pid = spawn(
      Self.products + "/vxd", ["--simulate", "--socket", socket], [:], output: descriptor, other: -1)
    func log() -> String {
      var buffer = [UInt8](repeating: 0, count: 65536)
      let count = pread(descriptor, &buffer, buffer.count, 0)
      return String(decoding: buffer[..<max(count, 0)], as: UTF8.self)
    }
    #expect(eventually { (try? ControlClient(path: socket)) != nil }, "\(log())")
    try body(socket, log)
    kill(pid, SIGTERM)
    var status: Int32 = 0
    #expect(eventually { waitpid(pid, &status, WNOHANG) == pid }, "vxd does not end: \(log())")
    #expect(status == 0, "\(log())")
    #expect(log().contains("ended"))
    #expect(!log().contains("error"), "\(log())")
    close(descriptor)
  }

  @Test func simulationShowsAGuestThatDoesIO() throws {
    try withDaemon { socket, log in
      let client = try ControlClient(path: socket)
      #expect(
        eventually {
          let device = try? client.call("device.get", ["guest": "demo", "device": "xvde"])
          return device?["counters"]?["flushes"]?.integerValue ?? 0 > 2
        }, "\(log())")
      let status = run(Self.products + "/vxctl", ["status", "--socket", socket])
      #expect(status.1 == 0)
      #expect(status.0.contains("demo/xvde  disk  connected"), "\(status.0)")
      let show = run(Self.products + "/vxctl", ["show", "demo/xvde", "--json", "--socket", socket])
      #expect(try JSONText.parse(Array(show.0.utf8))["counters"]?["failed"] == 0)
      let events = run(Self.products + "/vxctl", ["list", "nobody", "--socket", socket])
      #expect(events.1 == 1)
      #expect(events.0.contains("there is no guest 'nobody'"))
      // The simulated xenstored speaks the real protocol: Debian's own tool reads it.
      let store = try #require(log().split(separator: " ").first { $0.hasSuffix("/xenstored") })
      let tree = run("xenstore-ls", ["-f", "/local/domain/0/backend"], environment: ["XENSTORED_PATH": String(store)])
      #expect(tree.0.contains("/local/domain/0/backend/virtio_disk/1/51776/state = \"4\""), "\(tree.0)")
    }
  }

  /// `vxctl top` in a real terminal: fills it, follows its size, ends at q and gives it back.
  @Test func topFillsATerminalAndGivesItBack() throws {
    try withDaemon { socket, _ in
      let session = "vxd-test-\(getpid())"
      let tmux = ["-L", session]
      let command = "\(Self.products)/vxctl top --interval 0.3 --socket \(socket); echo ended with $?; cat"
      // Its server keeps what it was started with open, so it gets no pipe of ours.
      let start = run(
        "sh",
        [
          "-c",
          "tmux -L \(session) -f /dev/null new-session -d -x 100 -y 20 -s \(session) \"$1\" >/dev/null 2>&1 </dev/null",
          "sh",
          command,
        ], environment: ["TERM": "xterm"])
      #expect(start.1 == 0, "\(start.0)")
      defer { _ = run("tmux", tmux + ["kill-server"]) }
      func screen() -> String { run("tmux", tmux + ["capture-pane", "-p", "-t", session]).0 }
      #expect(eventually { screen().contains("demo/xvde  connected") }, "\(screen())")
      // Work is seen: the guest writes ten blocks a second.
      #expect(
        eventually {
          let row = screen().split(separator: "\n").first { $0.hasPrefix("demo/xvde") }?.split(separator: " ") ?? []
          return row.count > 3 && Int(row[3]) ?? 0 > 0
        }, "\(screen())")
      _ = run("tmux", tmux + ["resize-window", "-t", session, "-x", "40", "-y", "10"])
      #expect(
        eventually { screen().split(separator: "\n").allSatisfy { $0.count <= 40 } && screen().contains("demo/xvde") })
      _ = run("tmux", tmux + ["send-keys", "-t", session, "n"])
      #expect(eventually { screen().contains("by name") || screen().contains("vxd 0.2.0") })
      _ = run("tmux", tmux + ["send-keys", "-t", session, "q"])
      #expect(eventually { screen().contains("ended with 0") && !screen().contains("demo/xvde") }, "\(screen())")
    }
  }

  /// Each verb is in the manual and in the completions, and each option of vxd in its manual.
  @Test func manualsAndCompletionsKnowEverything() throws {
    let root = Self.products.split(separator: "/").dropLast(2).joined(separator: "/")
    func text(_ path: String) -> String { run("cat", ["/\(root)/\(path)"]).0.split(separator: "\\").joined() }
    let help = run(Self.products + "/vxctl", ["--help"]).0
    let verbs = help.split(separator: "\n").drop { !$0.hasPrefix("SUBCOMMANDS:") }.dropFirst().compactMap { line in
      line.hasPrefix("  ") && !line.hasPrefix("   ") ? line.split(separator: " ").first.map(String.init) : nil
    }.filter { $0 != "See" && $0 != "help" }
    #expect(verbs.count >= 20, "\(verbs)")
    let manual = text("deploy/man/vxctl.1")
    for verb in verbs where verb != "device" && verb != "config" {
      #expect(manual.contains(verb), "vxctl.1 does not know '\(verb)'")
    }
    for shell in ["bash", "zsh", "fish"] {
      let script = run(Self.products + "/vxctl", ["--generate-completion-script", shell]).0
      for verb in verbs { #expect(script.contains(verb), "\(shell): \(verb)") }
    }
    let daemon = text("deploy/man/vxd.8")
    for word in run(Self.products + "/vxd", ["--help"]).0.split(whereSeparator: { " \n,;()".contains($0) })
    where word.hasPrefix("--") {
      #expect(daemon.contains(word.prefix { $0 != "=" }), "vxd.8 does not know '\(word)'")
    }
  }

  /// systemd rates the unit's sandbox, and finds nothing in the units that it does not know.
  @Test func unitIsWellSandboxed() throws {
    let root = "/" + Self.products.split(separator: "/").dropLast(2).joined(separator: "/")
    let rating = run(
      "systemd-analyze", ["security", "--offline=yes", "--threshold=30", "--no-pager", root + "/deploy/vxd.service"])
    #expect(rating.1 == 0, "\(rating.0.suffix(2000))")
    #expect(rating.0.contains("Overall exposure level"))
    #expect(!rating.0.contains("Unknown key"))
  }

  @Test func wrongUsageIsExplained() {
    let option = run(Self.products + "/vxd", ["--slots", "99"])
    #expect(option.1 == 2)
    #expect(option.0.contains("--slots: '99': expected an integer from 1 to 32"))
    let unreachable = run(Self.products + "/vxctl", ["status", "--socket", "/nowhere"])
    #expect(unreachable.1 == 2)
    #expect(unreachable.0.contains("cannot connect to vxd on /nowhere"))
    let device = run(Self.products + "/vxctl", ["show", "web1"])
    #expect(device.1 == 64)
    #expect(device.0.contains("GUEST/DEVICE"))
  }
}
