import ControlAPI
import Glibc
import TestSupport
import Testing

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
    #expect(daemon.log.contains("ended"))
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
    for option in options { #expect(daemon.contains(option), "vxd.8 does not know '\(option)'") }
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
    #expect(option.output.contains("--slots: '99' is no number from 1 to 32"))
    let unreachable = try vxctl(["status", "--socket", "/nowhere"])
    #expect(unreachable.status == 2)
    #expect(unreachable.output.contains("vxd does not answer on /nowhere"))
    let device = try vxctl(["show", "web1"])
    #expect(device.status == 64)
    #expect(device.output.contains("GUEST/DEVICE"))
  }
}
