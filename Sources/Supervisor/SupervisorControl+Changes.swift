import ControlAPI
import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Logging
import Xen

/// The methods that change something.
extension SupervisorControl {
  private static func wrongState(_ device: StatusBoard.Device, _ wanted: String) -> ControlFault {
    ControlFault(
      code: -32002,
      message: "'\(device.guestName)/\(device.name)' is \(device.phase.name)",
      data: ["field": "params.device", "remedy": .string("required state: \(wanted)")])
  }

  /// What a request makes of limits; checked with those that there are now.
  private static func change(
    _ old: RateLimits, _ parameters: JSONValue
  ) throws(ControlFault) -> (limits: RateLimits, change: Actions.LimitsChange) {
    let given = parameters["limits"] ?? .null
    var limits = old
    do throws(SettingFault) {
      try limits.change(given, "limits")
    } catch {
      throw ControlFault(
        code: -32602, message: error.message,
        data: [
          "field": .string("params.\(error.field)"),
          "remedy": "0 removes a limit; limits that are not named do not change",
        ])
    }
    let change: Actions.LimitsChange = { present in
      var limits = present
      // What may be given does not depend on what there is.
      try? limits.change(given, "limits")
      return limits
    }
    return (limits, change)
  }

  private static let limitsParameter = ControlParameter(
    "limits", "object", required: true,
    "Limits to change, of \(RateLimits.memberNames); rates are per second, 0 removes a limit.")

  static func deviceChanges(_ board: StatusBoard, _ actions: Actions) -> [ControlMethod] {
    let one = [guestParameter, deviceParameter]
    return [
      ControlMethod(
        change: "device.resume", "Resumes a device that is held or paused; its failed requests are executed again.",
        parameters: one
      ) { parameters throws(ControlFault) in
        let device = try find(parameters, board.current)
        switch device.phase {
        case .held:
          return ControlChange("the failed requests of \(device.name) are executed again") {
            actions.order(device, .resume)
          }
        case .paused:
          return ControlChange("\(device.name) resumes") {
            actions.order(device, .resume)
          }
        default: throw wrongState(device, "held or paused")
        }
      },
      ControlMethod(
        change: "device.pause", "Stops a device's backend; the guest's requests wait until it is resumed.",
        parameters: one
      ) { parameters throws(ControlFault) in
        let device = try find(parameters, board.current)
        guard device.driverStatus != nil, ["ready", "connected", "held", "faulted"].contains(device.phase.name) else {
          throw wrongState(device, "ready, connected, held or faulted")
        }
        return ControlChange("requests of \(device.name) wait until 'device.resume'") {
          actions.order(device, .pause)
        }
      },
      ControlMethod(
        change: "device.restart",
        "Restarts a device's backend, also out of quarantine, and resets its count of restarts. Requests wait meanwhile.",
        parameters: one
      ) { parameters throws(ControlFault) in
        let device = try find(parameters, board.current)
        guard !["closing", "opening"].contains(device.phase.name) else {
          throw wrongState(device, "any but closing and opening")
        }
        return ControlChange("the backend of \(device.name) is restarted") {
          actions.order(device, .restart)
        }
      },
      ControlMethod(
        change: "device.resize",
        "Gives a disk the present size of its image; with 'bytes', first grows the image, a regular file, which requires the role admin unless "
          + "'spareImages' lists it. The event device.resized or device.notResized tells the outcome.",
        parameters: one + [
          ControlParameter("bytes", "integer", required: false, "New size of the image, a regular file.")
        ]
      ) { parameters throws(ControlFault) in
        let device = try find(parameters, board.current)
        guard device.readings?.capacity != nil else {
          throw .notFound(
            "'\(device.guestName)/\(device.name)' is \(device.phase.name): it has no open image", field: "device")
        }
        var bytes: UInt64?
        if let wanted = parameters["bytes"]?.integerValue {
          guard wanted >= 512, wanted % 512 == 0 else {
            throw .invalidParameters("'bytes' must be a positive multiple of 512, not \(wanted)", field: "bytes")
          }
          bytes = UInt64(wanted)
        }
        let size = bytes
        // To follow an image changes no file.
        let guest = try find(parameters["guest"]?.stringValue ?? "", board.current)
        let reason = size == nil ? nil : actions.adminReason(image: device.path ?? "", of: guest)
        return ControlChange(
          "\(device.guestName)/\(device.name) takes the size of its image\(size.map { ", grown to \($0) bytes" } ?? "")",
          adminReason: reason
        ) {
          actions.order(device, .adjust(.resize(bytes: size)))
        }
      },
      ControlMethod(
        change: "device.limit", "Changes a device's limits until vxd is restarted or reloads its profiles.",
        parameters: one + [limitsParameter]
      ) { parameters throws(ControlFault) in
        let device = try find(parameters, board.current)
        let (limits, change) = try change(device.limits, parameters)
        return ControlChange("limits of \(device.name) become \(JSONText.text(limits.json))") {
          actions.limit(device.key, change)
          return ["accepted": true, "limits": limits.json]
        }
      },
      ControlMethod(
        change: "guest.limit", "Changes the limits of all devices of a guest together.",
        parameters: [guestParameter, limitsParameter]
      ) { parameters throws(ControlFault) in
        let guest = try find(parameters["guest"]?.stringValue ?? "", board.current)
        let (limits, change) = try change(guest.limits, parameters)
        let domain = guest.domain
        return ControlChange("limits of guest \(guest.name) become \(JSONText.text(limits.json))") {
          actions.limit(domain, change)
          return ["accepted": true, "limits": limits.json]
        }
      },
      attach(board, actions), detach(board, actions),
    ]
  }

