import ArgumentParser
import ControlAPI

/// A device as operators name it: GUEST/DEVICE.
struct DeviceName: CommandValue {
  static let expected =
    "GUEST/DEVICE, for instance web1/xvde (GUEST is a name, name:NAME, or id:N without leading zeros)"

  let guest: GuestName
  let device: String

  init?(argument: String) {
    guard let slash = argument.lastIndex(of: "/"), let guest = GuestName(argument: String(argument[..<slash])) else {
      return nil
    }
    self.guest = guest
    device = String(argument[argument.index(after: slash)...])
    guard !device.isEmpty else { return nil }
  }

  /// As parameters of the device methods.
  func parameters(_ client: ControlClient) throws(ControlClient.Failure) -> [JSONValue.Member] {
    [
      .init(name: "guest", value: .string(try guest.known(to: client).parameter)),
      .init(name: "device", value: .string(device)),
    ]
  }
}

/// `vxctl device VERB GUEST/DEVICE`: the same verbs by their full names.
struct Device: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Commands for one device.", subcommands: [Show.self, Pause.self, Resume.self, Restart.self, Resize.self])
}

/// `vxctl resume GUEST/DEVICE`: the end of a hold or a pause.
struct Resume: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Resume a device that is held or paused; its failed requests are executed again.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.", transform: DeviceName.value)
  var device: DeviceName

  func run() throws { try Outcome.change(connection, "device.resume", of: .device(device), options) }
}

/// `vxctl pause GUEST/DEVICE`: its requests wait.
struct Pause: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Pause a device: the guest's requests wait until you run 'vxctl resume'.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.", transform: DeviceName.value)
  var device: DeviceName

  func run() throws {
    try Outcome.change(
      connection, "device.pause", of: .device(device), options, until: Outcome(good: ["device.paused"]))
  }
}

/// `vxctl restart GUEST/DEVICE`: a new backend, also out of quarantine.
struct Restart: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Restart a device's backend, also out of quarantine; the guest only sees a stall.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.", transform: DeviceName.value)
  var device: DeviceName

  func run() throws {
    try Outcome.change(
      connection, "device.restart", of: .device(device), options,
      until: Outcome(
        good: ["device.restarted", "device.ready"],
        bad: ["device.failed", "device.quarantined", "device.faulted"]))
  }
}

/// `vxctl resize GUEST/DEVICE [BYTES]`: a new size, seen by the running guest.
struct Resize: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Give a disk the present size of its image; with SIZE, first grow the image, a regular file.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.", transform: DeviceName.value)
  var device: DeviceName
  @Argument(
    help: "New size of the image in bytes, or with K, M, G or T behind the number.",
    transform: ByteCount.value)
  var size: ByteCount?

  func run() throws {
    try Outcome.change(
      connection, "device.resize", of: .device(device), options,
      size.map { [.init(name: "bytes", value: .count($0.bytes))] } ?? [],
      until: Outcome(good: ["device.resized"], bad: ["device.notResized"]))
  }
}

/// A number of bytes with an optional binary unit.
struct ByteCount: CommandValue {
  static let expected = "a number of bytes from 0 on, as it is or with K, M, G or T behind it"

  let bytes: Int64

  init?(argument: String) {
    let units: [Character: Int64] = ["K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40]
    let unit = argument.last.flatMap { units[$0] }
    guard let number = Int64(unit == nil ? argument[...] : argument.dropLast()), number >= 0 else { return nil }
    let (bytes, overflow) = number.multipliedReportingOverflow(by: unit ?? 1)
    guard !overflow else { return nil }
    self.bytes = bytes
  }
}
