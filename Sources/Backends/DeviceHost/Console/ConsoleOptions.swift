import Devices
package import Engines
package import JSON

/// Options of console devices: those of port 0 stand beside `ports`, which are the further ones.
extension ConsoleSettings {
  package static let options = OptionTable<ConsoleSettings>(
    [
      OptionRow(
        "ports", .array, "further ports, each an object with the options of a port", default: "none",
        read: { settings in
          let further = settings.ports.dropFirst().map { portOptions.text($0) }
          return further.isEmpty ? "none" : further.joined(separator: "; ")
        }
      ) { (settings: inout ConsoleSettings, given) throws(SettingFault) in
        settings.ports += try readPorts(given)
      }
    ] + commonRows)

  package static let portOptions = OptionTable<ConsolePortSettings>([
    // These two are read first: what the others begin with depends on them.
    OptionRow(
      "name", .text,
      "/dev/virtio-ports/NAME in the guest, up to 128 printable characters without /; required for non-console ports",
      default: "", read: { $0.name }
    ) { _, _ in },
    OptionRow(
      "console", .flag, "whether the port is a terminal (/dev/hvcN)",
      default: "true for the device itself, false in `ports`", read: { "\($0.isConsole)" }
    ) { _, _ in },
    OptionRow(
      "socket", .object,
      "a Unix socket; see Sockets",
      default: "",
      read: { port in
        switch port.socket {
        case .listen(let path): "listen \(path)"
        case .connect(let path, let whenOpen): "connect \(path)\(whenOpen ? ", whenOpen true" : "")"
        case nil: "none"
        }
      }
    ) { (port: inout ConsolePortSettings, given) throws(SettingFault) in port.socket = try readSocket(given) },
    OptionRow(
      "pty", .path(limit: 4095), "create a pty, and a symbolic link to it at this path", default: "",
      read: { $0.pty ?? "none" }
    ) { port, given in port.pty = given.text },
    OptionRow(
      "log", .object, "a file; see Log files", default: "",
      read: { port in port.log.map { log in logOptions.text(log) } ?? "none" }
    ) { (port: inout ConsolePortSettings, given) throws(SettingFault) in port.log = try readLog(given) },
    .flag(
      "logLines", \.logsLines, "write complete lines to vxd's log, and so to the journal; at most 1000 in 30 seconds"),
    .number(
      "historyBytes", 0...16_777_216, \.historyBytes, "scrollback that is shown on attach, in bytes",
      default: "65536 for a console, 0 otherwise"),
    .choice(
      "overflow", \.overflow,
      "what happens to output that its reader does not take in time: `drop` (dropped and counted) or `wait` (the guest has to wait)",
      default: "drop for a console, otherwise wait"),
  ])

  /// What the object of a socket says; one path of the two.
  package struct SocketChoice {
    var listen: String?
    var connect: String?
    var whenOpen = false
  }

  // The address of a socket has no room for more.
  private static let socketPath = DeviceOption.Kind.path(limit: 107)

  package static let socketOptions = OptionTable<SocketChoice>([
    OptionRow(
      "listen", socketPath,
      "path of a socket that vxd creates; one client at a time can connect, as root or a member of the operate or admin group",
      default: "", read: { $0.listen ?? "none" }
    ) { $0.listen = $1.text },
    OptionRow(
      "connect", socketPath, "path of another program's socket, to which vxd connects; it retries every second",
      default: "", read: { $0.connect ?? "none" }
    ) { $0.connect = $1.text },
    .flag(
      "whenOpen", \.whenOpen,
      "with `connect`: connect only while a program in the guest has the port open"),
  ])

  package static let logOptions = OptionTable<ConsoleLogSettings>([
    OptionRow("path", .path(limit: 4095), "the file's path; required", default: "", read: { $0.path }) { log, given in
      log.path = given.text
    },
    .number("maxBytes", 4096...(1 << 40), \.bytesLimit, "size at which a new file is started"),
    .number("keep", 0...100, \.kept, "how many older files are kept"),
    .flag("timestamps", \.hasTimestamps, "begin each line with the time"),
  ])