  // MARK: Hot-plug

  private static func attach(_ board: StatusBoard, _ actions: Actions) -> ControlMethod {
    ControlMethod(
      change: "device.attach",
      "Attaches a disk to a running guest by filling one of the spare disks of its profile ('spareDisks'), whose size then changes. Images that "
        + "'spareImages' of the profile does not list require the role admin. The event device.attached or device.notAttached tells the outcome.",
      parameters: [
        guestParameter,
        ControlParameter(
          "image", "string", required: true, "Absolute path of a raw image or block device, or an NBD address."),
        ControlParameter(
          "device", "string", required: false, "Name of the spare disk; by default the first empty one."),
        ControlParameter("limits", "object", required: false, limitsParameter.summary),
      ]
    ) { parameters throws(ControlFault) in
      let guest = try find(parameters["guest"]?.stringValue ?? "", board.current)
      let image = parameters["image"]?.stringValue ?? ""
      if let fault = DeviceEntry.fault(ofImage: image) { throw .invalidParameters("'image': \(fault)", field: "image") }
      let wanted = parameters["device"]?.stringValue
      let spares = guest.devices.filter { $0.key.kind == .spare && (wanted == nil || $0.name == wanted) }
      guard !spares.isEmpty else {
        throw ControlFault(
          code: -32006,
          message: wanted.map { "guest '\(guest.name)' has no spare disk '\($0)'" }
            ?? "guest '\(guest.name)' has no spare disks",
          data: [
            "field": "params.device",
            "remedy":
              "an HVM guest's devices are fixed when it is created: give it \"spareDisks\" in the profiles, and create it again; other guests (PV, PVH, all on Arm) can get devices over Xenbus: 'vxctl attach --backend DOMAIN' in dom0",
          ])
      }
      guard let spare = spares.first(where: { $0.isEmptySpare }) else {
        throw ControlFault(
          code: -32006, message: "every spare disk of guest '\(guest.name)' is in use",
          data: [
            "field": "params.device",
            "remedy": "detach one first, or give the guest more spareDisks and create it again",
          ])
      }
      var limits: RateLimits?
      if parameters["limits"] != nil { limits = try Self.change(RateLimits(), parameters).limits }
      let chosen = limits
      return ControlChange(
        "\(image) is attached as \(guest.name)/\(spare.name)",
        adminReason: actions.adminReason(image: image, of: guest)
      ) {
        _ = actions.order(spare, .fill(image: image, limits: chosen))
        return ["accepted": true, "device": .string(spare.name), "way": "spare slot, config-change"]
      }
    }
  }

