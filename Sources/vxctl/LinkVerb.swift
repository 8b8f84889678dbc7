import ArgumentParser
import ControlAPI

/// `vxctl link GUEST/DEVICE up|down`: the link state of a network device.
struct Link: ParsableCommand {
  enum Direction: String, CommandValue, CaseIterable {
    case up
    case down
  }

  static let configuration = CommandConfiguration(
    abstract: "Set the link state of a network device; it persists until it is changed again.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/net0.", transform: DeviceName.value)
  var device: DeviceName
  @Argument(help: "up or down.", completion: .list(Direction.allCases.map(\.rawValue)), transform: Direction.value)
  var direction: Direction

  func run() throws {
    try Outcome.change(
      connection, "device.link", of: .device(device), options, [.init(name: "up", value: .bool(direction == .up))])
  }
}
