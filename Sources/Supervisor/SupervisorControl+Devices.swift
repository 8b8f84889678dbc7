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
        "Sets the link state of a network device, which the guest sees. It persists until it is changed again.",
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
            data: [
              "field": "params.device",
              "remedy": "wait until the device is ready or connected; 'vxctl show' gives the reason",
            ])
        }
        let isUp = parameters["up"]?.boolValue ?? false
        return ControlChange("the link of \(device.name) is set \(isUp ? "up" : "down")") {
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
      "Finds the socket of a console port, for 'vxctl console'. The data is framed as in Sources/Backends/ConsoleLink.",
      parameters: [
        guestParameter,
        ControlParameter(
          "port", "string", required: false, "Name or number of the port; by default the first console."),
        ControlParameter(
          "device", "string", required: false, "Name of the console device; by default the guest's first."),
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
          data: [
            "field": "params.guest",
            "remedy": "wait until the device is ready or connected; 'vxctl show' gives the reason",
          ])
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