  package init(options members: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault) {
    self.init(ports: [])
    // Those of the first port, and those of the device.
    let own = Self.options.rows.map(\.option.name)
    let known = Self.portOptions.rows.map(\.option.name)
    for member in members where !own.contains(member.name) && !known.contains(member.name) {
      throw SettingFault("\(field).\(member.name)", unknown: member.name, known: known + own)
    }
    ports = [try Self.readPort(members.filter { known.contains($0.name) }, field, isFirst: true)]
    try Self.options.apply(members.filter { own.contains($0.name) }, to: &self, field)
    var names: Set<String> = []
    for port in ports where !port.name.isEmpty && !names.insert(port.name).inserted {
      throw SettingFault(
        field: "\(field).ports", reason: "two ports are called \"\(port.name)\"; expected a name of its own for each")
    }
  }

  package var optionTexts: [(name: String, value: String)] {
    (ports.first.map { Self.portOptions.texts($0) } ?? []) + Self.options.texts(self)
  }

  package static var documents: [OptionDocument] {
    let port = ConsolePortSettings(name: "", isConsole: true)
    return [
      portOptions.document("Ports", port), socketOptions.document("Sockets", SocketChoice()),
      logOptions.document("Log files", ConsoleLogSettings(path: "")),
      OptionDocument(
        title: "Console devices", rows: Array(options.document("", ConsoleSettings(ports: [port])).rows.prefix(1))),
    ]
  }

  // MARK: Ports

  private static func readPorts(_ given: GivenOption) throws(SettingFault) -> [ConsolePortSettings] {
    var ports: [ConsolePortSettings] = []
    for (index, value) in (given.value.arrayValue ?? []).enumerated() {
      let place = "\(given.field)[\(index)]"
      guard let members = value.objectValue else { throw SettingFault(place, expected: "an object", not: value) }
      ports.append(try readPort(members, place, isFirst: false))
    }
    guard ports.count <= ConsoleConfiguration.namedPortLimit else {
      throw SettingFault(
        field: given.field, reason: "expected at most \(ConsoleConfiguration.namedPortLimit) ports, not \(ports.count)")
    }
    return ports
  }

  private static func readPort(
    _ members: [JSONValue.Member], _ field: String, isFirst: Bool
  ) throws(SettingFault) -> ConsolePortSettings {
    var name = ""
    if let given = members.last(where: { $0.name == "name" })?.value {
      guard let text = given.stringValue, (1...128).contains(text.utf8.count),
        text.utf8.allSatisfy({ $0 > 32 && $0 < 127 && $0 != UInt8(ascii: "/") })
      else {
        throw SettingFault("\(field).name", expected: "1 to 128 printable ASCII characters without /", not: given)
      }
      name = text
    }
    let isConsole = members.last { $0.name == "console" }?.value.boolValue ?? isFirst
    var port = ConsolePortSettings(name: name, isConsole: isConsole)
    try portOptions.apply(members, to: &port, field)
    guard isConsole || !name.isEmpty else {
      throw SettingFault(field: "\(field).name", reason: "expected a name, which a port that is not a console needs")
    }
    return port
  }

  private static func readSocket(_ given: GivenOption) throws(SettingFault) -> ConsolePortSettings.Socket {
    var choice = SocketChoice()
    try socketOptions.apply(given.value.objectValue ?? [], to: &choice, given.field)
    switch (choice.listen, choice.connect) {
    case (let path?, nil):
      guard !choice.whenOpen else {
        throw SettingFault(
          field: "\(given.field).whenOpen", reason: "expected \"connect\" beside it, since a socket that listens stays")
      }
      return .listen(path)
    case (nil, let path?): return .connect(path, whenOpen: choice.whenOpen)
    default:
      throw SettingFault(
        field: given.field,
        reason: "expected an object with either \"listen\" or \"connect\", such as {\"listen\": PATH}")
    }
  }

  private static func readLog(_ given: GivenOption) throws(SettingFault) -> ConsoleLogSettings {
    let members = given.value.objectValue ?? []
    var log = ConsoleLogSettings(path: "")
    try logOptions.apply(members, to: &log, given.field)
    guard !log.path.isEmpty else {
      throw SettingFault(field: "\(given.field).path", reason: "expected the absolute path of a file")
    }
    return log
  }
}
