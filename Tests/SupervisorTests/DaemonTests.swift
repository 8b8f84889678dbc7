import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Xen

/// The daemon as a process: `vxd --simulate` with the real vxctl beside it.
@Suite(.serialized) struct DaemonTests {
  private func vxctl(_ arguments: [String]) throws -> (output: String, status: Int32) {
    try ChildProcess.run(ChildProcess.products + "/vxctl", arguments)
  }

  private func vxd(_ arguments: [String]) throws -> (output: String, status: Int32) {
    try ChildProcess.run(ChildProcess.products + "/vxd", arguments)
  }

  /// Runs `body` while `vxd --simulate` serves its guest.
  private func withDaemon(_ body: (_ socket: String, _ daemon: DaemonProcess) throws -> Void) throws {
    let folder = TemporaryFolder()
    let socket = folder.path + "/control.sock"
    let daemon = DaemonProcess(["--simulate", "--socket", socket], log: folder.path + "/log")
    try daemon.start()
    #expect(eventually { (try? ControlClient(path: socket)) != nil }, "\(daemon.report)")
    try body(socket, daemon)
    #expect(daemon.terminate() == 0, "\(daemon.report)")
    #expect(daemon.log.contains("stopped"))
    #expect(!daemon.log.contains("error"), "\(daemon.report)")
  }

