import ArgumentParser
import ControlAPI
import Glibc

/// The operator's tool: everything about running guests is one call on the control socket.
@main
struct VXCtl: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "vxctl", abstract: "Inspect and control vxd, the virtio daemon for Xen guests.",
    discussion: """
      GUEST is a name or a domain number; write 'name:web1' or 'id:7' if a word could mean either. DEVICE is a name such as xvde or net0.
      Exit status: 0 success; 1 vxd refused the request, or a problem was found; 2 vxd cannot be reached; 64 wrong usage.
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
      let asJSON = CommandLine.arguments.contains("--json")
      // The parser takes a verb that it does not know for an argument, and complains of the first option behind it.
      let unknown = isUsage ? unknownVerb(Array(CommandLine.arguments.dropFirst())) : nil
      guard isUsage, asJSON || unknown != nil else { exit(withError: error) }
      Trouble(.usage, unknown ?? message(for: error)).report(json: asJSON)
      Glibc.exit(Trouble.Kind.usage.exitCode)
    }
  }

  /// What is wrong with the verb of a command line that is not understood; nil when the verb is known or missing.
  private static func unknownVerb(_ arguments: [String]) -> String? {
    var command: any ParsableCommand.Type = VXCtl.self
    for word in arguments where !word.hasPrefix("-") {
      let verbs = command.configuration.subcommands
      guard !verbs.isEmpty, word != "help" else { return nil }
      guard let next = verbs.first(where: { $0._commandName == word }) else {
        return "unknown verb '\(word)': expected one of \(verbs.map { $0._commandName }.joined(separator: ", "))"
      }
      command = next
    }
    return nil
  }
}

/// Options that every verb on the socket has.
struct ConnectionOptions: ParsableArguments {
  @Option(
    name: .shortAndLong, help: "The daemon's control socket (default: /run/vxd/control.sock).", transform: Value.path)
  var socket = "/run/vxd/control.sock"

  @Option(
    help:
      "In dom0: talk to the vxd in this driver domain (name or number), through Xenstore, instead of to the socket.",
    transform: GuestName.value
  )
  var domain: GuestName?

  @Flag(help: "Print the answer, and any error, as JSON.")
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
