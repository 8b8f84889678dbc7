import Backends
import ControlAPI
import EventLoop
import Xen

/// Devices that profiles declare: there from the guest's start without a word of the toolstack, and until the guest ends.
extension Supervisor {
  /// Makes a guest's spares and declared devices, those of an earlier daemon included.
  func openDeclared(_ session: GuestSession) {
    // Of a guest that is no more, only the traces are looked after.
    guard store?.read("/local/domain/\(session.domain)/name") != nil else { return }
    openSpares(session)
    for (key, _) in declared(session) where session.devices[key] == nil {
      open(key, [:], of: session)
    }
  }

  private func declared(_ session: GuestSession) -> [(DeviceKey, DeclaredDevice)] {
    profiles.options(guest: session.name, uuid: session.uuid).devices.filter(\.isCreated).map { device in
      (DeviceKey(kind: device.type.kind, domain: session.domain, device: device.number), device)
    }
  }

  /// What a declared device's entry is.
  func declaredEntry(_ key: DeviceKey, of session: GuestSession) throws(EntryFault) -> DeviceEntry {
    guard let device = declared(session).first(where: { $0.0 == key })?.1 else {
      throw EntryFault("devices", "no profile declares the device any more")
    }
    return DeviceEntry(
      frontend: "", name: device.name,
      form: try form(device, "devices", "\(key.device)\(device.type.prefix.prefix(1))", session), base: 0, irq: 0)
  }

  private func form(
    _ device: DeclaredDevice, _ field: String, _ suffix: String, _ session: GuestSession
  ) throws(EntryFault) -> DeviceForm {
    let owner = DeclaredDevice.Owner(
      guest: session.name, uuid: session.uuid, domain: session.domain, tapSuffix: suffix)
    do throws(ProfileFault) {
      return try device.form(owner, field)
    } catch {
      throw EntryFault(error.field, error.reason)
    }
  }

  /// Gives a generic device of the toolstack's its options: those of the profile, then those of the entry.
  func addOptions(_ entry: inout DeviceEntry, _ key: DeviceKey, _ keys: [String: String], _ session: GuestSession)
    throws(EntryFault)
  {
    guard let type = DeclaredDevice.DeviceType(toolstack: keys["type"] ?? "") else { return }
    let known = profiles.options(guest: session.name, uuid: session.uuid).devices.first {
      !$0.isCreated && $0.number == key.device
    }
    if let known, known.type != type {
      throw EntryFault(
        "type", "this is of type \(type.rawValue), and the profile has a \(known.type.rawValue) device in its place")
    }
    var device = known ?? DeclaredDevice(type, number: key.device, options: [])
    if let text = keys["vx-options"] {
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
    entry.form = try form(device, "vx-options", "v\(key.device)", session)
  }

  // MARK: Guests without a device in Xenstore

  /// Looks for guests whose profile declares devices: a guest's name is there when xenstored is told of it.
  func findGuests() {
    guard !isDriverDomain, !isStopping, profiles.declaresDevices else { return }
    for domain in (store?.list("/local/domain") ?? []).compactMap({ DomainID($0) }) where domain != 0 {
      guard sessions[domain] == nil, let name = store?.read("/local/domain/\(domain)/name"), !usesXenbus(domain) else {
        continue
      }
      let uuid = store?.read("/local/domain/\(domain)/vm").flatMap { $0.split(separator: "/").last.map(String.init) }
      guard profiles.options(guest: name, uuid: uuid).devices.contains(where: \.isCreated) else { continue }
      do throws(XenError) {
        _ = try session(for: domain)
      } catch {
        log.error("guest \(name): its declared devices cannot be served: \(error)")
      }
    }
  }

  /// Ends the declared devices of guests that are no more.
  func closeOrphans() {
    for session in sessions.values where session.phase != .closing {
      do throws(XenError) {
        guard try store?.readIfThere("/local/domain/\(session.domain)/name") == nil, store != nil else { continue }
      } catch {
        continue
      }
      for record in session.devices.values where !record.key.kind.isInXenstore {
        close(record, of: session, wantsClosedState: false)
      }
    }
  }

  /// Removes taps of guests that nobody serves any more: what a daemon left that was killed, and whose guest ended then.
  func sweepTaps() {
    TapSweeper.remove { domain in sessions[domain] == nil }
  }
}
