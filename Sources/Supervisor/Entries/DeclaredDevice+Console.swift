import Backends
import ControlAPI
import Devices
import Engines

/// Options of console devices: those of port 0 stand beside `ports`, which are the further ones.
extension DeclaredDevice {
  private static let portNames = "name, console, overflow, socket, pty, log, logLines and historyBytes"

  func console(_ field: String) throws(ProfileFault) -> ConsoleSettings {
    var settings = ConsoleSettings(ports: [])
    var first: [JSONValue.Member] = []
    var further: [ConsolePortSettings] = []
    for member in options {
      if member.name == "ports" {
        for (index, value) in try OptionReader.array(member.value, "\(field).ports").enumerated() {
          let place = "\(field).ports[\(index)]"
          further.append(try Self.port(try OptionReader.members(value, place), place, isFirst: false))
        }
      } else if try !Self.applyCommon(member, to: &settings, field) {
        first.append(member)
      }
    }
    guard further.count <= ConsoleConfiguration.namedPortLimit else {
      throw ProfileFault(
        field: "\(field).ports", reason: "a device has \(ConsoleConfiguration.namedPortLimit) further ports at most")
    }
    settings.ports = [try Self.port(first, field, isFirst: true)] + further
    var names: Set<String> = []
    for port in settings.ports where !port.name.isEmpty && !names.insert(port.name).inserted {
      throw ProfileFault(field: "\(field).ports", reason: "two ports are called '\(port.name)'")
    }
    return settings
  }

  private static func port(
    _ members: [JSONValue.Member], _ field: String, isFirst: Bool
  ) throws(ProfileFault) -> ConsolePortSettings {
    var name = ""
    var isConsole = isFirst
    for member in members {
      let place = "\(field).\(member.name)"
      if member.name == "console" { isConsole = try OptionReader.flag(member.value, place) }
      if member.name == "name" {
        name = try OptionReader.text(member.value, place)
        guard name.utf8.count <= 128, name.utf8.allSatisfy({ $0 > 32 && $0 < 127 && $0 != UInt8(ascii: "/") }) else {
          throw ProfileFault(field: place, reason: "at most 128 printable ASCII characters without '/' are wanted")
        }
      }
    }
    guard isConsole || !name.isEmpty else {
      throw ProfileFault(field: "\(field).name", reason: "a port that is no console needs a name")
    }
    var port = ConsolePortSettings(name: name, isConsole: isConsole)
    for member in members {
      let place = "\(field).\(member.name)"
      switch member.name {
      case "name", "console": break
      case "overflow":
        let names = ConsolePortSettings.Overflow.allCases.map(\.rawValue).joined(separator: ", ")
        guard let overflow = member.value.stringValue.flatMap(ConsolePortSettings.Overflow.init(rawValue:)) else {
          throw ProfileFault(field: place, reason: "one of \(names) is wanted")
        }
        port.overflow = overflow
      case "socket": port.socket = try socket(member.value, place)
      case "pty": port.pty = try OptionReader.path(member.value, place)
      case "log": port.log = try log(member.value, place)
      case "logLines": port.logsLines = try OptionReader.flag(member.value, place)
      case "historyBytes": port.historyBytes = Int(try OptionReader.number(member.value, place, 0...16_777_216))
      default: throw ProfileFault(field: place, reason: "there is no such option; \(portNames) are")
      }
    }
    return port
  }

  private static func socket(_ value: JSONValue, _ field: String) throws(ProfileFault) -> ConsolePortSettings.Socket {
    let members = try OptionReader.members(value, field)
    guard members.count == 1, let member = members.first, member.name == "listen" || member.name == "connect" else {
      throw ProfileFault(field: field, reason: "an object with 'listen' or 'connect' is wanted")
    }
    let path = try OptionReader.path(member.value, "\(field).\(member.name)", limit: 107)
    return member.name == "listen" ? .listen(path) : .connect(path)
  }

  private static func log(_ value: JSONValue, _ field: String) throws(ProfileFault) -> ConsoleLogSettings {
    let members = try OptionReader.members(value, field)
    guard let path = members.first(where: { $0.name == "path" }) else {
      throw ProfileFault(field: "\(field).path", reason: "an absolute path is wanted")
    }
    var log = ConsoleLogSettings(path: try OptionReader.path(path.value, "\(field).path"))
    for member in members {
      let place = "\(field).\(member.name)"
      switch member.name {
      case "path": break
      case "maxBytes": log.bytesLimit = try OptionReader.number(member.value, place, 4096...(1 << 40))
      case "keep": log.kept = Int(try OptionReader.number(member.value, place, 0...100))
      case "timestamps": log.hasTimestamps = try OptionReader.flag(member.value, place)
      default:
        throw ProfileFault(field: place, reason: "there is no such option; path, maxBytes, keep and timestamps are")
      }
    }
    return log
  }
}
