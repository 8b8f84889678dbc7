import ControlAPI
import DeviceHost
import EventLoop
import Lifecycle
import Transport
import Virtqueue
import Xen

/// What of a guest decides how its devices are reached.
struct GuestFacts: Sendable {
  var domain: DomainID
  /// Whether vxd runs in a driver domain, which has no rights over its guests.
  var isDriverDomain: Bool
  /// libxl's type of the guest: hvm, pv, pvh (every guest on Arm); nil where nobody says.
  var type: String?
  /// Of its devices of which nothing else is said: by the profile, or as it was when an earlier daemon began to serve the guest.
  var transport = RegisterTransport.mmio
  /// When the toolstack started it, as it says: a guest that is restarted keeps its UUID, and may get its number again.
  var started: String?

  /// Whether it is a PV or PVH guest: libxl's word for every guest on Arm is pvh.
  var isParavirtual: Bool { type == "pv" || type == "pvh" }
}

/// What of a device decides how it is reached.
struct DeviceWish: Sendable {
  /// Where the toolstack has told the guest that it is: a node of the guest's device tree (Arm). 0 where nobody has.
  var base: UInt64 = 0
  /// What its options say, or else the guest's.
  var transport = RegisterTransport.mmio
}

/// What of the host a bus needs.
struct BusHost: Sendable {
  var hypervisor: any Hypervisor
  var settings: SupervisorSettings
  var grantBudget: GrantBudget
  /// Takes what happens by itself on the guest's or a data thread: an event, or a configuration space that changed. Any thread.
  var report: @Sendable (BusReport) -> Void

  /// What a device's transport calls at each change of its status. At most one report is under way, however often the guest writes its status
  /// register: a guest that resets its device in a storm cannot fill the supervisor's mailbox.
  func statusReporter(_ key: DeviceKey) -> @Sendable (DeviceStatus) -> Void {
    let (latest, report) = (Latest<DeviceStatus>(), report)
    return { status in if latest.put(status) { report(.driver(key, latest)) } }
  }
}

/// What a bus says without being asked.
enum BusReport: Sendable {
  case driver(DeviceKey, Latest<DeviceStatus>)
  /// What is published of a device's configuration space may be another than before.
  case configuration(DeviceKey)
  /// The guest looks through its PCI bus for the first time, and waits for `GuestBus.answerScan`.
  case scan(DomainID)
}

/// What the guest's machine is told of what was done.
typealias BusEvent = GuestEvent<DeviceKey>

/// Proof of running on the guest's thread, which functions that belong there ask for. Each job there is given one; it cannot be sent to another
/// thread.
struct OnGuestThread {
  fileprivate init() {}
}

@available(*, unavailable)
extension OnGuestThread: Sendable {}

/// A guest's own thread: does what is asked of the guest's buses, one after the other.
struct GuestThread: Sendable {
  private let thread: LoopThread
  var loop: EventLoop { thread.loop }

  init(_ domain: DomainID) throws(Errno) {
    thread = try LoopThread(name: "vxd-guest-\(domain)", work: .guests)
    thread.label("\(domain)")
  }

  /// Runs a job on the thread, after all jobs that were handed over before it. Any thread.
  func run(_ job: @escaping @Sendable (OnGuestThread) -> Void) { loop.enqueue { job(OnGuestThread()) } }

  /// Ends the thread; not to be called from it.
  func stopAndJoin() { thread.stopAndJoin() }
}

/// What the buses of one guest have in common: its thread, and the server of its registers where one of them has any.
///
/// Confined to the supervisor's loop.
final class GuestGround {
  let facts: GuestFacts
  let host: BusHost
  let thread: GuestThread
  /// Made with the first bus that needs it.
  private(set) var server: RegisterServer?

  init(_ facts: GuestFacts, _ host: BusHost) throws(XenError) {
    self.facts = facts
    self.host = host
    do throws(Errno) {
      thread = try GuestThread(facts.domain)
    } catch {
      throw XenError("start of the guest's thread", error)
    }
  }

  /// The guest's ioreq server and foreign mappings, which all of its devices with registers share.
  func registers() throws(XenError) -> RegisterServer {
    if let server { return server }
    let made = try RegisterServer(facts, host, thread)
    server = made
    return made
  }
}

