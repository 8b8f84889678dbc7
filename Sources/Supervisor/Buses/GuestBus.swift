import ControlAPI
import DeviceHost
import EventLoop
import Lifecycle
import Transport
import Virtqueue
import Xen

/// What decides how a guest's devices are reached.
struct GuestFacts: Sendable {
  var domain: DomainID
  /// Whether vxd runs in a driver domain, which has no rights over its guests.
  var isDriverDomain: Bool
  /// libxl's type of the guest: hvm, pv, pvh; nil where nobody says.
  var type: String?
  /// What the profile says, or what the guest has had since an earlier daemon.
  var transport = GuestTransport.mmio
}

/// How the registers of an HVM guest's devices are found by it.
enum GuestTransport: String, CaseIterable, Sendable {
  case mmio
  case pci
}

/// What of the host a bus needs.
struct BusHost {
  var hypervisor: any Hypervisor
  var settings: SupervisorSettings
  var grantBudget: GrantBudget
  /// Takes what happens by itself on the guest's or a data thread: an event, or a configuration space that changed. Any thread.
  var report: @Sendable (BusReport) -> Void
}

/// What a bus says without being asked.
enum BusReport: Sendable {
  case driver(DeviceKey, StatusRelay)
  /// What is published of a device's configuration space may be another than before.
  case configuration(DeviceKey)
}

/// Work for the guest's thread; what it returns is reported to the guest's machine.
typealias BusJob = @Sendable () -> GuestEvent<DeviceKey>?

/// How one guest reaches its devices: one object for each guest, which owns what the guest's thread works with. Its functions are called
/// on the supervisor's loop; the jobs that they return run on the guest's thread, one after the other.
///
/// A new transport is a type that conforms, and a line in `GuestBuses.all`. Nothing above asks which one a guest has: what is special of
/// it reaches operators as `facts`.
protocol GuestBus: AnyObject, SendableMetatype {
  /// As operators see it in `vxctl show`.
  static var name: String { get }
  static var style: BusStyle { get }
  /// Device nodes of the host that it works with.
  static var hostNodes: [String] { get }
  /// What a guest needs for its drivers to find devices there: for operators whose guest has not.
  static var guestNeeds: String { get }
  /// What operators of such guests should know; nil for nothing.
  static var note: String? { get }
  /// Entries of each queue of a disk, where no profile says how many.
  static var diskQueueSize: UInt16 { get }
  /// Whether accesses of the guest are served by a server that must be made first.
  static var hasServer: Bool { get }
  /// Whether the guest's devices are reached this way. The first bus in the list that says so has the guest.
  static func serves(_ facts: GuestFacts) -> Bool
  init(_ facts: GuestFacts, _ host: BusHost) throws(XenError)

  var thread: LoopThread { get }
  /// For the status board.
  var facts: BusFacts { get }

  // MARK: The guest

  /// Finds what an earlier daemon left of the guest.
  ///
  /// - Returns: what could not be used of it, for the log.
  func restore(_ folder: StateFolder, uuid: String?) -> [(DeviceKey, String)]
  /// Devices that `restore` found and nobody has asked for with `earlier` so far.
  var unclaimed: [DeviceKey] { get }
  func startServer(uuid: String?) -> BusJob
  func leaveServer() -> BusJob
  /// Closes the server unless it was left, and the guest's memory.
  func closeServer() -> BusJob

  // MARK: Devices