  @Test func simulationShowsAGuestThatDoesIO() throws {
    try withDaemon { socket, daemon in
      let client = try ControlClient(path: socket)
      #expect(
        eventually {
          let device = try? client.call("device.get", ["guest": "demo", "device": "xvde"])
          return device?["counters"]?["flushes"]?.integerValue ?? 0 > 2
        }, "\(daemon.report)")
      let status = try vxctl(["status", "--socket", socket])
      #expect(status.status == 0)
      #expect(status.output.contains("demo/xvde  disk  connected"), "\(status.output)")
      let show = try vxctl(["show", "demo/xvde", "--json", "--socket", socket])
      #expect(try JSONText.parse(Array(show.output.utf8))["counters"]?["failed"] == 0)
      let events = try vxctl(["list", "nobody", "--socket", socket])
      #expect(events.status == 1)
      #expect(events.output.contains("there is no guest 'nobody'"))
    }
  }

  /// The simulated xenstored speaks the real protocol: Debian's own tool reads it.
  @Test(.enabled(if: ChildProcess.isInstalled("xenstore-ls"), "xenstore-ls (xenstore-utils) is not installed"))
  func xenstoreOfTheSimulationIsReadByDebiansOwnTool() throws {
    try withDaemon { _, daemon in
      func path() -> Substring? { daemon.log.split(separator: " ").first { $0.hasSuffix("/xenstored") } }
      #expect(eventually { path() != nil }, "\(daemon.report)")
      func tree() -> String {
        let result = try? ChildProcess.run(
          "xenstore-ls", ["-f", "/local/domain/0/backend"], environment: ["XENSTORED_PATH": String(path() ?? "")])
        return result?.output ?? ""
      }
      #expect(
        eventually { tree().contains("/local/domain/0/backend/virtio_disk/1/51776/state = \"4\"") }, "\(tree())")
    }
  }

  /// `vxctl top` in a real terminal: fills it, follows its size, ends at q and gives it back.
  @Test(.enabled(if: ChildProcess.isInstalled("tmux"), "tmux is not installed"))
  func topFillsATerminalAndGivesItBack() throws {
    try withDaemon { socket, _ in
      let session = "vxd-test-\(getpid())"
      func tmux(_ arguments: [String]) throws -> String {
        try ChildProcess.run("tmux", ["-L", session] + arguments, environment: ["TERM": "xterm"]).output
      }
      let command = "\(ChildProcess.products)/vxctl top --interval 0.3 --socket \(socket); echo ended with $?; cat"
      // Its server keeps what it was started with open, so it gets no pipe of ours.
      let start = try ChildProcess.run(
        "sh",
        [
          "-c",
          "tmux -L \(session) -f /dev/null new-session -d -x 100 -y 20 -s \(session) \"$1\" >/dev/null 2>&1 </dev/null",
          "sh", command,
        ], environment: ["TERM": "xterm"])
      #expect(start.status == 0, "\(start.output)")
      defer { _ = try? tmux(["kill-server"]) }
      func screen() -> String { (try? tmux(["capture-pane", "-p", "-t", session])) ?? "" }
      #expect(eventually { screen().contains("demo/xvde  connected") }, "\(screen())")
      // Work is seen: the guest writes ten blocks a second.
      #expect(
        eventually {
          let row = screen().split(separator: "\n").first { $0.hasPrefix("demo/xvde") }?.split(separator: " ") ?? []
          return row.count > 3 && Int(row[3]) ?? 0 > 0
        }, "\(screen())")
      #expect(screen().contains("by bytes"), "\(screen())")
      _ = try tmux(["send-keys", "-t", session, "n"])
      #expect(eventually { screen().contains("by name") }, "\(screen())")
      _ = try tmux(["resize-window", "-t", session, "-x", "40", "-y", "10"])
      #expect(
        eventually { screen().split(separator: "\n").allSatisfy { $0.count <= 40 } && screen().contains("demo/xvde") })
      _ = try tmux(["send-keys", "-t", session, "q"])
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
      let (text, status) = try vxctl(arguments + (takesSocket ? ["--socket", socket] : []))
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
    let command = "ulimit -n 150; exec \(ChildProcess.products)/vxd --simulate --socket \(socket)"
    let daemon = try ChildProcess("sh", ["-c", command], output: log)
    defer { daemon.kill() }
    let pid = daemon.pid
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
      let text = (try? ChildProcess.run("cat", ["\(tasks)/\(task)/stat"]).output) ?? ""
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
    let xenstore = try XenStore(socketPath: world.server.path)
    try xenstore.write("/local/domain/0/name", "Domain-0")
    let thread = try LoopThread(name: "backend")
    defer { thread.stopAndJoin() }
    let server = world.server.path
    thread.loop.enqueue {
      guard let xenstore = try? XenStore(socketPath: server) else { return }
      let folder = "/local/domain/0/backend/virtio_disk/5"
      guard eventually({ xenstore.list(folder)?.isEmpty == false }), let device = xenstore.list(folder)?.first else {
        return
      }
      try? xenstore.write("\(folder)/\(device)/error", "no\u{1b}[2J\u{1b}]0;owned\u{07}\u{9b}31m\u{202e}text")
    }
    let (text, status) = try ChildProcess.run(
      ChildProcess.products + "/vxctl",
      ["attach", "web1", "disk", "--image", "/x.img", "--backend", "0", "--wait", "20"],
      environment: ["XENSTORED_PATH": server])
    #expect(status == 1, "\(text)")
    #expect(text.contains(#"no\u001b[2J\u001b]0;owned\u0007\u009b31m\u202etext"#), "\(text)")
    #expect(text.unicodeScalars.allSatisfy { $0.value >= 32 && !(127..<160).contains($0.value) || $0 == "\n" })
  }

  /// Each verb is in the manual and in the completions, and each option of vxd in its manual.
  @Test func manualsAndCompletionsKnowEverything() throws {
    func text(_ path: String) throws -> String {
      try ChildProcess.run("cat", ["\(ChildProcess.repository)/\(path)"]).output.split(separator: "\\").joined()
    }
    let help = try vxctl(["--help"]).output
    let verbs = help.split(separator: "\n").drop { !$0.hasPrefix("SUBCOMMANDS:") }.dropFirst().compactMap { line in
      line.hasPrefix("  ") && !line.hasPrefix("   ") ? line.split(separator: " ").first.map(String.init) : nil
    }.filter { $0 != "See" && $0 != "help" }
    #expect(verbs.count >= 20, "\(verbs)")
    let manual = try text("deploy/man/vxctl.1")
    for verb in verbs where verb != "device" && verb != "config" {
      #expect(manual.contains(verb), "vxctl.1 does not know '\(verb)'")
    }
    for shell in ["bash", "zsh", "fish"] {
      let script = try vxctl(["--generate-completion-script", shell]).output
      for verb in verbs { #expect(script.contains(verb), "\(shell): \(verb)") }
    }
    let daemon = try text("deploy/man/vxd.8")
    let options = try vxd(["--help"]).output.split(whereSeparator: { " \n,;()".contains($0) }).filter {
      $0.hasPrefix("--")
    }
    #expect(options.count >= 10, "\(options)")
    for option in options { #expect(daemon.contains(option.prefix { $0 != "=" }), "vxd.8 does not know '\(option)'") }
  }

  /// systemd rates the unit's sandbox, and finds nothing in the units that it does not know.
  @Test(.enabled(if: ChildProcess.isInstalled("systemd-analyze"), "systemd-analyze is not installed"))
  func unitIsWellSandboxed() throws {
    let rating = try ChildProcess.run(
      "systemd-analyze",
      [
        "security", "--offline=yes", "--threshold=30", "--no-pager", ChildProcess.repository + "/deploy/vxd.service",
      ])
    #expect(rating.status == 0, "\(rating.output.suffix(2000))")
    #expect(rating.output.contains("Overall exposure level"))
    #expect(!rating.output.contains("Unknown key"))
  }

  /// What descriptors of a process lead to.
  private func openFiles(_ process: String = "self") throws -> Set<String> {
    let list = try ChildProcess.run("ls", ["-l", "/proc/\(process)/fd"]).output
    return Set(list.split(separator: "\n").compactMap { $0.split(separator: " ").last.map(String.init) })
  }

  /// A program that a test starts must not keep alive what the tests close.
  @Test func programsOfTestsInheritNoDescriptors() throws {
    let before = try openFiles("\(getpid())")
    let world = try World()
    defer { world.end() }
    try world.start()
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    // Those that have a name of their own: sockets and images.
    let ours = try openFiles("\(getpid())").subtracting(before).filter {
      !$0.hasPrefix("anon_inode") && $0 != "/dev/null"
    }
    #expect(ours.contains(world.folder.path + "/disk.img") && ours.contains { $0.hasPrefix("socket:") }, "\(ours)")
    let inherited = try openFiles().intersection(ours)
    #expect(inherited.isEmpty, "\(inherited)")
  }

  @Test func wrongUsageIsExplained() throws {
    let option = try vxd(["--slots", "99"])
    #expect(option.status == 2)
    #expect(option.output.contains("--slots: '99': expected an integer from 1 to 32"))
    let unreachable = try vxctl(["status", "--socket", "/nowhere"])
    #expect(unreachable.status == 2)
    #expect(unreachable.output.contains("cannot connect to vxd on /nowhere"))
    let device = try vxctl(["show", "web1"])
    #expect(device.status == 64)
    #expect(device.output.contains("GUEST/DEVICE"))
  }
}