  private static func detach(_ board: StatusBoard, _ actions: Actions) -> ControlMethod {
    ControlMethod(
      change: "device.detach",
      "Detaches a disk that was attached at run time: its size becomes 0. Waits for requests in flight up to a deadline; the remaining ones "
        + "fail. The event device.detached tells that it is done.",
      parameters: [
        guestParameter, deviceParameter,
        ControlParameter("seconds", "integer", required: false, "The deadline, 0 to 3600; 10 by default."),
      ]
    ) { parameters throws(ControlFault) in
      let device = try find(parameters, board.current)
      guard device.key.kind == .spare else {
        throw ControlFault(
          code: -32006, message: "'\(device.guestName)/\(device.name)' was made by the toolstack",
          data: [
            "field": "params.device",
            "remedy":
              "only disks that were attached by 'vxctl attach' can be detached; those of the toolstack are removed with their guest (xl destroy, xl shutdown)",
          ])
      }
      guard !device.isEmptySpare else { throw wrongState(device, "attached; this spare disk is already empty") }
      let seconds = parameters["seconds"]?.integerValue ?? 10
      guard (0...3600).contains(seconds) else {
        throw .invalidParameters("'seconds' must be from 0 to 3600, not \(seconds)", field: "seconds")
      }
      return ControlChange("\(device.guestName)/\(device.name) is detached within \(seconds) s") {
        actions.order(device, .detach(deadline: UInt64(seconds) * 1000))
      }
    }
  }

  // MARK: The daemon

  static func daemonChanges(_ board: StatusBoard, _ actions: Actions) -> [ControlMethod] {
    [
      ControlMethod(
        change: "config.reload",
        "Reads the profiles again. Limits and restart policies apply at once, other options to devices that are opened later.",
        role: .admin
      ) { _ throws(ControlFault) in
        let new = try actions.read()
        return ControlChange("the profiles are used from now on") {
          if let new { actions.use(new) }
          return ["accepted": true]
        }
      },
      ControlMethod(
        change: "daemon.limit", "Changes the limits of all guests together.", role: .admin,
        parameters: [limitsParameter]
      ) { parameters throws(ControlFault) in
        let (limits, change) = try change(board.current.limits, parameters)
        return ControlChange("limits of all guests together become \(JSONText.text(limits.json))") {
          actions.limitAll(change)
          return ["accepted": true, "limits": limits.json]
        }
      },
      ControlMethod(
        change: "log.level", "Sets the lowest level that is logged.", role: .admin,
        parameters: [
          ControlParameter("level", "string", required: true, "debug, info, notice, warning, error or critical.")
        ]
      ) { parameters throws(ControlFault) in
        let name = parameters["level"]?.stringValue ?? ""
        guard let level = Logger.Level(rawValue: name), level != .trace else {
          throw .invalidParameters(
            "'level': '\(name)': expected one of debug, info, notice, warning, error, critical", field: "level")
        }
        return ControlChange("lines from \(name) on are logged") {
          LogLevel.current = level
          return ["accepted": true]
        }
      },
      ControlMethod(
        change: "system.shutdown",
        "Stops the daemon. Guests keep their devices and wait for the next vxd; with 'end', they lose them.",
        role: .admin,
        parameters: [
          ControlParameter("end", "boolean", required: false, "Remove all devices: running guests get I/O errors.")
        ]
      ) { parameters throws(ControlFault) in
        let ends = parameters["end"]?.boolValue ?? false
        return ControlChange(
          ends ? "every device is removed, and the daemon stops" : "the daemon stops; guests wait for the next one"
        ) {
          actions.endDaemon(handsOver: !ends)
          return ["accepted": true]
        }
      },
    ]
  }
}
