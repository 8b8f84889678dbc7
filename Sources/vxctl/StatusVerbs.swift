import ArgumentParser
import ControlAPI

/// `vxctl status`: the daemon, its guests and devices at a glance.
struct Status: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show the daemon, its guests, their devices, and their problems.")

  @OptionGroup var connection: ConnectionOptions

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      let info = try client.call("system.info")
      let guests = try client.call("guest.list")
      let devices = try client.call("device.list")
      if connection.json {
        return Output.json(["system": info, "guests": guests, "devices": devices])
      }
      Output.line(
        "vxd \(info.cell("version")) on \(info.cell("hypervisor")), pid \(info.cell("pid")), up \(info.cell("uptimeSeconds")) s"
      )
      Output.line(
        "\(info.cell("guests")) guests, \(info.cell("devices")) devices (\(info.cell("devicesInTrouble")) in trouble), "
          + "\(info.cell("ioreqServers")) ioreq servers, \(info.cell("mappedPages")) guest pages mapped")
      Output.line("")
      Output.line(Status.guestTable(guests))
      Output.line("")
      Output.line(List.table(devices))
      for device in devices.arrayValue ?? [] where device["reason"]?.stringValue != nil {
        Output.line("\n\(device.cell("guest"))/\(device.cell("device")): \(device.cell("reason"))")
      }
    }
  }

  static func guestTable(_ guests: JSONValue) -> String {
    var table = Table("GUEST", "DOMAIN", "STATE", "VCPUS", "DEVICES", "IOREQ-SERVER", "ACCESSES")
    for guest in guests.arrayValue ?? [] {
      let server = guest["ioreqServer"] ?? .null
      table.add(
        guest.cell("name"), guest.cell("domain"), guest.cell("state"), guest.cell("vcpus"), guest.cell("devices"),
        server.cell("id"), server.cell("accesses"))
    }
    return table.text
  }
}

/// `vxctl list`: the devices.
struct List: ParsableCommand {
  static let configuration = CommandConfiguration(abstract: "List the devices of all guests, or of one.")

  @OptionGroup var connection: ConnectionOptions
  @Argument(help: "List only the devices of this guest (name or domain number).", transform: GuestName.value)
  var guest: GuestName?

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      var parameters: JSONValue = .object([])
      if let guest { parameters = ["guest": .string(try guest.known(to: client).parameter)] }
      let devices = try client.call("device.list", parameters)
      if connection.json { Output.json(devices) } else { Output.line(List.table(devices)) }
    }
  }

  static func table(_ devices: JSONValue) -> String {
    var table = Table("DEVICE", "TYPE", "STATE", "SLOT", "SIZE", "ACCESS", "I/O", "REQUESTS", "IN-FLIGHT", "IMAGE")
    for device in devices.arrayValue ?? [] {
      let direct = device["directIO"]?.boolValue.map { $0 ? "direct" : "buffered" } ?? "-"
      table.add(
        "\(device.cell("guest"))/\(device.cell("device"))", device.cell("type"), device.cell("state"),
        device.cell("slot"), device.byteCell("bytes"), device["readOnly"]?.boolValue == true ? "ro" : "rw", direct,
        device.cell("requests"),
        device.cell("inFlight"), device["interface"] == nil ? device.cell("image") : device.cell("interface"))
    }
    return table.text
  }
}

/// `vxctl show GUEST/DEVICE`: one device in full.
struct Show: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show one device with its counters, latencies and limits.")

  @OptionGroup var connection: ConnectionOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.", transform: DeviceName.value)
  var device: DeviceName

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      let answer = try client.call("device.get", .object(try device.parameters(client)))
      if connection.json { return Output.json(answer) }
      for member in answer.objectValue ?? [] {
        if case .object(let counters) = member.value {
          Output.line("\(member.name):")
          for counter in counters {
            Output.line("  \(Show.padded(counter.name)) \(answer[member.name]?.cell(counter.name) ?? "-")")
          }
        } else {
          Output.line("\(Show.padded(member.name))   \(answer.cell(member.name))")
        }
      }
    }
  }

  private static func padded(_ name: String) -> String {
    name + String(repeating: " ", count: max(0, 18 - name.count))
  }
}

/// `vxctl events`: what happens, as it happens.
struct Events: ParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Print events of guests and devices as they happen.")

  @OptionGroup var connection: ConnectionOptions
  @Option(help: "Exit after this many events.", transform: Value.number(1...Int.max))
  var count: Int?
  @Option(help: "First print the past events after this event number.", transform: Value.number(0...Int64.max))
  var after: Int64?
  @Flag(name: .shortAndLong, help: "Accepted for compatibility; events are always followed.")
  var follow = false

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      _ = try client.call("event.subscribe", after.map { ["after": .integer($0)] } ?? .object([]))
      var left = count ?? .max
      while left > 0 {
        let message = try client.receive(-1)
        guard let event = message["params"] else { continue }
        if message["method"] == "event.dropped" {
          if connection.json {
            Output.json(
              ["event": "event.dropped", "from": event["from"] ?? .null, "to": event["to"] ?? .null], pretty: false)
          } else {
            Output.line("(events \(event.cell("from")) to \(event.cell("to")) were lost)")
          }
          continue
        }
        if connection.json {
          Output.json(event, pretty: false)
        } else {
          let subject =
            event["device"].map { _ in "\(event.cell("guest"))/\(event.cell("device"))" } ?? event.cell("guest")
          let reason = event["reason"]?.stringValue.map { ": \(Output.printable($0))" } ?? ""
          Output.line("\(event.cell("sequence")) \(event.cell("event")) \(subject)\(reason)")
        }
        left -= 1
      }
    }
  }
}
