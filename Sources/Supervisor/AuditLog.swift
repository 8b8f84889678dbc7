package import ControlAPI
import EventLoop
package import Logging
import Synchronization

/// Writes down who asked for which change on the control socket: a line in the log for each, with fields for the journal
/// (`journalctl -u vxd VXD_METHOD=device.attach`, `CALLER_UID=1000`, `GUEST=web1`).
package final class AuditLog: Sendable {
  /// Bytes of what a client wrote that a line has at most.
  private static let textLimit = 256
  /// Users whose refused requests are counted one by one; further ones are counted together.
  private static let userLimit = 64

  private let log: Logger
  private let board: StatusBoard
  /// Lines about requests that were refused, by user: anyone who can connect can cause them.
  private let quotas = Mutex<[UInt32: LineQuota]>([:])

  package init(_ log: Logger, _ board: StatusBoard) {
    self.log = log
    self.board = board
  }

  package func write(_ entry: ControlAudit) {
    let who = Self.who(entry.caller)
    let result: String
    let text: String
    switch entry.outcome {
    case .accepted(let summary):
      result = "accepted"
      text = "control: \(who): \(entry.method) accepted: \(Self.cut(summary))"
    case .refused(let fault):
      guard let note = mayRefuse(entry.caller.user) else { return }
      result = "refused"
      text = "control: \(who): \(entry.method) refused: \(Self.cut(fault.message))\(note)"
    }
    var metadata = Self.fields(entry.caller, method: entry.method, result: result)
    if case .refused(let fault) = entry.outcome { metadata["VXD_ERROR"] = "\(fault.code)" }
    let subject = Self.subject(entry.parameters, board.current)
    if let guest = subject.guest { metadata["GUEST"] = "\(guest)" }
    if let device = subject.device { metadata["DEVICE"] = "\(device)" }
    log.log(level: result == "accepted" ? .notice : .warning, "\(text)", metadata: metadata)
  }

  /// Whether a client may attach to a console, on which it can type.
  package func mayAttachToConsole(_ caller: ControlCaller) -> Bool {
    let isAllowed = caller.role >= .operate
    let note = isAllowed ? "" : mayRefuse(caller.user)
    guard let note else { return isAllowed }
    log.log(
      level: isAllowed ? .notice : .warning,
      "control: \(Self.who(caller)): console \(isAllowed ? "attached" : "refused")\(note)",
      metadata: Self.fields(caller, method: "console", result: isAllowed ? "accepted" : "refused"))
    return isAllowed
  }

  private static func who(_ caller: ControlCaller) -> String {
    "uid \(caller.user) (pid \(caller.process), gid \(caller.group), role \(caller.role.name))"
  }

  private static func fields(_ caller: ControlCaller, method: String, result: String) -> Logger.Metadata {
    [
      "VXD_METHOD": "\(method)", "VXD_RESULT": "\(result)", "CALLER_UID": "\(caller.user)",
      "CALLER_GID": "\(caller.group)", "CALLER_PID": "\(caller.process)", "CALLER_ROLE": "\(caller.role.name)",
    ]
  }

  /// Whether one more refusal of a user is written down: 20 in a minute.
  ///
  /// - Returns: what the line has at its end; nil for no line.
  private func mayRefuse(_ user: UInt32) -> String? {
    quotas.withLock { quotas in
      let user = quotas[user] != nil || quotas.count < Self.userLimit ? user : .max
      switch quotas[user, default: LineQuota(lines: 20, seconds: 60)].next(at: EventLoop.now()) {
      case .drop: return nil
      case .say(left: 0): return ""
      case .say(let left): return "; \(left) refused requests before this one were not logged"
      }
    }
  }

  /// The names of the guest and the device that a request is about, if they exist: what clients write is not shown as one.
  private static func subject(
    _ parameters: JSONValue, _ contents: StatusBoard.Contents
  ) -> (guest: String?, device: String?) {
    guard let name = parameters["guest"]?.stringValue, let guest = try? SupervisorControl.find(name, contents) else {
      return (nil, nil)
    }
    return (guest.name, (try? SupervisorControl.find(parameters, contents))?.name)
  }

  private static func cut(_ text: String) -> String {
    let bytes =
      text.utf8.count > textLimit ? String(decoding: text.utf8.prefix(textLimit), as: UTF8.self) + "..." : text
    return bytes.visible(keepsLines: false)
  }
}
