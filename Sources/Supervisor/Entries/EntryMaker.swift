import Backends
import ControlAPI
import Devices
import Lifecycle
import Xen

/// Makes checked entries of what Xenstore and the profiles say of a device.
struct EntryMaker {
  var profiles: DiskProfiles
  let settings: SupervisorSettings

  /// An entry with all its options.
  func entry(_ key: DeviceKey, _ nodes: [String: String], of guest: Guest) throws(EntryFault) -> DeviceEntry {
    var entry: DeviceEntry
    switch key.kind {
    case .disk, .generic: entry = try DeviceEntry.parse(key, nodes)
    case .spare: entry = spare(key)
    case .network, .console, .entropy: entry = try declared(key, of: guest)
    }
    if key.kind == .generic { try addOptions(&entry, key, nodes, guest) }
    if var disk = entry.form.disk {
      disk.direct = settings.direct
      apply(to: &disk, key, entry.name, guest)
      disk.stopsWhenStoreIsGone = disk.restart.mode != .never
      entry.form = .disk(disk)
    }
    return entry
  }

  /// The profiles' options of a disk.
  func apply(to disk: inout BlockSettings, _ key: DeviceKey, _ name: String, _ guest: Guest) {
    profiles.apply(to: &disk, guest: guest.profileName, uuid: guest.uuid, device: name, number: key.device)
  }

  // MARK: Spares

  /// Spare disks: declared in the profiles, there from the guest's start with no size, filled and emptied while it runs. virtio-mmio
  /// cannot add a device to a running guest; a change of size is what every driver understands.
  private func spare(_ key: DeviceKey) -> DeviceEntry {
    let name = "spare\(key.device)"
    var entry = DeviceEntry(
      frontend: "", name: name, form: .disk(BlockSettings(path: "", readOnly: false, discard: true, serial: name)),
      base: 0, irq: 0)
    if let filling = settings.stateFolder?.filling(key) {
      entry.form.disk?.path = filling.image
      entry.form.disk?.limits = filling.limits
    }
    return entry
  }

  // MARK: Devices of profiles

  /// What the profile of a guest declares for it, in the order in which it is made.
  func declared(_ guest: Guest) -> [DeviceKey] {
    let options = profiles.options(guest: guest.profileName, uuid: guest.uuid)
    return (0..<UInt32(options.spareDisks)).map { DeviceKey(kind: .spare, domain: guest.domain, device: $0) }
      + options.devices.filter(\.isCreated).map {
        DeviceKey(kind: $0.type.kind, domain: guest.domain, device: $0.number)
      }
  }

  private func declared(_ key: DeviceKey, of guest: Guest) throws(EntryFault) -> DeviceEntry {
    let devices = profiles.options(guest: guest.profileName, uuid: guest.uuid).devices
    guard let device = devices.first(where: { $0.isCreated && $0.type.kind == key.kind && $0.number == key.device })
    else { throw EntryFault("devices", "no profile declares the device any more") }
    return DeviceEntry(
      frontend: "", name: device.name,
      form: try form(device, "devices", "\(key.device)\(device.type.prefix.prefix(1))", guest), base: 0, irq: 0)
  }

  private func form(
    _ device: DeclaredDevice, _ field: String, _ suffix: String, _ guest: Guest
  ) throws(EntryFault) -> DeviceForm {
    let owner = DeclaredDevice.Owner(guest: guest.name, uuid: guest.uuid, domain: guest.domain, tapSuffix: suffix)
    do throws(ProfileFault) {
      return try device.form(owner, field)
    } catch {
      throw EntryFault(error.field, error.reason)
    }
  }

  /// Gives a generic device of the toolstack's its options: those of the profile, then those of the entry.
  private func addOptions(_ entry: inout DeviceEntry, _ key: DeviceKey, _ nodes: [String: String], _ guest: Guest)
    throws(EntryFault)
  {
    guard let type = DeclaredDevice.DeviceType(toolstack: nodes["type"] ?? "") else { return }
    let known = profiles.options(guest: guest.profileName, uuid: guest.uuid).devices.first {
      !$0.isCreated && $0.number == key.device
    }
    if let known, known.type != type {
      throw EntryFault(
        "type", "this is of type \(type.rawValue), and the profile has a \(known.type.rawValue) device in its place")
    }
    var device = known ?? DeclaredDevice(type, number: key.device, options: [])
    if let text = nodes["vx-options"] {
      let value: JSONValue
      do throws(JSONText.Fault) {
        value = try JSONText.parse(Array(text.utf8))
      } catch {
        throw EntryFault("vx-options", "this is no JSON")
      }
      guard let members = value.objectValue else { throw EntryFault("vx-options", "an object is wanted") }
      device.options.removeAll { old in members.contains { $0.name == old.name } }
      device.options += members
    }
    entry.form = try form(device, "vx-options", "v\(key.device)", guest)
  }
}
