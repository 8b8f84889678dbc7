import ArgumentParser
import ControlAPI

/// `vxctl link GUEST/DEVICE up|down`: the cable of a network device.
struct Link: ParsableCommand {
  enum Direction: String, ExpressibleByArgument, CaseIterable {
    case up
    case down
  }

  static let configuration = CommandConfiguration(
    abstract: "Pulls the cable of a network device, or plugs it in; the guest sees it, and it stays so.")

  @OptionGroup var connection: ConnectionOptions
  @OptionGroup var options: ChangeOptions
  @Argument(help: "GUEST/DEVICE, for instance web1/net0.")
  var device: DeviceName
  @Argument(help: "up or down.")
  var direction: Direction

  func run() throws {
    try Outcome.change(
      connection, "device.link", device.parameters + [.init(name: "up", value: .bool(direction == .up))], options)
  }
}
