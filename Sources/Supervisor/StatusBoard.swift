import DeviceHost
import Devices
import Lifecycle
import Synchronization
import Transport
import Xen

/// What the supervisor publishes for others to read: the control socket answers from it without waiting for anybody.
///
/// Invariant: it holds values, and where a number is read as it is at the moment, the object that counts it alone (`Gauge`, `PoolGauges`,
/// `QueueCounters`, `QueueLatencies`, `IOReqServer.Counters`: atomic words, which refer to nothing else). No function, transport, pool, bus or backend can
/// be reached from here, so a reader cannot change a device, and does not keep any part of a guest alive that has ended. `StatusBoardTests` checks this.
package final class StatusBoard: Sendable {
  struct Device: Sendable {
    var key: DeviceKey
    var name: String
    var guestName: String
    var phase: DevicePhase
    var slot: DeviceSlot?
    /// What it is to the guest: disk, network, console or entropy.
    var type = ""
    var path: String?
    var readOnly = false
    /// What its backend says of itself; nil while it has none.
    var readings: BackendReadings?
    /// The driver's status register; nil where the guest cannot find the device.
    var driverStatus: DeviceStatus?
    /// How often the guest was interrupted; nil where nothing could.
    var interrupts: Gauge?
    var stuck: StuckRequest?
    /// What each of its queues counted, over all its backends.
    var accounts: [QueueAccount] = []
    var limits = RateLimits()
    var restarts = 0
    var faults = 0
    var policy = RestartPolicy()
    var isEmptySpare = false
    /// The target that the toolstack named.
    var entryPath: String?
    /// How the guest reaches it: "mmio", "pci" or "xenbus".
    var bus = ""
    /// What the guest needs for its driver to find it.
    var guestNeeds = ""
    /// Granted pages of a Xenbus device.
    var grants: GrantGauges?
    /// Its place, in words.
    var facts: [Fact] = []
    /// The address that it has beside QEMU's devices, see `DeviceFacts`.
    var addressBesideQEMU: String?
    /// What is wrong with it although it works.
    var warning: String?
    /// Event channels that are bound for it alone.
    var channels: Gauge?
  }

  struct Guest: Sendable {
    var domain: DomainID
    var name: String
    var uuid: String?
    /// The name by which the profiles know it; empty for none.
    var profileName: String { name == Supervisor.placeholder(domain) ? "" : name }
    var phase: String
    var reason: String?
    var vcpus: Int
    /// Event channels that are bound for it, beside those of its devices.
    var channels = 0
    var server: IOReqServerReport?
    /// Pages of the guest that are mapped; nil where they are granted for each device.
    var mappings: PoolGauges?
    /// How the guest reaches its devices, in words.
    var facts: [Fact] = []
    var guestNeeds = ""
    var notes: Set<GuestNote> = []
    var limits = RateLimits()
    var devices: [Device]
  }

  struct IOReqServerReport: Sendable {
    var identifier: UInt16
    var counters: IOReqServer.Counters
  }

  struct Contents: Sendable {
    var guests: [DomainID: Guest] = [:]
    var watches = 0
    var hypervisor = ""
    var hasXenstore = false
    /// Device nodes of the host that are needed, below /dev/xen.
    var hostNodes: [String] = []
    var limits = RateLimits()
  }

  private let contents = Mutex(Contents())

  package init() {}

  func update(_ change: (inout Contents) -> Void) { contents.withLock { change(&$0) } }

  /// Whether the data threads make progress: fewer than half of all guests, and never one alone, have one that does not come back from a
  /// batch. Guests are counted, not devices: a guest may have most of all devices, and can make its own hang.
  package var isHealthy: Bool {
    let guests = current.guests.values
    let hanging = guests.count { $0.devices.contains { $0.stuck?.layer == .thread } }
    return hanging < 2 || hanging * 2 < guests.count
  }

  var current: Contents { contents.withLock { $0 } }
}
