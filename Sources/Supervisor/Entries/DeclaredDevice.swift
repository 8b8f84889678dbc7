import Backends
import ControlAPI
import Devices
import Engines
import Glibc
import Lifecycle
import Xen

/// A network, console or entropy device as a profile declares it for a guest:
///
///     "devices": [{"type": "network", "bridge": "br0"},
///                 {"type": "console", "log": {"path": "/var/log/vxd/db1.log"},
///                  "ports": [{"name": "org.qemu.guest_agent.0", "socket": {"listen": "/run/vxd/db1-agent.sock"}}]},
///                 {"type": "entropy"}]
///
/// Its name counts within its type (net0, console0, rng0), and vxd makes it with the guest. Devices with `"create": false` are options of
/// those that the toolstack makes: the first of them belongs to the first of `virtio = [ "type=virtio,device1,...", ... ]`, and so on,
/// whose place in that list is the number in their name (net0, console1).
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
  /// Of vxd's devices of this type, or in the toolstack's list.
  var number: UInt32
  var isCreated = true
  /// Checked.
  var options: [JSONValue.Member]

  var name: String { "\(type.prefix)\(number)" }

  /// For whom a device is made.
  struct Owner {
    var guest: String
    var uuid: String?
    var domain: DomainID
    /// Tells its taps from those of the guest's other devices.
    var tapSuffix: String
  }

  /// - Parameter others: those before it in the guest's list, for its number.
  init(_ value: JSONValue, _ field: String, after others: [DeclaredDevice]) throws(ProfileFault) {
    guard let members = value.objectValue else { throw ProfileFault(field: field, reason: "an object is wanted") }
    let names = DeviceType.allCases.map(\.rawValue).joined(separator: ", ")
    guard let type = value["type"]?.stringValue.flatMap(DeviceType.init(rawValue:)) else {
      throw ProfileFault(field: "\(field).type", reason: "one of \(names) is wanted")
    }
    self.type = type
    options = []
    number = 0
    for member in members {
      switch member.name {
      case "type": break
      case "create": isCreated = try OptionReader.flag(member.value, "\(field).create")
      default: options.append(member)
      }
    }
    number = UInt32(others.count { $0.isCreated == isCreated && (!isCreated || $0.type == type) })
    if let other = others.first(where: { $0.type == type && $0.isCreated != isCreated && $0.number == number }) {
      throw ProfileFault(
        field: field, reason: "\(other.name) would be the name of two devices, one of vxd's and one of the toolstack's")
    }
    // For a guest of no meaning, so that a mistake shows now and not when a guest comes.
    _ = try form(Owner(guest: "", uuid: nil, domain: 0, tapSuffix: "0"), field)
  }

  /// Of a device that the toolstack made, with the options that its entry carries.
  init(_ type: DeviceType, number: UInt32, options: [JSONValue.Member]) {
    self.type = type
    self.number = number
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