  /// What is there of a device that appears.
  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?)
  /// Gives a device the place that its entry wants, before its backend is started. A device that has one keeps it.
  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault)
  /// A device that the guest does not know gives its place back.
  func vacate(_ key: DeviceKey)
  /// A device is no more.
  func forget(_ key: DeviceKey)
  /// The guest's memory as a device's backend reaches it.
  func memory(of key: DeviceKey) -> (any GuestMemorySource)?
  /// Where a device's state says that it is.
  func place(of key: DeviceKey) -> DeviceState.Place
  func transport(of key: DeviceKey) -> (any DeviceTransport)?
  func facts(of key: DeviceKey) -> DeviceFacts
  func insert(_ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool) -> BusJob
  func remove(_ key: DeviceKey) -> BusJob
  /// A device that nobody asked for: out of its place without a word.
  func discard(_ key: DeviceKey) -> BusJob

  // MARK: Handshakes in Xenstore, where the bus has them

  /// The frontend's directory of a device.
  func frontend(of key: DeviceKey) -> String?
  func leave(_ key: DeviceKey) -> BusJob
  func connect(_ key: DeviceKey, sequence: UInt32, reference: UInt32, adopts: Bool) -> BusJob
  func disconnect(_ key: DeviceKey) -> BusJob
  func write(_ key: DeviceKey, _ write: FrontendView.ConfigurationWrite) -> BusJob
  func needReset(_ key: DeviceKey)
  /// Begins another incarnation: the texts of `vx-offer` and `vx-config`.
  func offer(_ key: DeviceKey) -> (offer: String, configuration: String)?
  /// The text of `vx-config`, when it is another than before.
  func changedConfiguration(_ key: DeviceKey) -> String?
}

extension GuestBus {
  static var note: String? { nil }
  static var diskQueueSize: UInt16 { 256 }
}

/// Buses without a handshake are never asked for one: their machines' style says so.
extension GuestBus {
  func frontend(of key: DeviceKey) -> String? { nil }
  func leave(_ key: DeviceKey) -> BusJob { { .device(key, .removed) } }
  func connect(_ key: DeviceKey, sequence: UInt32, reference: UInt32, adopts: Bool) -> BusJob { { nil } }
  func disconnect(_ key: DeviceKey) -> BusJob { { nil } }
  func write(_ key: DeviceKey, _ write: FrontendView.ConfigurationWrite) -> BusJob { { nil } }
  func needReset(_ key: DeviceKey) {}
  func offer(_ key: DeviceKey) -> (offer: String, configuration: String)? { nil }
  func changedConfiguration(_ key: DeviceKey) -> String? { nil }

  /// Puts a new backend behind a device's transport.
  func plug(_ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend) -> BusJob {
    let transport = transport(of: key)
    return {
      transport?.plug(backend)
      return .device(key, .plugged(id, transport.map { Driver($0.currentStatus) } ?? .absent))
    }
  }
}

enum GuestBuses {
  /// Every transport, in the order in which they are asked.
  static let all: [any GuestBus.Type] = [XenbusBus.self, PCIBus.self, MMIOBus.self]
}

/// One thing to know.
struct Fact: Sendable {
  var name: String
  var value: String
}

/// What operators see of a guest's bus.
struct BusFacts: Sendable {
  /// In words, for `vxctl explain`.
  var rows: [Fact] = []
  var vcpus = 0
  /// Event channels that are bound for the guest, beside those of its devices.
  var channels = 0
  var server: StatusBoard.IOReqServerReport?
  var mappings: (@Sendable () -> PoolStatistics)?
}

/// What operators see of a device's place.
struct DeviceFacts: Sendable {
  /// In words, for `vxctl explain`.
  var rows: @Sendable () -> [Fact] = { [] }
  /// What is wrong with it although it works.
  var warning: String?
  var slot: DeviceSlot?
  var grants: (@Sendable () -> GrantReadings)?
  /// Event channels that are bound for the device alone.
  var channels: @Sendable () -> Int = { 0 }
}

/// Granted pages of one device.
struct GrantReadings: Sendable {
  /// How its memory is reached.
  var access: String
  var statistics: PoolStatistics
  var copiedBytes: UInt64

  init(_ pool: GrantPool) {
    access = pool.mode.rawValue
    statistics = pool.statistics
    copiedBytes = pool.copied
  }
}

extension Driver {
  /// What a status register says of it.
  init(_ status: DeviceStatus) {
    self = status.contains(.needsReset) ? .broken("") : status.contains(.driverOK) ? .live : .absent
  }
}
