package import ControlAPI
import DeviceHost
import Devices
import EventLoop
import Glibc
import Synchronization
import Xen

/// The control socket's methods: they read the status board and never wait for the supervisor.
package enum SupervisorControl {
  package static let version = "0.3.0"

  /// Bytes of an answer with metrics. Clients take messages of 1 MiB, in which quotes and ends of lines have two bytes.
  private static let metricsLimit = 900 << 10

  static let guestParameter = ControlParameter(
    "guest", "string", required: true, "Name or domain number of the guest; name:X or id:N if a word could mean either."
  )
  static let deviceParameter = ControlParameter(
    "device", "string", required: true, "Name (xvde) or number of the device.")

  package static func methods(
    board: StatusBoard, isSimulated: Bool, actions: Actions = Actions(), audit: AuditLog? = nil
  ) -> ControlMethods {
    ControlMethods(
      readings(board, isSimulated, actions) + [consoleMethod(board)] + deviceChanges(board, actions)
        + networkChanges(board, actions) + daemonChanges(board, actions),
      version: version, audit: { audit?.write($0) })
  }

  private static func readings(_ board: StatusBoard, _ isSimulated: Bool, _ actions: Actions) -> [ControlMethod] {
    let started = EventLoop.now()
    let object: JSONValue = ["type": "object"]
    let list: JSONValue = ["type": "array", "items": ["type": "object"]]
    return [
      ControlMethod(
        "system.info", "Describes the daemon: version, hypervisor, uptime, resources in use.", result: object
      ) {
        _ throws(ControlFault) in info(board.current, started, isSimulated)
      },
      ControlMethod(
        "system.metrics",
        "Returns the metrics as OpenMetrics text, as on the metrics socket, for clients that can reach only this socket.",
        result: object
      ) { _ throws(ControlFault) in
        let text = Metrics.text(board, started: started, now: EventLoop.now())
        guard text.utf8.count <= metricsLimit else {
          throw ControlFault(
            code: -32007, message: "the metrics have \(text.utf8.count) bytes, too many for one answer",
            data: ["field": "message", "remedy": "read the metrics socket"])
        }
        return ["contentType": .string(Metrics.contentType), "text": .string(text)]
      },
      ControlMethod("guest.list", "Lists the guests that have devices here.", result: list) {
        _ throws(ControlFault) in
        .array(sorted(board.current).map { describe(guest: $0, hasXenDrivers: actions.hasXenDrivers) })
      },
      ControlMethod(
        "device.list", "Lists the devices of all guests or of one guest.",
        parameters: [ControlParameter("guest", "string", required: false, guestParameter.summary)], result: list
      ) { parameters throws(ControlFault) in
        let contents = board.current
        guard let name = parameters["guest"]?.stringValue else {
          return .array(sorted(contents).flatMap(\.devices).map { describe(device: $0) })
        }
        return .array(try find(name, contents).devices.map { describe(device: $0) })
      },
      ControlMethod(
        "device.get", "Describes one device: counters, latencies, limits, slot, features and state.",
        parameters: [guestParameter, deviceParameter], result: object
      ) { parameters throws(ControlFault) in
        describe(device: try find(parameters, board.current), counters: true)
      },
      ControlMethod(
        "pool.stats", "Returns statistics of each guest's pool of foreign mappings; a page has 4096 bytes.",
        result: list
      ) {
        _ throws(ControlFault) in .array(sorted(board.current).compactMap(describe(poolOf:)))
      },
      ControlMethod(
        "config.check", "Checks profiles; the error names what is wrong.",
        parameters: [ControlParameter("profiles", "any", required: true, "The contents of a profiles file.")],
        result: object
      ) { parameters throws(ControlFault) in
        _ = try Actions.profiles(parameters["profiles"] ?? .null)
        return ["correct": true]
      },
      ControlMethod(
        "config.diff", "Shows what other profiles would change for the running devices once they are reopened.",
        parameters: [ControlParameter("profiles", "any", required: true, "The contents of a profiles file.")],
        result: list
      ) { parameters throws(ControlFault) in
        try actions.difference(Actions.profiles(parameters["profiles"] ?? .null), board.current)
      },
      ControlMethod(
        "event.subscribe",
        "From now on, sends events of guests and devices on this connection, as notifications named 'event'. They are numbered from the start "
          + "of the daemon (epoch); 'event.dropped' tells a client that reads too slowly which events it missed.",
        parameters: [
          ControlParameter("after", "integer", required: false, "First send the past events after this number.")
        ], result: object
      ) { _ throws(ControlFault) in ["subscribed": true] },
    ]
  }

  static func sorted(_ contents: StatusBoard.Contents) -> [StatusBoard.Guest] {
    contents.guests.values.sorted { $0.domain < $1.domain }
  }

  static func find(_ name: String, _ contents: StatusBoard.Contents) throws(ControlFault) -> StatusBoard.Guest {
    let guests = sorted(contents)
    let domains = guests.map { GuestName.Domain(number: UInt32($0.domain), name: $0.name) }
    guard let guest = GuestName(argument: name) else {
      throw .invalidParameters("'\(name)': expected \(GuestName.expected)", field: "guest")
    }
    do throws(GuestName.Ambiguous) {
      if let found = try guest.find(in: domains), let index = domains.firstIndex(of: found) {
        return guests[index]
      }
    } catch {
      throw .invalidParameters(error.message, field: "guest")
    }
    throw .notFound("there is no guest '\(name)' with devices of vxd", field: "guest")
  }

  static func find(_ parameters: JSONValue, _ contents: StatusBoard.Contents) throws(ControlFault) -> StatusBoard.Device
  {
    let guest = try find(parameters["guest"]?.stringValue ?? "", contents)
    let name = parameters["device"]?.stringValue ?? ""
    guard let match = guest.devices.first(where: { $0.name == name || "\($0.key.device)" == name }) else {
      throw .notFound("guest '\(guest.name)' has no device '\(name)'", field: "device")
    }
    return match
  }
}
