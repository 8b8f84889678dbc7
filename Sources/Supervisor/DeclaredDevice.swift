import Backends
import ControlAPI
import Devices
import Engines
import Glibc
import Xen

/// A network, console or entropy device as a profile declares it for a guest:
///
///     "devices": [{"type": "network", "bridge": "br0"},
///                 {"type": "console", "log": {"path": "/var/log/vxd/db1.log"},
///                  "ports": [{"name": "org.qemu.guest_agent.0", "socket": {"listen": "/run/vxd/db1-agent.sock"}}]},
///                 {"type": "entropy"}]
///
/// Its name counts within its type (net0, console0, rng0). vxd makes it with the guest, unless `create` is false: then these are the
/// options of the device of that name which the toolstack makes (`virtio = [ "type=virtio,device1,..." ]`).
struct DeclaredDevice: Equatable, Sendable {
  enum DeviceType: String, CaseIterable, Sendable {
    case network
    case console
    case entropy

    /// What it is in the toolstack's entries.
    var generic: ToolstackDevice.GenericType {
      switch self {
      case .network: .network
      case .console: .console
      case .entropy: .entropy
      }
    }

    /// What names of such devices begin with.
    var prefix: String { generic.rawValue }

    var kind: DeviceKey.Kind {
      switch self {
      case .network: .network
      case .console: .console
      case .entropy: .entropy
      }
    }

    /// The type of a generic device of libxl's, `virtio,device` and the virtio number in hexadecimal.
    init?(toolstack type: String) {
      let generic = ToolstackDevice.GenericType(entryType: type.lowercased())
      guard let known = Self.allCases.first(where: { $0.generic == generic }) else { return nil }
      self = known
    }
  }

  var type: DeviceType
  var name: String
  var isCreated = true
  /// Checked.
  var options: [JSONValue.Member]

  /// For whom a device is made.
  struct Owner {
    var guest: String
    var uuid: String?
    var domain: DomainID
    /// Tells its taps from those of the guest's other devices.
    var tapSuffix: String
  }

  /// - Parameter counts: devices of each type so far, for names.
  init(_ value: JSONValue, _ field: String, counts: inout [DeviceType: Int]) throws(ProfileFault) {
    guard let members = value.objectValue else { throw ProfileFault(field: field, reason: "an object is wanted") }
    let names = DeviceType.allCases.map(\.rawValue).joined(separator: ", ")
    guard let type = value["type"]?.stringValue.flatMap(DeviceType.init(rawValue:)) else {
      throw ProfileFault(field: "\(field).type", reason: "one of \(names) is wanted")
    }
    self.type = type
    name = "\(type.prefix)\(counts[type] ?? 0)"
    counts[type, default: 0] += 1
    options = []
    for member in members {
      switch member.name {
      case "type": break
      case "create": isCreated = try OptionReader.flag(member.value, "\(field).create")
      default: options.append(member)
      }
    }
    // For a guest of no meaning, so that a mistake shows now and not when a guest comes.
    _ = try form(Owner(guest: "", uuid: nil, domain: 0, tapSuffix: "0"), field)
  }

  /// Of a device that the toolstack made, with the options that its entry carries.
  init(_ type: DeviceType, name: String, options: [JSONValue.Member]) {
    self.type = type
    self.name = name
    self.options = options
  }

  /// The device with its options.
  func form(_ owner: Owner, _ field: String) throws(ProfileFault) -> DeviceForm {
    switch type {
    case .entropy:
      var settings = EntropySettings()
      for member in options where try !Self.applyCommon(member, to: &settings, field) {
        throw ProfileFault(
          field: "\(field).\(member.name)", reason: "there is no such option; \(Self.commonNames) are")
      }
      return .entropy(settings)
    case .network: return .network(try network(owner, field))
    case .console: return .console(try console(field))
    }
  }

  static let commonNames = "limits, restart, restartLimit and restartWindowSeconds"

  /// - Returns: whether the option is one that devices of every type have.
  static func applyCommon(
    _ member: JSONValue.Member, to settings: inout some DeviceSettings, _ field: String
  ) throws(ProfileFault) -> Bool {
    let place = "\(field).\(member.name)"
    switch member.name {
    case "limits": try settings.limits.change(member.value, place)
    case "restart":
      let names = RestartPolicy.Mode.allCases.map(\.rawValue).joined(separator: ", ")
      guard let mode = member.value.stringValue.flatMap(RestartPolicy.Mode.init(rawValue:)) else {
        throw ProfileFault(field: place, reason: "one of \(names) is wanted")
      }
      settings.restart.mode = mode
    case "restartLimit": settings.restart.limit = Int(try OptionReader.number(member.value, place, 1...1000))
    case "restartWindowSeconds":
      settings.restart.windowSeconds = try OptionReader.number(member.value, place, 1...86_400)
    default: return false
    }
    return true
  }
}

/// Reads values of options.
enum OptionReader {
  static func number(
    _ value: JSONValue, _ field: String, _ range: ClosedRange<Int64>
  ) throws(ProfileFault) -> UInt64 {
    guard let number = value.integerValue, range.contains(number) else {
      throw ProfileFault(
        field: field, reason: "a whole number from \(range.lowerBound) to \(range.upperBound) is wanted")
    }
    return UInt64(number)
  }

  static func flag(_ value: JSONValue, _ field: String) throws(ProfileFault) -> Bool {
    guard let flag = value.boolValue else { throw ProfileFault(field: field, reason: "true or false is wanted") }
    return flag
  }

  static func text(_ value: JSONValue, _ field: String) throws(ProfileFault) -> String {
    guard let text = value.stringValue, !text.isEmpty else {
      throw ProfileFault(field: field, reason: "a string is wanted")
    }
    return text
  }

  /// An absolute path; short enough for the address of a socket where it is one.
  static func path(_ value: JSONValue, _ field: String, limit: Int = 4095) throws(ProfileFault) -> String {
    let path = try text(value, field)
    guard path.hasPrefix("/"), path.utf8.count <= limit, !path.utf8.contains(0) else {
      throw ProfileFault(field: field, reason: "an absolute path of at most \(limit) bytes is wanted")
    }
    return path
  }

  static func array(_ value: JSONValue, _ field: String) throws(ProfileFault) -> [JSONValue] {
    guard let array = value.arrayValue else { throw ProfileFault(field: field, reason: "an array is wanted") }
    return array
  }

  static func members(_ value: JSONValue, _ field: String) throws(ProfileFault) -> [JSONValue.Member] {
    guard let members = value.objectValue else { throw ProfileFault(field: field, reason: "an object is wanted") }
    return members
  }
}
