import ArgumentParser
import ControlAPI
import Glibc
import Xen

/// What the verbs below share: they write to Xenstore, in dom0, and need no vxd there.
enum Toolstack {
  static func run(_ json: Bool, _ body: (XenStore) throws(ToolstackDevice.Fault) -> JSONValue) throws {
    do throws(ToolstackDevice.Fault) {
      let store: XenStore
      do throws(XenError) {
        store = try XenStore(socketPath: getenv("XENSTORED_PATH").map { String(cString: $0) })
      } catch {
        throw ToolstackDevice.Fault("Xenstore cannot be reached: \(error)", remedy: "run this in dom0, as root")
      }
      let answer = try body(store)
      if json { printJSON(answer) } else { print(answer["text"]?.stringValue ?? "") }
    } catch {
      var text = "vxctl: \(error.message)\n" + (error.remedy.map { "       \($0)\n" } ?? "")
      text = text.visible
      text.withUTF8 { _ = write(2, $0.baseAddress, $0.count) }
      throw ExitCode(1)
    }
  }

  /// What the backend writes when it cannot serve a disk.
  static func error(_ disk: ToolstackDevice) -> String? {
    disk.backend.flatMap { disk.store.read("\($0)/error") }
  }

  static func state(_ disk: ToolstackDevice) -> String? { disk.backend.flatMap { disk.store.read("\($0)/state") } }
}

extension Attach {
  /// The device that is to be made.
  private func target(of domain: DomainID, _ store: XenStore) throws(ToolstackDevice.Fault) -> ToolstackDevice {
    if let device { return try ToolstackDevice(store, guest: domain, name: device) }
    guard kind.generic == nil else {
      return ToolstackDevice(
        store, guest: domain, device: try ToolstackDevice.freeGeneric(store, guest: domain), kind: .generic)
    }
    return ToolstackDevice(store, guest: domain, device: try ToolstackDevice.free(store, guest: domain))
  }

  func attach(over backend: String) throws {
    try Toolstack.run(connection.json) { store throws(ToolstackDevice.Fault) in
      guard limits.members.isEmpty else {
        throw ToolstackDevice.Fault(
          "limits: a disk with --backend gets its limits there", remedy: "vxctl limit, in that domain")
      }
      let domain = try ToolstackDevice.domain(guest, store)
      let server = try ToolstackDevice.domain(backend, store)
      guard server != domain else { throw ToolstackDevice.Fault("--backend: a guest cannot be its own backend") }
      let disk = try target(of: domain, store)
      let word = kind.generic.map { "\($0.rawValue)\(disk.device)" } ?? ToolstackDevice.name(disk.device)
      let name = "\(guest)/\(word)"
      if options.dryRun {
        return [
          "text": .string("would do: \(name)\(image.map { ", '\($0)'" } ?? "") of domain \(server)"),
          "device": .string(name),
        ]
      }
      if let generic = kind.generic {
        try disk.create(backend: server, type: generic, options: deviceOptions)
      } else {
        guard let image else { throw ToolstackDevice.Fault("--image: a disk needs one") }
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
        throw ToolstackDevice.Fault("\(name): no vxd of domain \(server) took it up", remedy: "is vxd running there?")
      }
      return [
        "text": .string("\(name): offered; the guest has not taken it yet (is its module virtio_xenbus loaded?)"),
        "device": .string(name), "connected": false,
      ]
    }
  }
}

extension Detach {
  func detachXenbus() throws {
    try Toolstack.run(connection.json) { store throws(ToolstackDevice.Fault) in
      let domain = try ToolstackDevice.domain(device.guest, store)
      let disk = try ToolstackDevice(store, guest: domain, name: device.device)
      guard disk.exists else {
        throw ToolstackDevice.Fault(
          "there is no virtio device \(device.device) of domain \(domain)", remedy: "'vxctl list' names them")
      }
      let name = "\(device.guest)/\(device.device)"
      if options.dryRun { return ["text": .string("would do: take \(name) away"), "device": .string(name)] }
      try disk.requestEnd()
      let inTime = disk.wait(seconds: deadline) { disk.hasEnded }
      var words = "detached"
      if !inTime {
        try disk.forceEnd()
        words = "detached by force: its requests fail"
        if !disk.wait(seconds: 30, until: { disk.hasEnded }) {
          words = "detached by force; its backend has not let go of the guest's memory yet"
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
    abstract: "Gives disks whose backend's domain is gone to a new one: after a reboot of the driver domain, in dom0.",
    discussion: """
      A domain that reboots gets another number, and its guests' entries name the old one. Their drivers end what was under way with an \
      error, and find the disks again under the same names.
      """)

  @Flag(help: "Print the answer as JSON.")
  var json = false
  @Option(help: "Name or number of the domain that serves the disks from now on.")
  var backend: String
  @Option(help: "Seconds to wait for the guests' drivers.", transform: Seconds.whole)
  var wait = 60
  @Argument(help: "Only this guest's disks: its name or number.")
  var guest: String?

  func run() throws {
    try Toolstack.run(json) { store throws(ToolstackDevice.Fault) in
      let server = try ToolstackDevice.domain(backend, store)
      let only = if let guest { Optional(try ToolstackDevice.domain(guest, store)) } else { DomainID?.none }
      let lost = ToolstackDevice.all(store).filter { disk in
        guard only == nil || disk.guest == only, let path = disk.backend else { return false }
        return store.read("\(path)/state") == nil
      }
      for disk in lost { try disk.move(to: server) }
      var lines: [String] = []
      for disk in lost {
        _ = disk.wait(seconds: wait) { Toolstack.error(disk) != nil || Toolstack.state(disk) == "4" }
        let words =
          Toolstack.error(disk) ?? (Toolstack.state(disk) == "4" ? "connected" : "the guest has not taken it yet")
        lines.append("domain \(disk.guest)/\(disk.name): \(words)")
      }
      if lost.isEmpty { lines.append("no device has lost its backend") }
      return ["text": .string(lines.joined(separator: "\n")), "disks": .array(lines.map(JSONValue.string))]
    }
  }
}
