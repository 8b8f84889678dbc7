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

/// `vxctl resume GUEST/DEVICE`: the end of a hold.
struct Resume: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Lets a device go on that was held by errors of its store; what failed is tried again.")

  @OptionGroup var connection: ConnectionOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.")
  var device: DeviceName

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      let answer = try client.call("device.resume", .object(device.parameters))
      if connection.json { printJSON(answer) }
    }
  }
}

/// `vxctl resize GUEST/DEVICE [BYTES]`: a new size, seen by the running guest.
struct Resize: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Makes a disk follow the size of its image, or grows a regular file first.")

  @OptionGroup var connection: ConnectionOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/xvde.")
  var device: DeviceName
  @Argument(
    help: "Size for a regular file in bytes, or with K, M, G or T; without it the image's present size is taken.")
  var size: ByteCount?

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      _ = try client.call("event.subscribe")
      var parameters = device.parameters
      if let size { parameters.append(.init(name: "bytes", value: .count(size.bytes))) }
      _ = try client.call("device.resize", .object(parameters))
      while true {
        guard let event = try client.receive(30_000)["params"], event["device"]?.stringValue == device.device else {
          continue
        }
        let reason = event["reason"]?.stringValue ?? ""
        if event["event"] == "device.notResized" {
          throw .refused(ControlFault(code: -32002, message: reason))
        }
        guard event["event"] == "device.resized" else { continue }
        if connection.json { printJSON(event) } else { print(reason) }
        return
      }
    }
  }
}

/// A number of bytes with an optional binary unit.
struct ByteCount: ExpressibleByArgument {
  let bytes: Int64

  init?(argument: String) {
    let units: [Character: Int64] = ["K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40]
    let unit = argument.last.flatMap { units[$0] }
    guard let number = Int64(unit == nil ? argument[...] : argument.dropLast()), number > 0 else { return nil }
    let (bytes, overflow) = number.multipliedReportingOverflow(by: unit ?? 1)
    guard !overflow else { return nil }
    self.bytes = bytes
  }
}

/// `vxctl reload`: the profiles anew.
struct Reload: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Reads the profiles of disks again, for the disks that are opened from now on.")

  @OptionGroup var connection: ConnectionOptions

  func run() throws {
    try connection.run { client throws(ControlClient.Failure) in
      let answer = try client.call("config.reload")
      if connection.json { printJSON(answer) }
    }
  }
}
