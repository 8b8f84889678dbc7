import ControlAPI
import DeviceHost
import Xen

/// A device as a profile declares it for a guest:
///
///     "devices": [{"type": "network", "bridge": "br0"},
///                 {"type": "console", "log": {"path": "/var/log/vxd/db1.log"},
///                  "ports": [{"name": "org.qemu.guest_agent.0", "socket": {"listen": "/run/vxd/db1-agent.sock"}}]},
///                 {"type": "entropy"}]
///
/// Its name counts within its type (net0, console0, rng0), and vxd makes it with the guest. Devices with `"create": false` are options of
/// those that the toolstack makes: the first of them belongs to the first of `virtio = [ "type=virtio,device1,...", ... ]`, and so on,
/// whose place in that list is the number in their name (net0, console1).
struct ProfileDevice: Sendable {
  var type: any DeviceSettings.Type
  /// Of vxd's devices of this type, or in the toolstack's list.
  var number: UInt32
  var isCreated = true
  /// Checked.
  var options: [JSONValue.Member]

  var name: String { "\(type.type.prefix)\(number)" }
  var kind: DeviceKey.Kind { .declared(type.type.name) }

  /// - Parameters:
  ///   - types: those that are served.
  ///   - others: those before it in the guest's list, for its number.
  init(
    _ value: JSONValue, _ field: String, types: [any DeviceSettings.Type], after others: [ProfileDevice]
  ) throws(SettingFault) {
    guard let members = value.objectValue else { throw SettingFault(field, expected: "an object", not: value) }
    guard let type = value["type"]?.stringValue.flatMap({ types.declarable(named: $0) }) else {
      let names = types.filter { $0.canBeDeclared }.map { $0.type.name }.joined(separator: ", ")
      throw SettingFault("\(field).type", expected: "one of \(names)", not: value["type"] ?? .null)
    }
    self.type = type
    options = []
    number = 0
    for member in members {
      switch member.name {
      case "type": break
      case "create":
        guard let flag = member.value.boolValue else {
          throw SettingFault("\(field).create", expected: "true or false", not: member.value)
        }
        isCreated = flag
      default: options.append(member)
      }
    }
    number = UInt32(others.count { $0.isCreated == isCreated && (!isCreated || $0.kind == kind) })
    if let other = others.first(where: { $0.kind == kind && $0.isCreated != isCreated && $0.number == number }) {
      throw SettingFault(
        field: field,
        reason:
          "\(other.name) would be the name of two devices, one created by vxd and one by the toolstack; expected different names"
      )
    }
    // For a guest of no meaning, so that a mistake shows now and not when a guest comes.
    _ = try settings(DeviceOwner(identity: "", domain: 0, device: name, suffix: "0"), field)
  }

  /// Of a device that the toolstack made, with the options that its entry carries.
  init(_ type: any DeviceSettings.Type, number: UInt32, options: [JSONValue.Member]) {
    self.type = type
    self.number = number
    self.options = options
  }

  /// The device with its options.
  func settings(_ owner: DeviceOwner, _ field: String) throws(SettingFault) -> any DeviceSettings {
    try type.init(options: options, for: owner, field)
  }
}

extension ProfileDevice: Equatable {
  static func == (left: ProfileDevice, right: ProfileDevice) -> Bool {
    left.kind == right.kind && left.number == right.number && left.isCreated == right.isCreated
      && left.options == right.options
  }
}
