import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Xen

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

  @Test(arguments: [
    ["top", "--count", "2", "--interval", "nan"], ["top", "--count", "2", "--interval", "1e300"],
    ["detach", "demo/xvde", "--deadline", "9223372036854775807"], ["detach", "demo/xvde", "--xenbus", "--deadline=-1"],
    ["console", "demo", "--seconds", "9223372036854775807"],
    ["attach", "demo", "disk", "--image", "/x", "--backend", "1", "--wait", "9223372036854775807"],
    ["reattach", "--backend", "1", "--wait=-9223372036854775808"],
  ]) func timesBeyondReasonAreRefused(arguments: [String]) throws {
    try withDaemon { socket, _ in
      let takesSocket = arguments[0] != "reattach"
      let (text, status) = run(Self.products + "/vxctl", arguments + (takesSocket ? ["--socket", socket] : []))
      #expect(status == 64, "\(text)")
      #expect(text.contains("expected a number of seconds from"), "\(text)")
    }
  }

  /// Nobody spins over a socket whose clients cannot be accepted.
  @Test func daemonWithoutDescriptorsRests() throws {
    let folder = TemporaryFolder()
    let socket = folder.path + "/control.sock"
    let log = open(folder.path + "/log", O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
    defer { close(log) }
    let command = "ulimit -n 150; exec \(Self.products)/vxd --simulate --socket \(socket)"
    let pid = spawn("sh", ["-c", command], [:], output: log, other: -1)
    defer {
      kill(pid, SIGKILL)
      var status: Int32 = 0
      waitpid(pid, &status, 0)
    }
    #expect(eventually { (try? ControlClient(path: socket)) != nil })
    // They wait in the socket's queue once the daemon has no descriptor left.
    var clients: [Int32] = []
    defer { for client in clients { close(client) } }
    #expect(eventually { access(folder.path + "/metrics.sock", F_OK) == 0 })
    let isFull = eventually {
      if let client = try? UnixSocket.connect(socket, nonBlocking: true) { clients.append(client) }
      // Twice: one alone may be a descriptor that is on its way out.
      return (0..<2).allSatisfy { _ in TemporaryFolder.names("/proc/\(pid)/fd").count >= 150 }
    }
    #expect(isFull, "\(clients.count) clients")
    for _ in 0..<10 { clients.append(try UnixSocket.connect(folder.path + "/metrics.sock", nonBlocking: true)) }
    let before = try #require(ticks(of: "vxd-metrics", in: pid))
    // What is measured: the work of this time.
    sleep(2)
    let after = try #require(ticks(of: "vxd-metrics", in: pid))
    #expect(after - before < 10, "\(after - before) hundredths of a second of work within two seconds")
  }

  /// Hundredths of a second that a thread of a process has run.
  private func ticks(of thread: String, in pid: pid_t) -> Int? {
    let tasks = "/proc/\(pid)/task"
    for task in TemporaryFolder.names(tasks) {
      let text = run("cat", ["\(tasks)/\(task)/stat"]).0
      guard text.contains("(\(thread))"), let rest = text.split(separator: ")").last else { continue }
      let words = rest.split(separator: " ")
      // User and system time: fields 14 and 15 of the line.
      return words.count > 12 ? Int(words[11]).flatMap { user in Int(words[12]).map { user + $0 } } : nil
    }
    return nil
  }

  /// A driver domain owns its nodes, and dom0's operator looks at them.
  @Test func wordsOfADriverDomainDoNothingToATerminal() throws {
    let world = try World()
    defer { world.end() }
    _ = try world.domain(5, name: "web1", type: "pvh")
    let store = try XenStore(socketPath: world.server.path)
    try store.write("/local/domain/0/name", "Domain-0")
    let thread = try LoopThread(name: "backend")
    defer { thread.stopAndJoin() }
    let server = world.server.path
    thread.loop.enqueue {
      guard let store = try? XenStore(socketPath: server) else { return }
      let folder = "/local/domain/0/backend/virtio_disk/5"
      guard eventually({ store.list(folder)?.isEmpty == false }), let device = store.list(folder)?.first else { return }
      try? store.write("\(folder)/\(device)/error", "no\u{1b}[2J\u{1b}]0;owned\u{07}\u{9b}31m\u{202e}text")
    }
    let (text, status) = run(
      Self.products + "/vxctl", ["attach", "web1", "disk", "--image", "/x.img", "--backend", "0", "--wait", "20"],
      environment: ["XENSTORED_PATH": server])
    #expect(status == 1, "\(text)")
    #expect(text.contains(#"no\u001b[2J\u001b]0;owned\u0007\u009b31m\u202etext"#), "\(text)")
    #expect(text.unicodeScalars.allSatisfy { $0.value >= 32 && !(127..<160).contains($0.value) || $0 == "\n" })
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
      #expect(daemon.contains(word), "vxd.8 does not know '\(word)'")
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
    #expect(option.0.contains("--slots: '99' is no number from 1 to 32"))
    let unreachable = run(Self.products + "/vxctl", ["status", "--socket", "/nowhere"])
    #expect(unreachable.1 == 2)
    #expect(unreachable.0.contains("vxd does not answer on /nowhere"))
    let device = run(Self.products + "/vxctl", ["show", "web1"])
    #expect(device.1 == 64)
    #expect(device.0.contains("GUEST/DEVICE"))
  }
}
