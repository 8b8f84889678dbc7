import ArgumentParser
import ControlAPI
import Xen

/// Limits on the command line.
struct LimitOptions: ParsableArguments {
  @Option(help: "Reads per second; 0 for no limit.", transform: Value.number(0...Int64.max))
  var readOps: Int64?
  @Option(help: "Writes per second; 0 for no limit.", transform: Value.number(0...Int64.max))
  var writeOps: Int64?
  @Option(help: "Bytes read per second, also with K, M, G or T; 0 for no limit.", transform: ByteCount.value)
  var readBytes: ByteCount?
  @Option(help: "Bytes written per second, also with K, M, G or T; 0 for no limit.", transform: ByteCount.value)
  var writeBytes: ByteCount?
  @Option(
    help: "Burst: how many milliseconds of unused rate can accumulate; 0 for the default, 100.",
    transform: Value.number(0...Int64.max, of: "milliseconds"))
  var burst: Int64?
  @Option(help: "Requests in progress at a time; 0 for no limit.", transform: Value.number(0...Int64.max))
  var inFlight: Int64?

  var members: [JSONValue.Member] {
    let values: [(String, Int64?)] = [
      ("readOps", readOps), ("writeOps", writeOps), ("readBytes", readBytes?.bytes), ("writeBytes", writeBytes?.bytes),
      ("burstMilliseconds", burst), ("inFlight", inFlight),
    ]
    return values.compactMap { name, value in value.map { .init(name: name, value: .integer($0)) } }
  }
}

/// `vxctl limit WHAT --write-bytes 50M`: of a device, a guest, or all guests together.
struct Limit: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Change limits until vxd is restarted or reloads its profiles; without options, show them.")

  enum Target: CommandValue {
    case daemon
    case guest(GuestName)
    case device(DeviceName)

    static let expected = "GUEST/DEVICE, GUEST or daemon (GUEST is a name, name:NAME, or id:N without leading zeros)"

    init?(argument: String) {
      if argument == "daemon" {
        self = .daemon
      } else if let device = DeviceName(argument: argument) {
        self = .device(device)
      } else if let guest = GuestName(argument: argument) {
        self = .guest(guest)
      } else {
        return nil
      }
    }
  }

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @OptionGroup var limits: LimitOptions
  @Argument(help: "GUEST/DEVICE, GUEST, or 'daemon' for all guests together.", transform: Target.value)
  var target: Target

  func run() throws {
    let isQuestion = limits.members.isEmpty
    try connection.run { client throws(ControlClient.Failure) in
      var parameters: [JSONValue.Member] = []
      var method = "daemon.limit"
      switch target {
      case .daemon: break
      case .device(let device):
        method = "device.limit"
        parameters = try device.parameters(client)
      case .guest(let guest):
        method = "guest.limit"
        parameters.append(.init(name: "guest", value: .string(try guest.known(to: client).parameter)))
      }
      parameters.append(.init(name: "limits", value: .object(limits.members)))
      // Without a change, a dry run reports the present limits.
      let more = isQuestion ? [JSONValue.Member(name: "dryRun", value: true)] : options.members
      let answer = try client.call(method, .object(parameters + more))
      if connection.json { return Output.json(answer) }
      if let would = answer["would"]?.stringValue {
        Output.line(
          Output.printable(isQuestion ? would.replacingWord("become", with: "are") : "would do: \(would)"))
      } else if let limits = answer["limits"] {
        Output.json(limits, pretty: false)
      }
    }
  }
}

extension String {
  fileprivate func replacingWord(_ word: String, with other: String) -> String {
    split(separator: " ", omittingEmptySubsequences: false).map { $0 == word ? other : String($0) }
      .joined(separator: " ")
  }
}

