import ArgumentParser
import ControlAPI

/// `vxctl link GUEST/DEVICE up|down`: the link state of a network device.
struct Link: ParsableCommand {
  enum Direction: String, ExpressibleByArgument, CaseIterable {
    case up
    case down
  }

  static let configuration = CommandConfiguration(
    abstract: "Set the link state of a network device; it persists until changed.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/net0.")
  var device: DeviceName
  @Argument(help: "up or down.")
  var direction: Direction

  func run() throws {
    try Outcome.change(
      connection, "device.link", of: .device(device), options, [.init(name: "up", value: .bool(direction == .up))])
  }
}
