import ControlAPI
import Glibc

/// What vxctl writes for people. Names, reasons and paths come from guests, other domains and the daemon: no control character of theirs
/// reaches a terminal, where it could move the cursor, retitle the window or forge a line.
enum Output {
  /// One line (or several, separated by newlines of ours) on standard output.
  static func line(_ text: String) { write(1, printable(text, keepsLines: true) + "\n") }

  /// A message on standard error, which begins with the program's name; its remedy stands below.
  static func complain(_ message: String, remedy: String? = nil) {
    let lines = ["vxctl: \(printable(message))"] + (remedy.map { ["       \(printable($0))"] } ?? [])
    write(2, lines.joined(separator: "\n") + "\n")
  }

  /// A value as JSON, indented. json-c escapes what is below 0x20 only; the rest stands within strings alone, where JSON's escapes mean the
  /// same.
  static func json(_ value: JSONValue, pretty: Bool = true) {
    write(1, JSONText.text(value, pretty: pretty).visible(keepsLines: true) + "\n")
  }

  /// A foreign string as it may be shown, see `String.visible`.
  ///
  /// - Parameter keepsLines: newlines are ours and stay.
  static func printable(_ text: String, keepsLines: Bool = false) -> String { text.visible(keepsLines: keepsLines) }

  /// Writes all of it. A reader that went away ends the program (SIGPIPE).
  static func write(_ descriptor: Int32, _ text: String) {
    let bytes = Array(text.utf8)
    var done = 0
    while done < bytes.count {
      let count = bytes.withUnsafeBytes {
        Glibc.write(descriptor, $0.baseAddress.map { $0 + done }, bytes.count - done)
      }
      if count < 0 && errno == EINTR { continue }
      guard count > 0 else { return }
      done += count
    }
  }
}

/// Why a command did not do what it was asked to, for people and, with --json, for programs:
///
///     {"error": {"kind": "refused", "message": "...", "code": -32001, "data": {"field": "params.guest", "remedy": "..."}}}
struct Trouble: Error {
  enum Kind: String {
    /// The daemon refused, or the change failed.
    case refused
    /// The daemon, or Xenstore, cannot be reached.
    case unreachable
    /// No usable answer in time.
    case noAnswer
    /// The command line is wrong.
    case usage

    /// vxctl's exit status.
    var exitCode: Int32 {
      switch self {
      case .refused: 1
      case .unreachable, .noAnswer: 2
      case .usage: 64
      }
    }
  }

  var kind: Kind
  var message: String
  /// The daemon's error code, where it is the daemon's error.
  var code: Int64?
  var data: JSONValue = .null

  init(_ kind: Kind, _ message: String, remedy: String? = nil) {
    self.kind = kind
    self.message = message
    if let remedy { data = ["remedy": .string(remedy)] }
  }

  /// - Parameter reason: why a driver domain has ended the connection, as far as it said so.
  init(_ failure: ControlClient.Failure, ended reason: String? = nil) {
    switch failure {
    case .protocolBroken where reason != nil: self.init(.noAnswer, "vxd has ended the connection: \(reason ?? "")")
    case .unreachable, .domainUnreachable: self.init(.unreachable, failure.message)
    case .protocolBroken: self.init(.noAnswer, failure.message)
    case .refused(let fault):
      self.init(.refused, fault.message)
      code = fault.code
      data = fault.data
    }
  }

  var json: JSONValue { ["error": error] }

  /// As the member `error` of an answer, or of a report's row that it is the reason of.
  var error: JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "kind", value: .string(kind.rawValue)), .init(name: "message", value: .string(message)),
    ]
    if let code { members.append(.init(name: "code", value: .integer(code))) }
    if data != .null { members.append(.init(name: "data", value: data)) }
    return .object(members)
  }

  /// Tells it: as JSON on standard output, where the answer would have been, or in words on standard error.
  func report(json asJSON: Bool) {
    if asJSON { Output.json(json) } else { Output.complain(message, remedy: data["remedy"]?.stringValue) }
  }
}
