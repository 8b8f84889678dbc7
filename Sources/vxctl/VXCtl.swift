import ArgumentParser
import ControlAPI
import Glibc

/// The operator's tool: everything about running guests is one call on the control socket.
@main
struct VXCtl: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "vxctl", abstract: "Inspect and control vxd, the virtio daemon for Xen guests.",
    discussion: """
      GUEST is a name or a domain number; 'name:web1' or 'id:7' where it could be either. DEVICE is a name such as xvde or net0.
      Exit status: 0 success; 1 vxd refused, or a problem was found; 2 vxd cannot be reached; 64 wrong usage.
      With --json, errors are JSON too: {"error": {"kind": ..., "message": ..., "data": ...}} on standard output.
      Completions: vxctl --generate-completion-script bash (or zsh, fish).
      """,
    version: "0.3.0",
    subcommands: [
      Status.self, List.self, Show.self, Top.self, Events.self, Explain.self, Doctor.self, Attach.self, Detach.self,
      Reattach.self, Identify.self,
      Console.self, Link.self, Resize.self, Limit.self, Pause.self, Resume.self, Restart.self, Device.self, Config.self,
      Reload.self,
      MetricsVerb.self, LogLevelVerb.self, Shutdown.self, ACPITable.self, ApplianceConfig.self,
    ])

  /// As ArgumentParser does it, but for mistakes on the command line, which --json makes JSON too.
  static func main() {
    do {
      var command = try parseAsRoot()
      try command.run()
    } catch {
      let isUsage = exitCode(for: error) == .validationFailure
      guard isUsage, CommandLine.arguments.contains("--json") else { exit(withError: error) }
      Trouble(.usage, message(for: error)).report(json: true)
      Glibc.exit(Trouble.Kind.usage.exitCode)
    }
  }
}

/// Options that every verb on the socket has.
struct ConnectionOptions: ParsableArguments {
  @Option(name: .shortAndLong, help: "The daemon's control socket.")
  var socket = "/run/vxd/control.sock"

  @Option(
    help:
      "In dom0: speak to the vxd of this driver domain (name or number) instead, through Xenstore; no network is needed."
  )
  var domain: GuestName?

  @Flag(help: "Print the answer as JSON; errors too.")
  var json = false

  /// Connects and runs `body`; failures are reported and become exit codes.
  func run(_ body: (ControlClient) throws(ControlClient.Failure) -> Void) throws {
    var channel: DomainChannel?
    do throws(ControlClient.Failure) {
      let connected = try connect()
      channel = connected.1
      try body(connected.0)
      _ = channel?.close()
    } catch {
      let trouble = Trouble(error, ended: channel?.close())
      trouble.report(json: json)
      throw ExitCode(trouble.kind.exitCode)
    }
  }
}

/// Refuses a number outside its range, before anything is computed with it.
func check<Number: Comparable>(_ option: String, _ value: Number?, _ range: ClosedRange<Number>) throws {
  guard let value, !range.contains(value) else { return }
  throw ValidationError("\(option): \(value): expected a number from \(range.lowerBound) to \(range.upperBound)")
}