/// How some or all devices of one guest are reached: one object for each guest and transport, on the guest's thread. What is done to the
/// guest is done there, by the functions that take an `OnGuestThread`; they return what the guest's machine is told of it. Places are given, and
/// readings taken, on the supervisor's loop; a bus keeps what both threads look at under a lock.
///
/// A new transport is a type that conforms, and a line in `GuestBuses.all`. Nothing above asks which one a device has: what is special of
/// it reaches operators as `facts`. `GuestBuses` gives each device its bus.
protocol GuestBus: AnyObject, Sendable {
  /// As operators see it in `vxctl show`.
  static var name: String { get }
  static var style: BusStyle { get }
  /// Device nodes of the host that it works with.
  static var hostNodes: [String] { get }
  /// Entries of each queue of a disk, where no profile says how many.
  static var diskQueueSize: UInt16 { get }
  /// Buffers of a chain at most, of a disk; nil for what its queues could hold.
  static var longestDiskChain: Int? { get }
  /// Whether accesses of the guest are served by a server that must be made first.
  static var hasServer: Bool { get }
  /// Whether a device is reached this way. The first bus in the list that says so has the device.
  static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool
  /// Whether a device that an earlier daemon left is put back in its place by `restore`.
  static func restores(_ place: DevicePlace) -> Bool
  /// Whether the guest looks for a device whatever becomes of it, where nobody answers but the bus, see `DeviceMachine.Claim`.
  static func hasWindow(_ device: DeviceWish) -> Bool
  init(_ ground: GuestGround) throws(XenError)

  /// What a guest needs for its drivers to find devices there: for operators whose guest has not.
  var guestNeeds: String { get }
  /// What operators of such guests should know; nil for nothing.
  var note: GuestNote? { get }
  /// What operators see of the bus as a whole.
  var facts: [Fact] { get }

  // MARK: What an earlier daemon left

  /// Puts a device that an earlier daemon served back in its place, without a backend.
  func restore(_ key: DeviceKey, _ state: DeviceState)
  /// Devices that were restored and nobody has asked for with `earlier` so far.
  var unclaimed: [DeviceKey] { get }

  // MARK: Places

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
  func place(of key: DeviceKey) -> DevicePlace
  /// What the device was put there with; nil before. Any thread.
  func transport(of key: DeviceKey) -> (any DeviceTransport)?
  func facts(of key: DeviceKey) -> DeviceFacts

  // MARK: The guest

  /// Answers accesses to a device's window from now on, whether the device is there or not.
  func claim(_ key: DeviceKey, _ wish: DeviceWish, _ here: OnGuestThread) -> BusEvent
  /// Makes a device's transport and puts it where the guest finds it.
  func insert(
    _ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool, _ here: OnGuestThread
  ) -> BusEvent
  /// Takes a device out of the place that it has now, also a restored one that nobody asked for. The place stays its own until it is given
  /// another, or back.
  ///
  /// - Returns: what takes it away from the guest; what is behind its transport is reset first.
  func remove(_ key: DeviceKey) -> @Sendable (OnGuestThread) -> Void

  // MARK: QEMU, where the guest's devices stand beside its own

  /// Whether to ask QEMU's monitor what it has on the guest's bus.
  var asksQEMU: Bool { get }
  /// What it answered.
  ///
  /// - Returns: devices that are not to be served, since QEMU has their places too and no driver has found them so far.
  func learn(_ functions: Set<PCIAddress>) -> [Displacement]
  /// Whether a device is still in the place that it is to leave, or wanted it last.
  func isAt(_ device: Displacement) -> Bool
  /// It has not answered, or is not there any more: what it said before holds no longer, or not for long.
  func learnNothing(isGone: Bool)
  /// Lets the guest look through its bus.
  ///
  /// - Parameter absent: devices that it is not to find there, unless a driver has found them already. nil where nobody says what QEMU
  ///   has: only a guest that waits now is let look.
  /// - Returns: those of them that it does not find.
  func answerScan(without absent: [Displacement]?, _ here: OnGuestThread) -> [Displacement]

  // MARK: Handshakes in Xenstore, where the bus has them

