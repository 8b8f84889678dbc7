import ArgumentParser
import ControlAPI
import Glibc
import Xen

/// What the verbs below share: they write to Xenstore, in dom0, and need no vxd there.
enum Toolstack {
  static func run(_ json: Bool, _ body: (XenStore) throws(ToolstackDevice.Fault) -> JSONValue) throws {
    do throws(ToolstackDevice.Fault) {
      let xenstore: XenStore
      do throws(XenError) {
        xenstore = try XenStore(socketPath: getenv("XENSTORED_PATH").map { String(cString: $0) })
      } catch {
        throw ToolstackDevice.Fault("cannot connect to Xenstore: \(error)", remedy: "run this in dom0, as root")
      }
      let answer = try body(xenstore)
      if json { Output.json(answer) } else { Output.line(answer["text"]?.stringValue ?? "") }
    } catch {
      Trouble(.refused, error.message, remedy: error.remedy).report(json: json)
      throw ExitCode(1)
    }
  }

  /// What the backend writes when it cannot serve a disk.
  static func error(_ disk: ToolstackDevice) -> String? {
    disk.backend.flatMap { disk.xenstore.read("\($0)/error") }.map { Output.printable($0) }
  }

  static func state(_ disk: ToolstackDevice) -> String? { disk.backend.flatMap { disk.xenstore.read("\($0)/state") } }
}

extension Attach {
  /// The device that is to be made.
  private func target(of domain: DomainID, _ xenstore: XenStore) throws(ToolstackDevice.Fault) -> ToolstackDevice {
    if let device { return try ToolstackDevice(xenstore, guest: domain, name: device) }
    guard kind.generic == nil else {
      return ToolstackDevice(
        xenstore, guest: domain, device: try ToolstackDevice.freeGeneric(xenstore, guest: domain), kind: .generic)
    }
    return ToolstackDevice(xenstore, guest: domain, device: try ToolstackDevice.free(xenstore, guest: domain))
  }

  func attach(over backend: GuestName) throws {
    try Toolstack.run(connection.json) { xenstore throws(ToolstackDevice.Fault) in
      guard limits.members.isEmpty else {
        throw ToolstackDevice.Fault(
          "limits cannot be given with --backend", remedy: "use 'vxctl limit' in the backend's domain")
      }
      let domain = try guest.domain(in: xenstore)
      let server = try backend.domain(in: xenstore)
      guard server != domain else { throw ToolstackDevice.Fault("--backend: a guest cannot be its own backend") }
      let disk = try target(of: domain, xenstore)
      let word = kind.generic.map { "\($0.prefix)\(disk.device)" } ?? ToolstackDevice.name(disk.device)
      let name = "\(guest.plain)/\(word)"
      if options.dryRun {
        return [
          "text": .string("would do: attach \(name)\(image.map { ", '\($0)'" } ?? "") of domain \(server)"),
          "device": .string(name),
        ]
      }
      if let generic = kind.generic {
        try disk.create(backend: server, type: generic, options: deviceOptions)
      } else {
        guard let image else { throw ToolstackDevice.Fault("a disk needs --image") }
        try disk.create(backend: server, target: image, readOnly: readOnly)
      }
      _ = disk.wait(seconds: wait) { Toolstack.error(disk) != nil || Toolstack.state(disk) == "4" }
      let state = Toolstack.state(disk)
      if state == "4" { return ["text": .string("\(name): connected"), "device": .string(name), "connected": true] }
      if let error = Toolstack.error(disk) {
        try? disk.remove()
        throw ToolstackDevice.Fault("\(name): \(error)")
      }
      guard state == "2" else {
        try? disk.remove()
        throw ToolstackDevice.Fault(
          "\(name): vxd of domain \(server) did not respond", remedy: "is vxd running in that domain?")
      }
      return [
        "text": .string(
          "\(name): offered; the guest's driver has not connected yet (is its module virtio_xenbus loaded?)"),
        "device": .string(name), "connected": false,
      ]
    }
  }
}

