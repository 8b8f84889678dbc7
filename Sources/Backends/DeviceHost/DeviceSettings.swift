import Devices
package import EventLoop
package import JSON
package import Lifecycle
package import Transport
package import Virtqueue
package import Xen

/// A type of device: what it is to virtio and to operators, its options, how one is started, and what it leaves behind. A value is one
/// device of the type with its options, which are checked already.
///
/// A new type is a folder beside this file, with a type that conforms, and a line in `DeviceTypes.all`.
package protocol DeviceSettings: Equatable, Sendable {
  static var type: VirtioType { get }
  /// Whether a profile can declare devices of the type, and libxl's generic kind bring them.
  static var canBeDeclared: Bool { get }

  /// What its supervisor does when the backend fails.
  var restart: RestartPolicy { get set }
  /// What the device may use.
  var limits: RateLimits { get set }
  /// Offer exactly these features: what the driver of a running device knows.
  var offered: FeatureBits? { get set }
  /// Its device number on the guest's PCI bus; nil for vxd's choice. Of no meaning to other transports.
  var slot: UInt8? { get set }
  /// How an HVM guest finds the device; nil as its other devices.
  var transport: RegisterTransport? { get set }
  /// What a disk stores its data in, "" for an empty spare; nil for devices of other types.
  var image: String? { get set }
  var readOnly: Bool { get }

  // MARK: Options

  /// Of a device that a profile or the toolstack brings, from the members of its object.
  ///
  /// - Parameter field: where the object stands, for messages.
  init(options: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault)
  /// Every option with its value.
  var optionTexts: [(name: String, value: String)] { get }
  /// Its options as docs/profiles.md has them, without those that all types have.
  static var documents: [OptionDocument] { get }

  // MARK: Devices

  /// Keeps the shape that the guest's driver knows of a device that runs.
  mutating func keep(queueSizes: [UInt16])
  /// Keeps what the guest's driver has read of the configuration space of a device that runs.
  mutating func keep(configuration: [UInt8])
  /// Starts a backend, see `DeviceBackend.start`.
  func start(
    _ context: DeviceBackend.Context,
    completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread]
  /// Removes what of a device outlives its backends. May wait for other programs; on the guest's thread.
  func removeTraces(_ device: DeviceTraces)
  /// The same of devices whose guests are no more. May wait for other programs.
  static func removeOrphans(where isOrphan: (DomainID) -> Bool)
}

extension DeviceSettings {
  package static var canBeDeclared: Bool { true }
  package static var documents: [OptionDocument] { [] }
  package var image: String? {
    get { nil }
    set {}
  }
  package var readOnly: Bool { false }
  package mutating func keep(queueSizes: [UInt16]) {}
  package mutating func keep(configuration: [UInt8]) {}
  package func removeTraces(_ device: DeviceTraces) {}
  package static func removeOrphans(where isOrphan: (DomainID) -> Bool) {}

  /// Keeps what the guest's driver knows of a device that runs.
  package mutating func keep(_ identity: DeviceIdentity) {
    offered = identity.offeredFeatures
    keep(queueSizes: identity.queueSizes)
  }
}

/// For whom a device is made.
package struct DeviceOwner: Sendable {
  /// What is the guest's for good, and what outlives it may be derived from: its UUID, or its name where that alone is known. nil where only
  /// the domain's number is known, as in a driver domain until dom0 has written the UUID: after a reboot of the host that is another guest's.
  package var identity: String?
  package var domain: DomainID
  /// The device's name.
  package var device: String
  /// Tells what is made for it from what is made for the guest's other devices.
  package var suffix: String

  package init(identity: String?, domain: DomainID, device: String, suffix: String) {
    self.identity = identity
    self.domain = domain
    self.device = device
    self.suffix = suffix
  }
}

/// What traces of a device are called by.
package struct DeviceTraces: Sendable {
  /// The device in names of files.
  package var fileName: String
  /// Where sockets and memories of console ports are; nil for none.
  package var consoleFolder: String?

  package init(fileName: String, consoleFolder: String?) {
    self.fileName = fileName
    self.consoleFolder = consoleFolder
  }
}

/// Every type of device, in the order in which messages name them.
package enum DeviceTypes {
  package static let all: [any DeviceSettings.Type] = [
    BlockSettings.self, NetSettings.self, ConsoleSettings.self, EntropySettings.self,
  ]
}

extension [any DeviceSettings.Type] {
  /// The type of this name that profiles can declare.
  package func declarable(named name: String) -> (any DeviceSettings.Type)? {
    first { $0.canBeDeclared && $0.type.name == name }
  }

  /// The type of a generic device of libxl's.
  package func declarable(entryType: String) -> (any DeviceSettings.Type)? {
    first { $0.canBeDeclared && $0.type.entryType == entryType.lowercased() }
  }
}

extension OptionDocument {
  /// Those of the type alone: the common ones have a table of their own.
  var withoutCommonOptions: OptionDocument {
    let common = Set(EntropySettings.options.rows.map(\.option.name))
    return OptionDocument(title: title, rows: rows.filter { !common.contains($0.option.name) })
  }
}

extension DeviceState.Layout {
  /// For devices that need no journal: their rings say where they go on.
  init(unjournaled identity: DeviceIdentity) { self.init(identity: identity, slotCount: 1, chainLimit: 1) }
}

extension DeviceBackend {
  /// Makes something that fails as rings or the host do.
  static func make<Value>(_ body: () throws -> Value) throws(StartFault) -> Value {
    do {
      return try body()
    } catch let error as Errno {
      throw .host(error)
    } catch let error as StartFault {
      throw error
    } catch {
      throw .state("a queue cannot be made: \(error)")
    }
  }
}
