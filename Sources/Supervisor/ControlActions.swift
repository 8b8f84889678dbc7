package import ControlAPI
import DeviceHost
import Devices
import Glibc
import Lifecycle
import Synchronization
import Xen

extension SupervisorControl {
  /// What operators can have done; the supervisor exists later than its control socket.
  package final class Actions: Sendable {
    private let supervisor = Mutex<Supervisor?>(nil)
    private let profilePath: String?
    private let profiles: Mutex<Profiles>
    private let shutdown = Mutex<(@Sendable (_ handsOver: Bool) -> Void)?>(nil)

    /// - Parameter profilePath: the file that `config.reload` reads; nil when profiles are off.
    package init(profilePath: String? = nil, profiles: Profiles = Profiles()) {
      self.profilePath = profilePath
      self.profiles = Mutex(profiles)
    }

    package func connect(_ supervisor: Supervisor) { self.supervisor.withLock { $0 = supervisor } }

    /// What `system.shutdown` does.
    package func onShutdown(_ body: @escaping @Sendable (_ handsOver: Bool) -> Void) {
      shutdown.withLock { $0 = body }
    }

    func endDaemon(handsOver: Bool) { shutdown.withLock { $0 }?(handsOver) }

    /// Has something done to a device's life, if it is there by then.
    func order(_ device: StatusBoard.Device, _ command: DeviceEvent.Command) -> JSONValue {
      supervisor.withLock { $0 }?.order(device.key, command)
      return ["accepted": true]
    }

    typealias LimitsChange = @Sendable (RateLimits) -> RateLimits

    func limit(_ key: DeviceKey, _ change: @escaping LimitsChange) { supervisor.withLock { $0 }?.limit(key, change) }

    func limit(_ domain: DomainID, _ change: @escaping LimitsChange) {
      supervisor.withLock { $0 }?.limit(domain, change)
    }

    func limitAll(_ change: @escaping LimitsChange) { supervisor.withLock { $0 }?.limitAll(change) }

    /// Whether a guest has Xen drivers, as Xen says now: a question to Xen alone, by the thread that asks.
    func hasXenDrivers(_ domain: DomainID) -> Bool? { supervisor.withLock { $0 }?.hypervisor.hasXenDrivers(domain) }

    // MARK: Profiles

    /// Why only role admin may have a guest use an image; nil when its profile lists it.
    func adminReason(image: String, of guest: StatusBoard.Guest) -> String? {
      let images = profiles.withLock { $0.options(guest: guest.profileName, uuid: guest.uuid).spareImages }
      return images.contain(image)
        ? nil : "'\(image)' is not in 'spareImages' of guest '\(guest.name)' in the profiles"
    }

    private static func fault(_ fault: SettingFault, _ remedy: String) -> ControlFault {
      ControlFault(
        code: -32003, message: fault.message, data: ["field": .string(fault.field), "remedy": .string(remedy)])
    }

    static func profiles(_ value: JSONValue) throws(ControlFault) -> Profiles {
      do throws(SettingFault) {
        return try Profiles(value)
      } catch {
        throw fault(error, "correct it; nothing is changed")
      }
    }

    /// Reads the profiles again; a bad file changes nothing.
    package func reload() throws(ControlFault) { try read().map(use) }

    func read() throws(ControlFault) -> Profiles? {
      guard let profilePath else { return nil }
      do throws(SettingFault) {
        return try Profiles(path: profilePath, isOptional: true)
      } catch {
        throw Self.fault(error, "correct \(profilePath); the old profiles stay in force")
      }
    }

    func use(_ new: Profiles) {
      profiles.withLock { $0 = new }
      supervisor.withLock { $0 }?.onLoop { $0.use(profiles: new) }
    }

    /// Entries of profiles times devices that a comparison looks at: what role view may have the control thread do in one request.
    private static let differenceLimit = 1_000_000

    func difference(_ new: Profiles, _ contents: StatusBoard.Contents) throws(ControlFault) -> JSONValue {
      let devices = contents.guests.values.reduce(0) { $0 + $1.devices.count }
      guard new.count * devices <= Self.differenceLimit else {
        throw .invalidParameters(
          "\(new.count) entries for \(devices) devices are too many to compare; expected a product of at most "
            + "\(Self.differenceLimit)", field: "profiles")
      }
      let old = profiles.withLock { $0 }
      var changed: [JSONValue] = []
      for guest in SupervisorControl.sorted(contents) {
        for device in guest.devices where device.key.kind != .spare {
          let before = old.optionTexts(of: device, guest)
          let after = new.optionTexts(of: device, guest)
          let changes = Self.names(before, after).compactMap { name -> JSONValue? in
            let (old, new) = (before.first { $0.0 == name }?.1, after.first { $0.0 == name }?.1)
            return old == new ? nil : .string("\(name): \(old ?? "not set") -> \(new ?? "not set")")
          }
          guard !changes.isEmpty else { continue }
          changed.append([
            "guest": .string(guest.name), "device": .string(device.name), "changes": .array(changes),
          ])
        }
      }
      return .array(changed)
    }

    /// The names of both, in their order.
    private static func names(_ before: [(String, String)], _ after: [(String, String)]) -> [String] {
      var seen: Set<String> = []
      return (before + after).map(\.0).filter { seen.insert($0).inserted }
    }
  }
}

extension Profiles {
  /// A device's options by name, with their values as profiles write them; nothing where the profile does not know it.
  fileprivate func optionTexts(of device: StatusBoard.Device, _ guest: StatusBoard.Guest) -> [(String, String)] {
    guard device.key.kind != .disk else {
      var disk = BlockSettings(path: device.entryPath ?? "", readOnly: false, discard: false, serial: "")
      apply(to: &disk, guest: guest.profileName, uuid: guest.uuid, device: device.name, number: device.key.device)
      return disk.optionTexts
    }
    let declared = options(guest: guest.profileName, uuid: guest.uuid).devices.first { declared in
      device.key.kind == .generic
        ? !declared.isCreated && declared.number == device.key.device
        : declared.isCreated && declared.kind == device.key.kind && declared.number == device.key.device
    }
    // What is derived for a guest is the same before and after, also where it is not known who that is.
    let owner = DeviceOwner(identity: guest.uuid ?? guest.name, domain: guest.domain, device: device.name, suffix: "")
    // Checked when the profile was read.
    return (try? declared?.settings(owner, ""))?.optionTexts ?? []
  }
}