extension Detach {
  func detachXenbus() throws {
    try Toolstack.run(connection.json) { xenstore throws(ToolstackDevice.Fault) in
      let domain = try device.guest.domain(in: xenstore)
      let disk = try ToolstackDevice(xenstore, guest: domain, name: device.device)
      guard disk.exists else {
        throw ToolstackDevice.Fault(
          "domain \(domain) has no virtio device '\(device.device)'", remedy: "'vxctl list' shows its devices")
      }
      let name = "\(device.guest.plain)/\(device.device)"
      if options.dryRun { return ["text": .string("would do: detach \(name)"), "device": .string(name)] }
      try disk.requestEnd()
      let inTime = disk.wait(seconds: deadline) { disk.hasEnded }
      var words = "detached"
      if !inTime {
        try disk.forceEnd()
        words = "detached by force: its remaining requests were aborted"
        if !disk.wait(seconds: 30, until: { disk.hasEnded }) {
          words = "detached by force; its backend has not released the guest's memory yet"
        }
      }
      try disk.remove()
      return ["text": .string("\(name): \(words)"), "device": .string(name), "forced": .bool(!inTime)]
    }
  }
}

/// `vxctl reattach --backend DOMAIN`: after a driver domain's reboot.
struct Reattach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract:
      "In dom0, after a driver domain was rebooted or replaced: connect its devices to the new domain.",
    discussion: """
      A driver domain that reboots gets a new domain number, but its guests' entries still name the old one. In-flight requests fail with an \
      I/O error; the devices reappear under the same names.
      """)

  @Flag(help: "Print the answer, and any error, as JSON.")
  var json = false
  @Option(help: "Name or number of the domain that is to serve the devices.", transform: GuestName.value)
  var backend: GuestName
  @Option(help: "Seconds to wait for the guests' drivers to connect (default: 60).", transform: Value.seconds)
  var wait = 60
  @Argument(help: "Reattach only the devices of this guest (name or domain number).", transform: GuestName.value)
  var guest: GuestName?

  func run() throws {
    try Toolstack.run(json) { xenstore throws(ToolstackDevice.Fault) in
      let server = try backend.domain(in: xenstore)
      let only = if let guest { Optional(try guest.domain(in: xenstore)) } else { DomainID?.none }
      let lost = ToolstackDevice.all(xenstore).filter { disk in
        guard only == nil || disk.guest == only, let path = disk.backend else { return false }
        return xenstore.read("\(path)/state") == nil
      }
      for disk in lost { try disk.move(to: server) }
      var lines: [String] = []
      for disk in lost {
        _ = disk.wait(seconds: wait) { Toolstack.error(disk) != nil || Toolstack.state(disk) == "4" }
        let words =
          Toolstack.error(disk)
          ?? (Toolstack.state(disk) == "4" ? "connected" : "the guest's driver has not connected yet")
        lines.append("domain \(disk.guest)/\(disk.name): \(words)")
      }
      if lost.isEmpty { lines.append("every device has its backend") }
      return ["text": .string(lines.joined(separator: "\n")), "disks": .array(lines.map(JSONValue.string))]
    }
  }
}

/// `vxctl identify`: tells driver domains who their guests are.
struct Identify: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "In dom0: tell driver domains the UUIDs of their guests, so that their profiles apply.",
    discussion: """
      A driver domain cannot read the names and UUIDs of guests, and domain numbers are reassigned after a reboot. 'vxctl attach' and \
      'vxctl reattach' tell it the UUID for the devices they write. For devices from an xl configuration, run this command each time the \
      guest has started. Limits and restart policies then apply at once, other options to devices that are opened later.
      """)

  @Flag(help: "Print the answer, and any error, as JSON.")
  var json = false
  @Argument(help: "Only for this guest (name or domain number).", transform: GuestName.value)
  var guest: GuestName?

  func run() throws {
    try Toolstack.run(json) { xenstore throws(ToolstackDevice.Fault) in
      let only = if let guest { Optional(try guest.domain(in: xenstore)) } else { DomainID?.none }
      var lines: [String] = []
      for disk in ToolstackDevice.all(xenstore) where only == nil || disk.guest == only {
        guard let uuid = try disk.identify() else { continue }
        lines.append("domain \(disk.guest)/\(disk.name): \(Output.printable(uuid))")
      }
      if lines.isEmpty { lines.append("no virtio devices with a backend") }
      return ["text": .string(lines.joined(separator: "\n")), "devices": .array(lines.map(JSONValue.string))]
    }
  }
}
