import ControlAPI
import DeviceHost
package import Devices
package import Lifecycle
import Xen

/// How the daemon serves its guests.
package struct SupervisorSettings: Sendable {
  /// Socket of a simulated xenstored; nil for the real one.
  package var xenstoreSocket: String?
  /// virtio-mmio slots of an x86 guest, 1 to 32; the guest's ACPI table has as many.
  package var slots = SlotTable.defaultCount
  /// Guest memory that is kept mapped per guest at most, in bytes.
  package var mappingBudget: UInt64 = 1 << 30
  /// Bytes of a mapping bucket as a power of two, 12 to 30.
  package var bucketShift = 21
  /// Granted pages that are kept mapped at most, of all guests together.
  package var grantBudget = 1 << 17
  /// What one guest may have of them; nil for a quarter.
  package var grantShare: Int?
  /// Milliseconds between two checks that xenstored is there.
  package var xenstoreCheckMilliseconds: UInt64 = 5000
  /// Milliseconds that a guest's first look through its PCI bus waits at most until it is known what QEMU has there: more than QEMU's monitor
  /// is given to answer.
  package var longestScanHold: UInt64 = 5000
  /// Where QEMU's monitors are, one for each guest.
  package var qemuFolder = QEMUMonitor.folder
  /// Where what must survive the daemon is kept; nil keeps nothing: devices end with the daemon.
  package var stateFolder: StateFolder?
  /// Who is behind deaths of the daemon; nil where nothing is kept of them.
  package var crashes: CrashRecord?
  /// Where `vxctl console` finds the ports of consoles; nil for nowhere.
  package var consoleFolder: String?
  /// Whether the peer of a socket may see and use consoles.
  package var mayAttachConsoles: @Sendable (_ descriptor: Int32) -> Bool = { _ in true }
  /// Faults of a guest's driver on one device within the window of its restart policy; one more, and the device is quarantined.
  package var faultLimit = 50
  /// Pauses between two tries to start a device that was never served.
  package var startRetry: RestartPolicy = {
    var policy = RestartPolicy()
    policy.firstPause = 1000
    return policy
  }()
  /// Options of devices that libxl cannot carry.
  package var profiles = Profiles()
  /// Puts something between each queue and its engine: faults in tests.
  package var decorate: @Sendable (any BlockEngine, _ queue: Int) -> any BlockEngine = { engine, _ in engine }
  /// For a test that shows what invalidations are for: do nothing at one.
  package var ignoresInvalidations = false
  /// Try O_DIRECT.
  package var direct = true

  /// Types of devices that are served.
  var types = DeviceTypes.all
  /// What guests may be reached by, in the order in which they are asked.
  var buses = GuestBuses.all

  package init() {}

  /// Device nodes below /dev/xen that buses may need in this domain.
  func hostNodes(isDriverDomain: Bool) -> [String] {
    var nodes: Set<String> = []
    for bus in buses {
      let isPossible =
        !isDriverDomain || bus.serves(GuestFacts(domain: 0, isDriverDomain: true, type: nil), DeviceWish())
      if isPossible { nodes.formUnion(bus.hostNodes) }
    }
    return nodes.sorted()
  }

  /// The bus of a device; nil when none serves it.
  func bus(_ guest: GuestFacts, _ device: DeviceWish) -> (any GuestBus.Type)? {
    GuestBuses.choice(guest, device, of: buses)
  }
}
