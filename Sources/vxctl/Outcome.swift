import ArgumentParser
import ControlAPI

/// What changes have in common.
struct ChangeOptions: ParsableArguments {
  @Flag(help: "Check everything and say what would be done, and change nothing.")
  var dryRun = false

  @Option(help: "A name for this change: said twice, it is done once.")
  var idempotencyKey: String?

  var members: [JSONValue.Member] {
    var members: [JSONValue.Member] = []
    if dryRun { members.append(.init(name: "dryRun", value: true)) }
    if let idempotencyKey { members.append(.init(name: "idempotencyKey", value: .string(idempotencyKey))) }
    return members
  }
}

/// A call that changes something, and the event that tells how it ended.
struct Outcome {
  var good: Set<String>
  var bad: Set<String> = []
  var seconds: Int32 = 60

  /// - Parameter device: the name that events carry; nil to take it from the answer.
  static func change(
    _ connection: ConnectionOptions, _ method: String, _ parameters: [JSONValue.Member], _ options: ChangeOptions,
    device: String? = nil, until outcome: Outcome? = nil
  ) throws {
    try connection.run { client throws(ControlClient.Failure) in
      let waits = outcome != nil && !options.dryRun
      if waits { _ = try client.call("event.subscribe") }
      let answer = try client.call(method, .object(parameters + options.members))
      if let would = answer["would"]?.stringValue {
        if connection.json { printJSON(answer) } else { print("would do: \(would)") }
        return
      }
      guard waits, let outcome else {
        if connection.json { printJSON(answer) }
        return
      }
      let name = device ?? answer["device"]?.stringValue
      while true {
        guard let event = try client.receive(outcome.seconds * 1000)["params"],
          event["device"]?.stringValue == name, let kind = event["event"]?.stringValue
        else { continue }
        let reason = event["reason"]?.stringValue ?? ""
        if outcome.bad.contains(kind) { throw .refused(ControlFault(code: -32002, message: reason)) }
        guard outcome.good.contains(kind) else { continue }
        if connection.json {
          printJSON(event)
        } else {
          print("\(name ?? ""): \(kind)\(reason.isEmpty ? "" : ", \(reason)")")
        }
        return
      }
    }
  }
}
