import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Transport
import Xen

/// What belongs to one device of a guest beside its machine: its entry, its backend, what outlives its backends. Confined to the
/// supervisor's loop.
final class Device {
  /// A backend and its threads, from `start` to `join`.
  struct Running {
    let id: BackendID
    var threads: [LoopThread] = []
    /// nil while it is being opened.
    var backend: DeviceBackend?
  }

  let key: DeviceKey
  /// How the guest reaches it.
  let bus: any GuestBus
  /// What it was chosen by.
  let wish: DeviceWish
  /// The entry's nodes as they were when they were looked at last; empty for devices without an entry in Xenstore.
  var nodes: [String: String]
  /// What they say, with every option; nil until it has been read, or while it is wrong.
  var entry: DeviceEntry?
  /// The nodes that `entry` was made of.
  var entryNodes: [String: String] = [:]
  var running: Running?
  /// This process has opened a backend of it.
  var wasOpened = false
  /// What survives its backends; made with the first.
  var state: DeviceState?
  let account = DeviceAccount()
  let rate: RateNode
  /// What the watchdog found last.
  var stuck: StuckRequest?

  init(_ key: DeviceKey, on bus: any GuestBus, by wish: DeviceWish, _ nodes: [String: String], rate: RateNode) {
    self.key = key
    self.bus = bus
    self.wish = wish
    self.nodes = nodes
    self.rate = rate
  }

  var backend: DeviceBackend? { running?.backend }
  var transport: (any DeviceTransport)? { bus.transport(of: key) }

  /// As operators name it; also when its entry is wrong.
  var name: String {
    if let entry { return entry.name }
    return nodes["dev"] ?? "\(type?.prefix ?? "")\(key.device)"
  }

  /// Its type: what its entry says of it, also when that is wrong.
  var type: VirtioType? {
    if let entry { return Swift.type(of: entry.settings).type }
    switch key.kind {
    case .disk, .spare: return .disk
    case .generic: return VirtioType.generic.first { $0.entryType == nodes["type"]?.lowercased() }
    case .declared(let name): return VirtioType.generic.first { $0.name == name }
    }
  }

  /// By what it is served, for people.
  var servedBy: String {
    let mode = backend?.mode ?? "?"
    return entry?.settings.image.map { "\($0), \(mode)" } ?? mode
  }

  func keep(to limits: RateLimits) {
    rate.set(limits)
    backend?.limitsChanged()
  }

  /// Requests under way.
  var inFlight: UInt64 { account.all.reduce(0) { $0 + UInt64($1.counters.inFlight.load(ordering: .relaxed)) } }
}
