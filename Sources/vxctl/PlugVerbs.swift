import ArgumentParser
import ControlAPI
import Xen

/// Limits on the command line.
struct LimitOptions: ParsableArguments {
  @Option(help: "Reads a second; 0 for no limit.")
  var readOps: Int64?
  @Option(help: "Writes a second; 0 for no limit.")
  var writeOps: Int64?
  @Option(help: "Bytes read a second, also with K, M, G; 0 for no limit.")
  var readBytes: ByteCount?
  @Option(help: "Bytes written a second, also with K, M, G; 0 for no limit.")
  var writeBytes: ByteCount?
  @Option(help: "How much of an unused rate may be caught up on, in milliseconds of it.")
  var burst: Int64?
  @Option(help: "Requests worked on at a time; 0 for no limit.")
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
    abstract: "Changes limits at once; profiles are what lasts. Without options it shows them.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @OptionGroup var limits: LimitOptions
  @Argument(help: "GUEST/DEVICE, GUEST, or 'daemon' for all guests together.")
  var target: String

  func run() throws {
    let device = DeviceName(argument: target)
    var parameters = device?.parameters ?? []
    var method = "device.limit"
    if device == nil {
      method = target == "daemon" ? "daemon.limit" : "guest.limit"
      if target != "daemon" { parameters.append(.init(name: "guest", value: .string(target))) }
    }
    let isQuestion = limits.members.isEmpty
    parameters.append(.init(name: "limits", value: .object(limits.members)))
    try connection.run { client throws(ControlClient.Failure) in
      // With nothing to change, a dry run tells what holds.
      let more = isQuestion ? [JSONValue.Member(name: "dryRun", value: true)] : options.members
      let answer = try client.call(method, .object(parameters + more))
      if connection.json { return printJSON(answer) }
      if let would = answer["would"]?.stringValue {
        print(isQuestion ? would.replacingPrefix("become", with: "are") : "would do: \(would)")
      } else if let limits = answer["limits"] {
        print(JSONText.text(limits))
      }
    }
  }
}

extension String {
  fileprivate func replacingPrefix(_ word: String, with other: String) -> String {
    split(separator: " ", omittingEmptySubsequences: false).map { $0 == word ? other : String($0) }
      .joined(separator: " ")
  }
}

/// `vxctl attach GUEST disk --image PATH`: a disk for a guest that runs.
struct Attach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Gives a running guest a disk, a network device, a console or an entropy device.",
    discussion: """
      Without --backend, this vxd serves it in one of the spare slots that the guest's profile declares (HVM guests). With --backend, in \
      dom0, the device is written to Xenstore for the vxd of that domain, and the guest's virtio_xenbus module finds it (PV and PVH guests).
      """)

  enum Kind: String, ExpressibleByArgument, CaseIterable {
    case disk
    case network
    case console
    case entropy

    /// What it is in Xenstore, when it is no disk.
    var generic: ToolstackDevice.GenericType? {
      switch self {
      case .disk: nil
      case .network: .network
      case .console: .console
      case .entropy: .entropy
      }
    }
  }

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @OptionGroup var limits: LimitOptions
  @Argument(help: "Name or domain number of the guest.")
  var guest: String
  @Argument(help: "What to attach: disk; with --backend also network, console or entropy.")
  var kind: Kind
  @Option(help: "Absolute path of a raw image or block device, or an NBD address, as the backend's domain sees it.")
  var image: String?
  @Option(
    name: .customLong("options"),
    help:
      "With --backend: options of a network, console or entropy device as in profiles, JSON: '{\"bridge\": \"br0\"}'.")
  var deviceOptions: String?
  @Option(
    help:
      "Which spare slot (spare0, spare1, ...), or with --backend which name (xvda to xvdp, net0, console0, rng0); the first free one otherwise."
  )
  var device: String?
  @Option(help: "Name or number of the domain whose vxd serves the disk, over Xenbus.")
  var backend: String?
  @Flag(help: "With --backend: the guest may only read.")
  var readOnly = false
  @Option(help: "With --backend: seconds to wait for the guest's driver.", transform: Seconds.whole)
  var wait = 30

  func run() throws {
    if let backend { return try attach(over: backend) }
    guard kind == .disk, let image else {
      throw ValidationError(
        kind == .disk
          ? "a disk needs --image"
          : "a \(kind.rawValue) device is attached with --backend; HVM guests have those of their profile")
    }
    var parameters: [JSONValue.Member] = [
      .init(name: "guest", value: .string(guest)), .init(name: "image", value: .string(image)),
    ]
    if let device { parameters.append(.init(name: "device", value: .string(device))) }
    if !limits.members.isEmpty { parameters.append(.init(name: "limits", value: .object(limits.members))) }
    try Outcome.change(
      connection, "device.attach", parameters, options,
      until: Outcome(good: ["device.attached"], bad: ["device.notAttached"]))
  }
}

/// `vxctl detach GUEST/DEVICE`: takes an attached disk away again.
struct Detach: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract:
      "Takes a disk away that was attached at run time: waits for its requests up to a deadline, then by force.",
    discussion:
      "With --xenbus, in dom0: a disk over Xenbus, of any backend domain, whether it was there from the guest's start or not."
  )

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/spare0.")
  var device: DeviceName
  @Option(help: "Seconds to wait for requests under way.", transform: Seconds.whole)
  var deadline = 10
  @Flag(help: "The device is one over Xenbus (xvda to xvdp, net0, console0, rng0).")
  var xenbus = false

  func run() throws {
    if xenbus { return try detachXenbus() }
    try Outcome.change(
      connection, "device.detach", device.parameters + [.init(name: "seconds", value: .count(deadline))], options,
      device: device.device, until: Outcome(good: ["device.detached"], seconds: Int32(clamping: deadline + 30)))
  }
}
