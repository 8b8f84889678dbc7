import ArgumentParser
import ControlAPI

/// A device as operators name it: GUEST/DEVICE.
struct DeviceName: ExpressibleByArgument {
  let guest: String
  let device: String

  init?(argument: String) {
    let parts = argument.split(separator: "/", omittingEmptySubsequences: false)
    guard parts.count == 2, !parts[0].isEmpty, !parts[1].isEmpty else { return nil }
    (guest, device) = (String(parts[0]), String(parts[1]))
  }

  /// As parameters of the device methods.
  var parameters: [JSONValue.Member] {
    [.init(name: "guest", value: .string(guest)), .init(name: "device", value: .string(device))]
  }
}

/// `vxctl device VERB GUEST/DEVICE`: the same verbs by their full names.
struct Device: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Verbs on one device.", subcommands: [Show.self, Pause.self, Resume.self, Restart.self, Resize.self])
}

/// `vxctl resume GUEST/DEVICE`: the end of a hold or a pause.
struct Resume: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Lets a device go on that was held by errors of its store, or paused; what failed is tried again.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.")
  var device: DeviceName

  func run() throws { try Outcome.change(connection, "device.resume", device.parameters, options) }
}

/// `vxctl pause GUEST/DEVICE`: its requests wait.
struct Pause: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Stops a device's backend: the guest's requests wait until 'vxctl resume'.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.")
  var device: DeviceName

  func run() throws {
    try Outcome.change(
      connection, "device.pause", device.parameters, options, device: device.device,
      until: Outcome(good: ["device.paused"]))
  }
}

/// `vxctl restart GUEST/DEVICE`: a new backend, also out of quarantine.
struct Restart: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Makes a device's backend anew, also out of quarantine; the guest sees a pause.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.")
  var device: DeviceName

  func run() throws {
    try Outcome.change(
      connection, "device.restart", device.parameters, options, device: device.device,
      until: Outcome(
        good: ["device.restarted", "device.ready"],
        bad: ["device.failed", "device.quarantined", "device.faulted"]))
  }
}

/// `vxctl resize GUEST/DEVICE [BYTES]`: a new size, seen by the running guest.
struct Resize: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Makes a disk follow the size of its image, or grows a regular file first.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.")
  var device: DeviceName
  @Argument(
    help: "Size for a regular file in bytes, or with K, M, G or T; without it the image's present size is taken.")
  var size: ByteCount?

  func run() throws {
    var parameters = device.parameters
    if let size { parameters.append(.init(name: "bytes", value: .count(size.bytes))) }
    try Outcome.change(
      connection, "device.resize", parameters, options, device: device.device,
      until: Outcome(good: ["device.resized"], bad: ["device.notResized"]))
  }
}

/// A number of bytes with an optional binary unit.
struct ByteCount: ExpressibleByArgument {
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
