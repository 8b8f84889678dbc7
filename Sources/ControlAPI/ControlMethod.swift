/// A parameter of a method, by name.
package struct ControlParameter: Sendable {
  package var name: String
  package var summary: String
  /// JSON's name of the type: string, integer, boolean, array.
  package var type: String
  package var isRequired: Bool

  package init(_ name: String, _ type: String, required: Bool, _ summary: String) {
    self.name = name
    self.type = type
    isRequired = required
    self.summary = summary
  }
}

/// One method of the control socket: its description is what `rpc.discover` prints and what requests are checked against.
package struct ControlMethod: Sendable {
  package var name: String
  package var summary: String
  package var parameters: [ControlParameter]
  /// JSON schema of the result.
  package var result: JSONValue
  /// Who may call it.
  package var role: ControlRole
  /// Whether it changes anything, and so takes `dryRun` and `idempotencyKey`.
  package var isChange: Bool
  /// Never waits: it reads published values. Reports a change before it is carried out.
  var body:
    @Sendable (
      _ parameters: JSONValue, _ caller: ControlCaller, _ accepted: (_ summary: String) -> Void
    ) throws(ControlFault) -> JSONValue

  package init(
    _ name: String, _ summary: String, parameters: [ControlParameter] = [], result: JSONValue,
    body: @escaping @Sendable (JSONValue) throws(ControlFault) -> JSONValue
  ) {
    self.name = name
    self.summary = summary
    self.parameters = parameters
    self.result = result
    self.body = { parameters, _, _ throws(ControlFault) in try body(parameters) }
    role = .view
    isChange = false
  }

  /// A method that changes something.
  ///
  /// - Parameter plan: checks the request and says what is to be done; it changes nothing itself.
  package init(
    change name: String, _ summary: String, role: ControlRole = .operate, parameters: [ControlParameter] = [],
    plan: @escaping @Sendable (JSONValue) throws(ControlFault) -> ControlChange
  ) {
    self.name = name
    self.summary = summary
    self.parameters =
      parameters + [
        ControlParameter(
          "dryRun", "boolean", required: false, "Check everything and report what would be done, without doing it."),
        ControlParameter(
          "idempotencyKey", "string", required: false,
          "A key for this change: repeating the request with the same key has no further effect."),
      ]
    result = ["type": "object"]
    body = { parameters, caller, accepted throws(ControlFault) in
      let change = try plan(parameters)
      if let reason = change.adminReason, caller.role < .admin {
        throw .denied("\(reason); this requires the role admin, and yours is \(caller.role.name)", .admin)
      }
      if parameters["dryRun"]?.boolValue == true { return ["dryRun": true, "would": .string(change.summary)] }
      accepted(change.summary)
      return change.perform()
    }
    self.role = role
    isChange = true
  }

  /// Checks parameters by name and type.
  func check(_ given: JSONValue) throws(ControlFault) {
    let members = given.objectValue ?? []
    for member in members {
      guard let parameter = parameters.first(where: { $0.name == member.name }) else {
        throw .invalidParameters("'\(name)' has no parameter '\(member.name)'", field: member.name)
      }
      guard parameter.type == "any" || member.value.kind == parameter.type else {
        throw .invalidParameters(
          "'\(member.name)' must be of type \(parameter.type), not \(member.value.kind)", field: member.name)
      }
    }
    for parameter in parameters where parameter.isRequired && given[parameter.name] == nil {
      throw .invalidParameters("'\(parameter.name)' is missing", field: parameter.name)
    }
  }

  /// As a method object of OpenRPC.
  var description: JSONValue {
    [
      "name": .string(name), "summary": .string(summary), "paramStructure": "by-name",
      "x-role": .string(role.name), "x-change": .bool(isChange),
      "params": .array(
        parameters.map {
          [
            "name": .string($0.name), "summary": .string($0.summary), "required": .bool($0.isRequired),
            "schema": $0.type == "any" ? [:] : ["type": .string($0.type)],
          ]
        }),
      "result": ["name": "result", "schema": result],
    ]
  }
}

