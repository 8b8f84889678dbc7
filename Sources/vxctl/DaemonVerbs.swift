import ArgumentParser
import ControlAPI
import EventLoop
import Glibc

/// Reads a file, or standard input for "-".
func readText(_ path: String) throws -> [UInt8] {
  guard let file = fopen(path == "-" ? "/dev/stdin" : path, "re") else {
    throw ValidationError("cannot read '\(path)': \(String(cString: strerror(errno)))")
  }
  defer { fclose(file) }
  var text: [UInt8] = []
  var piece = [UInt8](repeating: 0, count: 65536)
  while case let count = fread(&piece, 1, piece.count, file), count > 0 { text += piece[..<count] }
  return text
}

/// `vxctl config check|diff|reload`: profiles before and after they are used.
struct Config: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Check a profiles file, show what it would change, or apply it.",
    subcommands: [Check.self, Difference.self, Reload.self])

  static func value(_ path: String) throws -> JSONValue {
    let text = try readText(path)
    do throws(JSONText.Fault) {
      return try JSONText.parse(text)
    } catch {
      throw ValidationError("'\(path)' is not JSON: \(error.message)")
    }
  }

  struct Check: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Check a profiles file, and report the first mistake.")

    @OptionGroup var connection: ConnectionOptions
    @Argument(
      help: "The file, or - for standard input (default: /etc/vxd/profiles.json).",
      transform: Value.text("a path, or - for standard input"))
    var file = "/etc/vxd/profiles.json"

    func run() throws {
      let value = try Config.value(file)
      try connection.run { client throws(ControlClient.Failure) in
        let answer = try client.call("config.check", ["profiles": value])
        if connection.json { Output.json(answer) } else { Output.line("\(file) is correct") }
      }
    }
  }

  struct Difference: ParsableCommand {
    static let configuration = CommandConfiguration(
      commandName: "diff",
      abstract: "Show what a profiles file would change for the running devices once they are reopened.")

    @OptionGroup var connection: ConnectionOptions
    @Argument(
      help: "The file, or - for standard input (default: /etc/vxd/profiles.json).",
      transform: Value.text("a path, or - for standard input"))
    var file = "/etc/vxd/profiles.json"

    func run() throws {
      let value = try Config.value(file)
      try connection.run { client throws(ControlClient.Failure) in
        let answer = try client.call("config.diff", ["profiles": value])
        if connection.json { return Output.json(answer) }
        for device in answer.arrayValue ?? [] {
          Output.line("\(device.cell("guest"))/\(device.cell("device"))")
          for change in device["changes"]?.arrayValue ?? [] {
            Output.line("  \(Output.printable(change.stringValue ?? ""))")
          }
        }
        if answer.arrayValue?.isEmpty != false { Output.line("nothing changes") }
      }
    }
  }
}

/// `vxctl reload`: reads the profiles again.
struct Reload: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract:
      "Read the profiles again. Limits and restart policies apply at once, other options to devices that are opened later."
  )

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions

  func run() throws { try Outcome.change(connection, "config.reload", of: .daemon, options) }
}

/// `vxctl log-level LEVEL`.
struct LogLevelVerb: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "log-level", abstract: "Set the log level of vxd: debug, info, notice, warning, error, critical.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  enum Level: String, CommandValue, CaseIterable {
    case debug, info, notice, warning, error, critical
  }

  @Argument(
    help: "The lowest level to log.", completion: .list(Level.allCases.map(\.rawValue)), transform: Level.value)
  var level: Level

  func run() throws {
    try Outcome.change(
      connection, "log.level", of: .daemon, options, [.init(name: "level", value: .string(level.rawValue))])
  }
}

/// `vxctl shutdown`: the end of the daemon.
struct Shutdown: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Stop vxd. Guests keep their devices and wait for the next vxd; with --end, they lose them.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Flag(help: "Remove all devices for good: running guests get I/O errors.")
  var end = false

  func run() throws {
    try Outcome.change(connection, "system.shutdown", of: .daemon, options, [.init(name: "end", value: .bool(end))])
  }
}

/// `vxctl metrics`: what Prometheus reads.
struct MetricsVerb: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "metrics", abstract: "Print the metrics in OpenMetrics format.")

  @OptionGroup var connection: ConnectionOptions
  @Option(
    help: "The daemon's metrics socket (default: /run/vxd/metrics.sock); not used with --domain or --json.",
    transform: Value.path)
  var metricsSocket = "/run/vxd/metrics.sock"

  func run() throws {
    guard connection.domain == nil, !connection.json else {
      return try connection.run { client throws(ControlClient.Failure) in
        let answer = try client.call("system.metrics")
        if connection.json { return Output.json(answer) }
        Output.write(1, Output.printable(answer["text"]?.stringValue ?? "", keepsLines: true))
      }
    }
    let raw: Int32
    do throws(Errno) {
      raw = try UnixSocket.connect(metricsSocket)
    } catch {
      Output.complain(
        "cannot connect to \(metricsSocket): \(error)",
        remedy: "is vxd running (systemctl status vxd)? Is --metrics-socket right?")
      throw ExitCode(2)
    }
    defer { close(raw) }
    Output.write(raw, "GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text\r\n\r\n")
    var answer: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while case let count = read(raw, &buffer, buffer.count), count > 0 { answer += buffer[..<count] }
    let head = (0..<max(0, answer.count - 3)).first { answer[$0..<($0 + 4)].elementsEqual([13, 10, 13, 10]) }
    guard let head, String(decoding: answer.prefix(13), as: UTF8.self) == "HTTP/1.0 200 " else {
      Output.complain(
        "no usable answer on \(metricsSocket): '\(String(decoding: answer.prefix { $0 != 13 }, as: UTF8.self))'")
      throw ExitCode(2)
    }
    Output.write(1, Output.printable(String(decoding: answer[(head + 4)...], as: UTF8.self), keepsLines: true))
  }
}
