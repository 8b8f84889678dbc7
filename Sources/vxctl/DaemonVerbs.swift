import ArgumentParser
import ControlAPI
import EventLoop
import Glibc

/// Reads a file, or standard input for "-".
func readText(_ path: String) throws -> [UInt8] {
  guard let file = fopen(path == "-" ? "/dev/stdin" : path, "re") else {
    throw ValidationError("'\(path)' cannot be read: \(String(cString: strerror(errno)))")
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
    abstract: "Profiles: check a file, see what it would change, use it.",
    subcommands: [Check.self, Difference.self, Reload.self])

  static func value(_ path: String) throws -> JSONValue {
    let text = try readText(path)
    do throws(JSONText.Fault) {
      return try JSONText.parse(text)
    } catch {
      throw ValidationError("'\(path)' is no JSON: \(error)")
    }
  }

  struct Check: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Checks a file of profiles, and names what is wrong.")

    @OptionGroup var connection: ConnectionOptions
    @Argument(help: "The file; - for standard input.")
    var file = "/etc/vxd/profiles.json"

    func run() throws {
      let value = try Config.value(file)
      try connection.run { client throws(ControlClient.Failure) in
        let answer = try client.call("config.check", ["profiles": value])
        if connection.json { printJSON(answer) } else { print("\(file) is correct") }
      }
    }
  }

  struct Difference: ParsableCommand {
    static let configuration = CommandConfiguration(
      commandName: "diff",
      abstract: "What a file of profiles would change of the running devices, when those are opened again.")

    @OptionGroup var connection: ConnectionOptions
    @Argument(help: "The file; - for standard input.")
    var file = "/etc/vxd/profiles.json"

    func run() throws {
      let value = try Config.value(file)
      try connection.run { client throws(ControlClient.Failure) in
        let answer = try client.call("config.diff", ["profiles": value])
        if connection.json { return printJSON(answer) }
        for device in answer.arrayValue ?? [] {
          print("\(device.cell("guest"))/\(device.cell("device"))")
          for change in device["changes"]?.arrayValue ?? [] { print("  \(change.stringValue ?? "")") }
        }
        if answer.arrayValue?.isEmpty != false { print("nothing changes") }
      }
    }
  }
}

/// `vxctl reload`: the profiles anew.
struct Reload: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract:
      "Reads the profiles again: for the disks that are opened from now on; limits and restart policies hold at once.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions

  func run() throws { try Outcome.change(connection, "config.reload", [], options) }
}

/// `vxctl log-level LEVEL`.
struct LogLevelVerb: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "log-level", abstract: "Changes what vxd logs: debug, info, notice, warning, error, critical.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "The lowest level that is logged.")
  var level: String

  func run() throws {
    try Outcome.change(connection, "log.level", [.init(name: "level", value: .string(level))], options)
  }
}

/// `vxctl shutdown`: the end of the daemon.
struct Shutdown: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Ends vxd: guests keep their devices and wait for the next one, or lose them with --end.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Flag(help: "End the devices for good: guests that run get I/O errors.")
  var end = false

  func run() throws {
    try Outcome.change(connection, "system.shutdown", [.init(name: "end", value: .bool(end))], options)
  }
}

/// `vxctl metrics`: what Prometheus reads.
struct MetricsVerb: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "metrics", abstract: "Prints the metrics, as OpenMetrics text.")

  @Option(help: "The daemon's metrics socket.")
  var metricsSocket = "/run/vxd/metrics.sock"

  func run() throws {
    let raw: Int32
    do {
      raw = try UnixSocket.connect(metricsSocket)
    } catch {
      print("vxctl: vxd does not answer on \(metricsSocket): \(error)")
      throw ExitCode(2)
    }
    defer { close(raw) }
    var request = Array("GET /metrics HTTP/1.0\r\n\r\n".utf8)
    _ = write(raw, &request, request.count)
    var answer: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while case let count = read(raw, &buffer, buffer.count), count > 0 { answer += buffer[..<count] }
    let end = (0..<max(0, answer.count - 3)).first { Array(answer[$0..<($0 + 4)]) == [13, 10, 13, 10] } ?? 0
    print(String(decoding: answer[min(end + 4, answer.count)...], as: UTF8.self), terminator: "")
  }
}
