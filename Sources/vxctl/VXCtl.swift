import ArgumentParser
import ControlAPI
import Glibc

/// The operator's tool: everything about running guests is one call on the control socket.
@main
struct VXCtl: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "vxctl", abstract: "Shows and steers vxd, the virtio driver-domain daemon for Xen.",
    discussion: """
      Exit codes: 0 done; 1 vxd refused or found trouble; 2 vxd cannot be reached; 64 wrong usage.
      Completions: vxctl --generate-completion-script bash (or zsh, fish).
      """,
    version: "0.2.0",
    subcommands: [
      Status.self, List.self, Show.self, Top.self, Events.self, Explain.self, Doctor.self, Attach.self, Detach.self,
      Reattach.self,
      Console.self, Link.self, Resize.self, Limit.self, Pause.self, Resume.self, Restart.self, Device.self, Config.self,
      Reload.self,
      MetricsVerb.self, LogLevelVerb.self, Shutdown.self, ACPITable.self,
    ])
}

/// Options that every verb on the socket has.
struct ConnectionOptions: ParsableArguments {
  @Option(help: "The daemon's control socket.")
  var socket = "/run/vxd/control.sock"

  @Flag(help: "Print the answer as JSON.")
  var json = false

  /// Connects and runs `body`; failures are printed and become exit codes.
  func run(_ body: (ControlClient) throws(ControlClient.Failure) -> Void) throws {
    do throws(ControlClient.Failure) {
      try body(try ControlClient(path: socket))
    } catch {
      var text = "vxctl: \(error.message)\n"
      if case .refused(let fault) = error, let remedy = fault.data["remedy"]?.stringValue {
        text += "       \(remedy)\n"
      }
      text = text.visible
      text.withUTF8 { _ = write(2, $0.baseAddress, $0.count) }
      if case .refused = error { throw ExitCode(1) }
      throw ExitCode(2)
    }
  }
}

/// Prints a value as JSON, indented.
func printJSON(_ value: JSONValue) { print(JSONText.text(value, pretty: true)) }
