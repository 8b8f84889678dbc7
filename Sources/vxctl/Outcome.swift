import ArgumentParser
import ControlAPI
import EventLoop

/// What changes have in common.
struct ChangeOptions: ParsableArguments {
  @Flag(help: "Check everything and report what would be done, without doing it.")
  var dryRun = false

  @Option(
    help: "A key for this change, 1 to 128 bytes: repeating the command with the same key has no further effect.",
    transform: Value.text("a text of 1 to 128 bytes", upTo: 128))
  var idempotencyKey: String?

  var members: [JSONValue.Member] {
    var members: [JSONValue.Member] = []
    if dryRun { members.append(.init(name: "dryRun", value: true)) }
    if let idempotencyKey { members.append(.init(name: "idempotencyKey", value: .string(idempotencyKey))) }
    return members
  }
}

/// What a change is about.
enum ChangeTarget {
  case daemon
  case guest(GuestName)
  case device(DeviceName)
}

/// The events that tell how a change ended.
struct Outcome {
  var good: Set<String>
  var bad: Set<String> = []
  /// How long to wait for one of them, in all.
  var seconds: Int64 = 60

  /// Calls a method that changes something and, where it ends with an event, waits for that: of this guest's device, whatever else happens
  /// meanwhile.
  static func change(
    _ connection: ConnectionOptions, _ method: String, of target: ChangeTarget, _ options: ChangeOptions,
    _ parameters: [JSONValue.Member] = [], until outcome: Outcome? = nil
  ) throws {
    try connection.run { client throws(ControlClient.Failure) in
      let waits = outcome != nil && !options.dryRun
      var (guest, device): (GuestName.Known?, String?)
      switch target {
      case .daemon: (guest, device) = (nil, nil)
      case .guest(let name): (guest, device) = (try name.known(to: client), nil)
      case .device(let name): (guest, device) = (try name.guest.known(to: client), name.device)
      }
      var members = guest.map { [JSONValue.Member(name: "guest", value: .string($0.parameter))] } ?? []
      if let device { members.append(.init(name: "device", value: .string(device))) }
      if waits {
        // Events carry the device's name, which may have been given as a number.
        if device != nil { device = try client.call("device.get", .object(members))["device"]?.stringValue ?? device }
        _ = try client.call("event.subscribe")
      }
      // What happened before the answer is not the outcome: `call` drops it.
      let answer = try client.call(method, .object(members + parameters + options.members))
      if let would = answer["would"]?.stringValue {
        return connection.json ? Output.json(answer) : Output.line("would do: \(Output.printable(would))")
      }
      guard waits, let outcome else {
        if connection.json { Output.json(answer) }
        return
      }
      if device == nil { device = answer["device"]?.stringValue }
      let event = try outcome.wait(client) { event in
        guard event["device"]?.stringValue == device else { return false }
        guard let domain = guest?.domain else { return event["guest"]?.stringValue == guest?.parameter }
        return event["domain"]?.integerValue == domain
      }
      if connection.json { return Output.json(event) }
      let reason = event["reason"]?.stringValue.map { ", \(Output.printable($0))" } ?? ""
      Output.line("\(event.cell("guest"))/\(event.cell("device")): \(event.cell("event"))\(reason)")
    }
  }

  /// The event that ends the change.
  ///
  /// - Throws: also for an event that says that it failed.
  private func wait(
    _ client: ControlClient, isOurs: (JSONValue) -> Bool
  ) throws(ControlClient.Failure) -> JSONValue {
    let end = EventLoop.now() + UInt64(clamping: seconds) * 1_000_000_000
    while true {
      let now = EventLoop.now()
      guard now < end else {
        throw .protocolBroken("no event about the outcome within \(seconds) s; 'vxctl show' tells the present state")
      }
      let message: JSONValue
      do throws(ControlClient.Failure) {
        message = try client.receive(Int32(clamping: (end - now) / 1_000_000 + 1))
      } catch {
        // At the limit, the message above is the better one.
        if EventLoop.now() < end { throw error }
        continue
      }
      guard let event = message["params"], isOurs(event), let kind = event["event"]?.stringValue else { continue }
      if bad.contains(kind) {
        throw .refused(
          ControlFault(code: -32002, message: "\(kind): \(event["reason"]?.stringValue ?? "no reason given")"))
      }
      if good.contains(kind) { return event }
    }
  }
}