/// `vxctl attach GUEST disk --image PATH`: a disk for a guest that runs.
struct Attach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Attach a disk, a network device, a console or an entropy device to a running guest.",
    discussion: """
      For an HVM guest, this fills one of the spare disks that the guest's profile declares. For a PV or PVH guest, run it in dom0 with \
      --backend: it writes the device to Xenstore, for the vxd in that domain and the guest's virtio_xenbus module.
      """)

  /// A disk, or a device of libxl's generic kind.
  struct Kind: CommandValue {
    /// What it is in Xenstore, when it is not a disk.
    let generic: VirtioType?

    init?(argument: String) {
      generic = VirtioType.generic.first { $0.name == argument }
      if generic == nil, argument != VirtioType.disk.name { return nil }
    }

    var name: String { (generic ?? .disk).name }

    static var names: [String] { [VirtioType.disk.name] + VirtioType.generic.map(\.name) }
    static var expected: String { names.alternatives }
  }

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @OptionGroup var limits: LimitOptions
  @Argument(help: "Name or domain number of the guest.", transform: GuestName.value)
  var guest: GuestName
  @Argument(
    help: "What to attach: disk; with --backend also network, console or entropy.", completion: .list(Kind.names),
    transform: Kind.value)
  var kind: Kind
  @Option(
    help: "Absolute path of a raw image or block device, or an NBD address, as the backend's domain sees it.",
    transform: Value.text("a path or an NBD address"))
  var image: String?
  @Option(
    name: .customLong("options"),
    help:
      "With --backend: options of a network, console or entropy device as in profiles, as a JSON object: '{\"bridge\": \"br0\"}'.",
    transform: Value.text("a JSON object"))
  var deviceOptions: String?
  @Option(
    help:
      "Name of the spare disk (spare0, spare1, ...), or with --backend of the new device (xvda to xvdp, net0, console0, rng0); default: the first free one.",
    transform: Value.text("the name of a device")
  )
  var device: String?
  @Option(
    help: "Attach over Xenbus: name or number of the domain whose vxd serves the device.", transform: GuestName.value)
  var backend: GuestName?
  @Flag(help: "With --backend: make the disk read-only.")
  var readOnly = false
  @Option(
    help: "With --backend: seconds to wait for the guest's driver to connect (default: 30).", transform: Value.seconds)
  var wait = 30

  func run() throws {
    if let backend { return try attach(over: backend) }
    guard kind.generic == nil, let image else {
      throw ValidationError(
        kind.generic == nil
          ? "a disk needs --image"
          : "a \(kind.name) device needs --backend; HVM guests have those of their profile")
    }
    var parameters: [JSONValue.Member] = [.init(name: "image", value: .string(image))]
    if let device { parameters.append(.init(name: "device", value: .string(device))) }
    if !limits.members.isEmpty { parameters.append(.init(name: "limits", value: .object(limits.members))) }
    try Outcome.change(
      connection, "device.attach", of: .guest(guest), options, parameters,
      until: Outcome(good: ["device.attached"], bad: ["device.notAttached"]))
  }
}

/// `vxctl detach GUEST/DEVICE`: takes an attached disk away again.
struct Detach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract:
      "Detach a device. Unmount it in the guest first: requests that have not ended by the deadline are aborted.",
    discussion:
      "For an HVM guest, this empties a spare disk. For a PV or PVH guest, run it in dom0 with --xenbus: it removes the device, whatever its backend domain."
  )

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/spare0.", transform: DeviceName.value)
  var device: DeviceName
  @Option(help: "Seconds to wait for requests in flight (default: 10).", transform: Value.seconds)
  var deadline = 10
  @Flag(help: "The device is a Xenbus device (xvda to xvdp, net0, console0, rng0).")
  var xenbus = false

  func run() throws {
    if xenbus { return try detachXenbus() }
    try Outcome.change(
      connection, "device.detach", of: .device(device), options, [.init(name: "seconds", value: .count(deadline))],
      until: Outcome(good: ["device.detached"], seconds: Int64(deadline) + 30))
  }
}
