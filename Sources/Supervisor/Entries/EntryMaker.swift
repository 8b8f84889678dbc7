import ControlAPI
import DeviceHost
import Devices
import Lifecycle
import Xen

/// Makes checked entries of what Xenstore and the profiles say of a device.
struct EntryMaker {
  var profiles: Profiles
  let settings: SupervisorSettings

  /// An entry with all its options.
  func entry(_ key: DeviceKey, _ nodes: [String: String], of guest: Guest) throws(EntryFault) -> DeviceEntry {
    switch key.kind {
    case .spare:
      let assignment = settings.stateFolder?.assignment(key)
      return spare(key, image: assignment?.image ?? "", limits: assignment?.limits ?? RateLimits(), of: guest)
    case .declared: return try declared(key, of: guest)
    case .generic:
      var entry = try DeviceEntry.parse(key, nodes, types: settings.types)
      try addOptions(&entry, key, nodes, guest)
      return entry
    case .disk:
      return try DeviceEntry.parse(key, nodes, types: settings.types) { disk, name in
        disk = finished(disk, key, name, guest)
      }
    }
  }

  /// What decides how a device is reached, as far as it can be read: the rest of the entry may be wrong.
  ///
  /// - Parameters:
  ///   - guest: the name by which the profiles know it.
  ///   - fallback: of devices of which nothing else is said.
  func wish(
    _ key: DeviceKey, _ nodes: [String: String], guest: String, uuid: String?, else fallback: RegisterTransport
  ) -> DeviceWish {
    let base = nodes["base"].flatMap { try? DeviceEntry.number("base", $0) } ?? 0
    // One that is none is refused with the entry, and nothing is claimed there.
    return DeviceWish(
      base: DeviceEntry.isWindow(base) ? base : 0, transport: transport(key, nodes, guest, uuid) ?? fallback)
  }

  private func transport(
    _ key: DeviceKey, _ nodes: [String: String], _ guest: String, _ uuid: String?
  ) -> RegisterTransport? {
    var members: [JSONValue.Member]?
    switch key.kind {
    case .disk, .spare:
      let name = key.kind == .spare ? Self.spareName(key) : nodes["dev"] ?? "\(key.device)"
      var disk = BlockSettings(path: "/", readOnly: false, discard: false, serial: name)
      profiles.apply(to: &disk, guest: guest, uuid: uuid, device: name, number: key.device)
      return disk.transport
    case .generic:
      members =
        profiles.options(guest: guest, uuid: uuid).devices.first {
          !$0.isCreated && $0.number == key.device
        }?.options
      let own = nodes["vx-options"].flatMap { try? JSONText.parse(Array($0.utf8)) }?["transport"]
      if let own { return own.stringValue.flatMap(RegisterTransport.init) }
    case .declared:
      members =
        profiles.options(guest: guest, uuid: uuid).devices.first {
          $0.isCreated && $0.kind == key.kind && $0.number == key.device
        }?.options
    }
    return members?.last { $0.name == "transport" }?.value.stringValue.flatMap(RegisterTransport.init)
  }

  /// A disk with the options of the daemon and of the profiles.
  private func finished(_ disk: BlockSettings, _ key: DeviceKey, _ name: String, _ guest: Guest) -> BlockSettings {
    var disk = disk
    disk.direct = settings.direct
    if let bus = guest.devices[key]?.bus {
      disk.queueSize = type(of: bus).diskQueueSize
      disk.longestChain = type(of: bus).longestDiskChain
    }
    profiles.apply(to: &disk, guest: guest.profileName, uuid: guest.uuid, device: name, number: key.device)
    disk.stopsWhenStorageIsGone = disk.restart.mode != .never
    return disk
  }

  // MARK: Spares