/// The methods that a socket offers, and the answer to one message.
package struct ControlMethods: Sendable {
  private var methods: [String: ControlMethod] = [:]
  private let order: [String]
  /// What `rpc.discover` answers.
  package let discovery: JSONValue
  private let keys = IdempotencyStore()
  private let audit: @Sendable (ControlAudit) -> Void
  /// Requests in one batch at most.
  private static let batchLimit = 64
  /// Bytes of an id as it is written, its quotation marks included, at most.
  private static let idLimit = 1024
  /// Bytes of the answers to one batch, from which on the rest of its requests is refused.
  private static let batchBytes = 4 << 20

  /// - Parameter audit: told of each change before it is carried out, and of each that is refused; not of dry runs that succeed.
  package init(
    _ list: [ControlMethod], version: String, audit: @escaping @Sendable (ControlAudit) -> Void = { _ in }
  ) {
    self.audit = audit
    for method in list { methods[method.name] = method }
    order = list.map(\.name)
    let description: JSONValue = [
      "openrpc": "1.2.6", "info": ["title": "vxd control socket", "version": .string(version)],
      "methods": .array(list.map(\.description)),
    ]
    discovery = description
    let discover = ControlMethod(
      "rpc.discover", "Returns this description of the control socket, in OpenRPC 1.2.",
      result: ["type": "object"]
    ) { _ throws(ControlFault) in description }
    methods[discover.name] = discover
  }

  /// Answers one message: a request, a notification (no answer) or a batch of them.
  ///
  /// - Parameters:
  ///   - caller: who sends it.
  ///   - subscribe: what `event.subscribe` does for the sender, and its result; throws for wrong parameters.
  package func answer(
    _ message: [UInt8], from caller: ControlCaller = ControlCaller(role: .admin),
    subscribe: (JSONValue) throws(ControlFault) -> JSONValue
  ) -> JSONValue? {
    let value: JSONValue
    var text: JSONScanner?
    do throws(JSONText.Fault) {
      value = try JSONText.parse(message) { text = $0 }
    } catch {
      let fault: ControlFault =
        switch error {
        case .syntax(let words, let offset): .parse("not JSON: \(words), at byte \(offset)", offset: offset)
        case .tooDeep: .parse("the message is nested deeper than \(JSONText.depthLimit) levels", offset: 0)
        case .empty: .invalidRequest("the message is empty", field: "message", remedy: "send one request per line")
        }
      return Self.reply(error: fault, id: .null)
    }
    guard case .array(let requests) = value else { return one(value, text?.id(ofRequest: 0), caller, subscribe) }
    guard !requests.isEmpty, requests.count <= Self.batchLimit else {
      return Self.reply(
        error: .invalidRequest(
          "a batch of \(requests.count) requests", field: "message", remedy: "send 1 to \(Self.batchLimit) requests"),
        id: .null)
    }
    var answers: [JSONValue] = []
    var bytes = 0
    for (place, request) in requests.enumerated() {
      let id = text?.id(ofRequest: place)
      let answer =
        bytes < Self.batchBytes
        ? one(request, id, caller, subscribe)
        : refuse(
          request, id,
          ControlFault(
            code: -32007,
            message:
              "the answers to the earlier requests of this batch have \(bytes) bytes; the remaining requests are not executed",
            data: ["field": "message", "remedy": "send these requests one by one"]))
      guard let answer else { continue }
      bytes += JSONText.text(answer).utf8.count
      answers.append(answer)
    }
    return answers.isEmpty ? nil : .array(answers)
  }

  /// - Parameter source: the text of its id, if that is no array or object.
  private func one(
    _ request: JSONValue, _ source: String?, _ caller: ControlCaller,
    _ subscribe: (JSONValue) throws(ControlFault) -> JSONValue
  ) -> JSONValue? {
    do throws(ControlFault) {
      if let source, source.utf8.count > Self.idLimit {
        throw .invalidRequest(
          "'id' has \(source.utf8.count) bytes; expected at most \(Self.idLimit)", field: "id", remedy: "use a number")
      }
      let result = try perform(request, caller, subscribe)
      guard let id = Self.id(request, source) else { return nil }
      return ["jsonrpc": "2.0", "result": result, "id": id]
    } catch {
      return refuse(request, source, error)
    }
  }

  /// The id of an answer: that of the request, as its sender wrote it.
  private static func id(_ request: JSONValue, _ source: String?) -> JSONValue? {
    guard let id = request["id"], let source else { return request["id"] }
    guard source.utf8.count <= idLimit else { return .null }
    return JSONText.text(id) == source ? id : .verbatim(source)
  }

  private func refuse(_ request: JSONValue, _ source: String?, _ fault: ControlFault) -> JSONValue? {
    let id = Self.id(request, source)
    // A notification is a request without an id, whatever else is wrong with it (JSON-RPC 2.0, 4.1). Anything that is not a request at all
    // is answered.
    if id == nil, request["jsonrpc"]?.stringValue == "2.0", request["method"]?.stringValue != nil { return nil }
    return Self.reply(error: fault, id: id ?? .null)
  }

  private func perform(
    _ request: JSONValue, _ caller: ControlCaller, _ subscribe: (JSONValue) throws(ControlFault) -> JSONValue
  ) throws(ControlFault) -> JSONValue {
    guard case .object = request else {
      throw .invalidRequest("a request must be an object", field: "message", remedy: "see JSON-RPC 2.0, section 4")
    }
    guard request["jsonrpc"]?.stringValue == "2.0" else {
      throw .invalidRequest("'jsonrpc' must be \"2.0\"", field: "jsonrpc", remedy: "add \"jsonrpc\": \"2.0\"")
    }
    guard let name = request["method"]?.stringValue else {
      throw .invalidRequest(
        "'method' must be a string", field: "method", remedy: "use a method that rpc.discover lists")
    }
    switch request["id"] {
    case .some(.array), .some(.object), .some(.bool):
      throw .invalidRequest("'id' must be a string, a number or null", field: "id", remedy: "use a number")
    default: break
    }
    guard let method = methods[name] else { throw .methodNotFound(name) }
    let parameters: JSONValue
    switch request["params"] {
    // Generated clients send [] where there are none.
    case nil, .some(.null), .some(.array([])): parameters = .object([])
    case .some(.object(let members)): parameters = .object(members)
    case .some(let other):
      throw ControlFault(
        code: -32602, message: "'params' must be an object, not \(other.kind)",
        data: ["field": "params", "remedy": "give parameters by name; rpc.discover describes them"])
    }
    guard method.isChange else {
      try method.check(parameters)
      if name == "event.subscribe" { return try subscribe(parameters) }
      return try method.body(parameters, caller) { _ in }
    }
    do throws(ControlFault) {
      return try change(method, parameters, caller)
    } catch {
      audit(ControlAudit(caller: caller, method: name, parameters: parameters, outcome: .refused(error)))
      throw error
    }
  }

  private func change(
    _ method: ControlMethod, _ parameters: JSONValue, _ caller: ControlCaller
  ) throws(ControlFault) -> JSONValue {
    guard caller.role >= method.role else {
      throw .denied(
        "'\(method.name)' requires the role \(method.role.name), and yours is \(caller.role.name)", method.role)
    }
    try method.check(parameters)
    func perform() throws(ControlFault) -> JSONValue {
      try method.body(parameters, caller) { summary in
        audit(
          ControlAudit(caller: caller, method: method.name, parameters: parameters, outcome: .accepted(summary)))
      }
    }
    guard let key = parameters["idempotencyKey"]?.stringValue, parameters["dryRun"]?.boolValue != true else {
      return try perform()
    }
    guard !key.isEmpty, key.utf8.count <= 128 else {
      throw .invalidParameters("'idempotencyKey' must have 1 to 128 bytes", field: "idempotencyKey")
    }
    let request = "\(method.name) \(JSONText.text(parameters))"
    guard request.utf8.count <= IdempotencyStore.requestLimit else {
      throw .invalidParameters(
        "a request with an idempotency key must be at most \(IdempotencyStore.requestLimit) bytes long, not "
          + "\(request.utf8.count)", field: "idempotencyKey")
    }
    return try keys.once(key, by: caller.user, request, perform)
  }

  static func reply(error: ControlFault, id: JSONValue) -> JSONValue {
    ["jsonrpc": "2.0", "error": error.json, "id": id]
  }
}