  /// The frontend's directory of a device.
  func frontend(of key: DeviceKey) -> String?
  func leave(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent
  func connect(
    _ key: DeviceKey, sequence: UInt32, reference: UInt32, adopts: Bool, _ here: OnGuestThread
  ) -> BusEvent
  func disconnect(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent
  func write(_ key: DeviceKey, _ write: FrontendView.ConfigurationWrite, _ here: OnGuestThread)
  /// Begins another incarnation: the texts of `vx-offer` and `vx-config`.
  func offer(_ key: DeviceKey) -> (offer: String, configuration: String)?
  /// The text of `vx-config`, when it is another than before.
  func changedConfiguration(_ key: DeviceKey) -> String?
}

extension GuestBus {
  static var diskQueueSize: UInt16 { 256 }
  static var longestDiskChain: Int? { nil }
  static func restores(_ place: DevicePlace) -> Bool { false }
  static func hasWindow(_ device: DeviceWish) -> Bool { false }
  func claim(_ key: DeviceKey, _ wish: DeviceWish, _ here: OnGuestThread) -> BusEvent { .device(key, .claimed(nil)) }
  var note: GuestNote? { nil }
  var facts: [Fact] { [] }
  func restore(_ key: DeviceKey, _ state: DeviceState) {}
  var unclaimed: [DeviceKey] { [] }
  var asksQEMU: Bool { false }
  func learn(_ functions: Set<PCIAddress>) -> [Displacement] { [] }
  func isAt(_ device: Displacement) -> Bool { false }
  func learnNothing(isGone: Bool) {}
  func answerScan(without absent: [Displacement]?, _ here: OnGuestThread) -> [Displacement] { [] }
}

/// Buses without a handshake are never asked for one: their machines' style says so.
extension GuestBus {
  func frontend(of key: DeviceKey) -> String? { nil }
  func leave(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent { .device(key, .removed) }
  func connect(
    _ key: DeviceKey, sequence: UInt32, reference: UInt32, adopts: Bool, _ here: OnGuestThread
  ) -> BusEvent { .device(key, .connected(sequence: sequence, .refused("the bus has no handshake"))) }
  func disconnect(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent { .device(key, .disconnected) }
  func write(_ key: DeviceKey, _ write: FrontendView.ConfigurationWrite, _ here: OnGuestThread) {}
  func offer(_ key: DeviceKey) -> (offer: String, configuration: String)? { nil }
  func changedConfiguration(_ key: DeviceKey) -> String? { nil }

  /// Puts a new backend behind a device's transport.
  func plug(_ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, _ here: OnGuestThread) -> BusEvent {
    guard let transport = transport(of: key) else {
      return .device(key, .insertFailed(id, "the device is not in its place any more"))
    }
    transport.plug(backend)
    return .device(key, .plugged(id, Driver(transport.currentStatus)))
  }

  /// Takes the backend from behind a device's transport; the driver's requests wait for the next.
  func unplug(_ key: DeviceKey, _ here: OnGuestThread) { transport(of: key)?.unplug() }
}

/// A device whose place QEMU has too.
struct Displacement: Sendable {
  let key: DeviceKey
  let place: PCIAddress
  /// For operators.
  let reason: String
  /// It is in its place, where a driver may find it at any moment; otherwise it is not there yet.
  let isPresent: Bool
}

/// What operators of a guest should know.
enum GuestNote: Hashable, Sendable {
  case note(String)
  /// It would cost them something.
  case warning(String)
  /// Which of them it is depends on whether the guest has Xen drivers; unknown is for where nobody says. That is asked of Xen by who wants to
  /// know: nobody tells of a guest that has loaded them.
  indirect case byXenDrivers(present: GuestNote, absent: GuestNote, unknown: GuestNote)
}

/// One thing to know.
struct Fact: Sendable {
  var name: String
  var value: Reading
}

/// What operators see of a guest's server.
struct ServerFacts: Sendable {
  /// In words, for `vxctl explain`.
  var rows: [Fact] = []
  var vcpus = 0
  /// Event channels that are bound for the guest, beside those of its devices.
  var channels = 0
  var server: StatusBoard.IOReqServerReport?
  var mappings: PoolGauges?
}

/// What operators see of a device's place.
struct DeviceFacts: Sendable {
  /// In words, for `vxctl explain`.
  var rows: [Fact] = []
  /// The address of the device where QEMU has devices too, as QEMU's monitor names its own: the guest finds only one of two in the same place. nil
  /// where QEMU has none.
  var addressBesideQEMU: String?
  /// What is wrong with it although it works.
  var warning: String?
  var slot: DeviceSlot?
  var grants: GrantGauges?
  /// Event channels that are bound for the device alone.
  var channels: Gauge?
}

extension Driver {
  /// What a status register says of it.
  init(_ status: DeviceStatus) {
    self = status.contains(.needsReset) ? .broken("") : status.contains(.driverOK) ? .live : .absent
  }
}