  /// Spare disks: declared in the profiles, there from the guest's start with no size, filled and emptied while it runs. virtio-mmio
  /// cannot add a device to a running guest; a change of size is what every driver understands.
  ///
  /// - Parameter image: what it is filled with; empty for nothing.
  func spare(_ key: DeviceKey, image: String, limits: RateLimits, of guest: Guest) -> DeviceEntry {
    let name = Self.spareName(key)
    var disk = BlockSettings(path: image, readOnly: false, discard: true, serial: name)
    disk.limits = limits
    disk = finished(disk, key, name, guest)
    // What it is filled with is an operator's word, not the profile's.
    disk.path = image
    return DeviceEntry(frontend: "", name: name, settings: disk, base: 0, irq: 0)
  }

  /// What a spare disk had when an earlier daemon ended; nil for a device that is none.
  func spare(_ key: DeviceKey) -> DeviceMachine.Spare? {
    guard key.kind == .spare else { return nil }
    return settings.stateFolder?.assignment(key)?.image.isEmpty == false ? .filled : .empty
  }

  private static func spareName(_ key: DeviceKey) -> String { "spare\(key.device)" }

  // MARK: Devices of profiles

  /// What the profile of a guest declares for it, in the order in which it is made.
  func declared(_ guest: Guest) -> [DeviceKey] {
    let options = profiles.options(guest: guest.profileName, uuid: guest.uuid)
    return (0..<UInt32(options.spareDisks)).map { DeviceKey(kind: .spare, domain: guest.domain, device: $0) }
      + options.devices.filter(\.isCreated).map {
        DeviceKey(kind: $0.kind, domain: guest.domain, device: $0.number)
      }
  }

  private func declared(_ key: DeviceKey, of guest: Guest) throws(EntryFault) -> DeviceEntry {
    let devices = profiles.options(guest: guest.profileName, uuid: guest.uuid).devices
    guard let device = devices.first(where: { $0.isCreated && $0.kind == key.kind && $0.number == key.device })
    else { throw EntryFault("devices", "no profile declares the device any more") }
    let suffix = "\(key.device)\(device.type.type.prefix.prefix(1))"
    return DeviceEntry(
      frontend: "", name: device.name, settings: try made(device, "devices", suffix, guest), base: 0, irq: 0)
  }

  private func made(
    _ device: ProfileDevice, _ field: String, _ suffix: String, _ guest: Guest
  ) throws(EntryFault) -> any DeviceSettings {
    let name = guest.profileName
    let owner = DeviceOwner(
      identity: guest.uuid ?? (name.isEmpty ? nil : name), domain: guest.domain, device: device.name, suffix: suffix)
    do throws(SettingFault) {
      return try device.settings(owner, field)
    } catch {
      throw EntryFault(error.field, error.reason)
    }
  }

  /// Gives a generic device of the toolstack's its options: those of the profile, then those of the entry.
  private func addOptions(_ entry: inout DeviceEntry, _ key: DeviceKey, _ nodes: [String: String], _ guest: Guest)
    throws(EntryFault)
  {
    guard let type = settings.types.declarable(entryType: nodes["type"] ?? "") else { return }
    let known = profiles.options(guest: guest.profileName, uuid: guest.uuid).devices.first {
      !$0.isCreated && $0.number == key.device
    }
    if let known, known.type != type {
      throw EntryFault(
        "type",
        "this is a device of type \(type.type.name), but the profile has a \(known.type.type.name) device at its place in the list"
      )
    }
    var device = known ?? ProfileDevice(type, number: key.device, options: [])
    if let text = nodes["vx-options"] {
      let value: JSONValue
      do throws(JSONText.Fault) {
        value = try JSONText.parse(Array(text.utf8))
      } catch {
        throw EntryFault("vx-options", "expected JSON")
      }
      guard let members = value.objectValue else {
        throw EntryFault("vx-options", "expected an object, not \(value.brief)")
      }
      device.options.removeAll { old in members.contains { $0.name == old.name } }
      device.options += members
    }
    entry.settings = try made(device, "vx-options", "v\(key.device)", guest)
  }
}
