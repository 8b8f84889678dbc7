import ControlAPI
import DeviceHost
import Devices
import Engines
import Lifecycle

/// Methods for devices that are no disks, and how those are told to clients.
extension SupervisorControl {
  static func networkChanges(_ board: StatusBoard, _ actions: Actions) -> [ControlMethod] {
    [
      ControlMethod(
        change: "device.link",
        "Pulls the cable of a network device, or plugs it in: the guest's driver sees it. Holds until it is said otherwise.",
        parameters: [
          guestParameter, deviceParameter, ControlParameter("up", "boolean", required: true, "Whether the link is up."),
        ]
      ) { parameters throws(ControlFault) in
        let device = try find(parameters, board.current)
        guard device.type == "network" else {
          throw ControlFault(
            code: -32006, message: "'\(device.guestName)/\(device.name)' is a \(device.type) device",
            data: ["field": "params.device", "remedy": "name a network device ('vxctl list')"])
        }
        guard device.readings != nil else {
          throw ControlFault(
            code: -32002, message: "'\(device.guestName)/\(device.name)' is \(device.phase.name)",
            data: ["field": "params.device", "remedy": "the device must be served: see 'vxctl show'"])
        }
        let isUp = parameters["up"]?.boolValue ?? false
        return ControlChange("the link of \(device.name) goes \(isUp ? "up" : "down")") {
          var answer = actions.order(device, .adjust(.link(isUp: isUp))).objectValue ?? []
          answer.append(.init(name: "link", value: .string(isUp ? "up" : "down")))
          return .object(answer)
        }
      }
    ]
  }

  /// Where `vxctl console` connects to.
  static func consoleMethod(_ board: StatusBoard) -> ControlMethod {
    ControlMethod(
      "console.find",
      "The socket of a port of a guest's console, for 'vxctl console': frames as Sources/Backends/ConsoleLink says.",
      parameters: [
        guestParameter,
        ControlParameter("port", "string", required: false, "Name or number of the port; the first console otherwise."),
        ControlParameter("device", "string", required: false, "Which console device; the guest's first otherwise."),
      ], result: ["type": "object"]
    ) { parameters throws(ControlFault) in
      let guest = try find(parameters["guest"]?.stringValue ?? "", board.current)
      let wanted = parameters["device"]?.stringValue
      let consoles = guest.devices.filter { $0.type == "console" && (wanted == nil || $0.name == wanted) }
      guard let device = consoles.first else {
        throw .notFound(
          wanted.map { "guest '\(guest.name)' has no console device '\($0)'" }
            ?? "guest '\(guest.name)' has no console device of vxd",
          field: "guest")
      }
      guard let ports = device.readings?.ports, !ports.isEmpty else {
        throw ControlFault(
          code: -32002, message: "'\(guest.name)/\(device.name)' is \(device.phase.name)",
          data: ["field": "params.guest", "remedy": "the device must be served: see 'vxctl show'"])
      }
      let name = parameters["port"]?.stringValue
      let index =
        name.map { name in
          ports.firstIndex { $0.name == name } ?? Int(name).flatMap { ports.indices.contains($0) ? $0 : nil }
        } ?? 0
      guard let index, let path = ports[index].viewerPath else {
        throw .notFound("'\(guest.name)/\(device.name)' has no port '\(name ?? "")'", field: "port")
      }
      return [
        "path": .string(path), "device": .string(device.name), "port": .count(index),
        "name": .string(ports[index].name),
      ]
    }
  }

  /// What was dropped, by reason: packets of a network device, bytes of a console.
  static func drops(_ accounts: [QueueAccount]) -> JSONValue {
    let counters = accounts.map(\.counters)
    return .object(
      DropReason.allCases.map { reason in
        .init(name: "\(reason)", value: .count(counters.reduce(0) { $0 &+ $1.drops(reason).value }))
      })
  }
}
