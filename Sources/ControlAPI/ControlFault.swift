/// A refusal of a request: a number for programs, a sentence for people, and what it is about.
package struct ControlFault: Error, Equatable {
  package var code: Int64
  package var message: String
  /// What names the field, and what to do about it.
  package var data: JSONValue

  package init(code: Int64, message: String, data: JSONValue = .null) {
    self.code = code
    self.message = message
    self.data = data
  }

  // JSON-RPC 2.0, section 5.1
  package static func parse(_ message: String, offset: Int) -> ControlFault {
    ControlFault(
      code: -32700, message: message,
      data: ["field": "message", "offset": .count(offset), "remedy": "send one JSON-RPC 2.0 request per line"])
  }

  package static func invalidRequest(_ message: String, field: String, remedy: String) -> ControlFault {
    ControlFault(
      code: -32600, message: message, data: ["field": .string(field), "remedy": .string(remedy)])
  }

  package static func methodNotFound(_ method: String) -> ControlFault {
    ControlFault(
      code: -32601, message: "unknown method '\(method)'",
      data: ["field": "method", "remedy": "rpc.discover lists the methods"])
  }

  package static func invalidParameters(_ message: String, field: String) -> ControlFault {
    ControlFault(
      code: -32602, message: message,
      data: ["field": .string("params.\(field)"), "remedy": "rpc.discover describes the parameters"])
  }

  /// A guest or device that does not exist (an application error of ours).
  package static func notFound(_ message: String, field: String) -> ControlFault {
    ControlFault(
      code: -32001, message: message,
      data: ["field": .string("params.\(field)"), "remedy": "guest.list and device.list name what exists"])
  }

  /// What the caller's role does not allow.
  package static func denied(_ message: String, _ role: ControlRole) -> ControlFault {
    ControlFault(
      code: -32005, message: "permission denied: \(message)",
      data: [
        "field": "method",
        "remedy": .string(
          "run it as root, or as a member of a group that vxd has been given with --\(role.name)-group"),
      ])
  }

  package var json: JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "code", value: .integer(code)), .init(name: "message", value: .string(message)),
    ]
    if data != .null { members.append(.init(name: "data", value: data)) }
    return .object(members)
  }
}
