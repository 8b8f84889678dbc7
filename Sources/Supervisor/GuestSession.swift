import Backends
import Devices
import EventLoop
import Synchronization
import Transport
import Xen

/// One guest with devices of ours: its ioreq thread, its memory pool, its devices. Confined to the supervisor's loop; the ioreq
/// server inside belongs to the guest's own thread.
final class GuestSession {
  enum Phase: Equatable {
    case starting
    case running
    case failed(reason: String)
    case closing
  }

  let domain: DomainID
  var name: String
  let uuid: String?
  /// What virtio-mmio needs of the guest; nil while no device of it is reached that way.
  var mmio: MMIOSide?
  /// What Xenbus devices need; nil while there is none.
  var grants: (any GrantHandle)?
  /// Directories of frontends that are watched.
  var watchedFrontends: Set<String> = []
  let thread: LoopThread
  /// Holds the ioreq server for the guest's thread, which alone touches it.
  let cell = ServerCell()
  var phase = Phase.starting
  var report: StatusBoard.IOReqServerReport?
  var vcpus = 0
  var devices: [DeviceKey: DeviceRecord] = [:]
  /// The ioreq server is ended, the memory unmapped, the thread joined.
  var isServerClosed = false
  /// Devices that an earlier daemon served, in their slots again, until their entries are looked at.
  var restored: [DeviceKey: RestoredDevice] = [:]
  /// Devices whose saved state cannot be used: the driver must reset them.
  var lost: [DeviceKey: String] = [:]
  var limits = RateLimits()
  /// The guest's node of the budget tree.
  let rate: RateNode

  init(
    domain: DomainID, name: String, uuid: String?, thread: LoopThread, rate: RateNode
  ) {
    self.rate = rate
    self.domain = domain
    self.name = name
    self.uuid = uuid
    self.thread = thread
  }

  struct MMIOSide {
    let handle: any GuestHandle
    let pool: ForeignMappingPool
  }

  var takenSlots: Set<Int> { Set(devices.values.compactMap { $0.slot?.index }) }
}

/// A device that an earlier daemon served, without its backend.
struct RestoredDevice {
  var state: DeviceState
  var transport: MMIOTransport
  var slot: DeviceSlot
  let relay: StatusRelay
}

/// A place for the ioreq server on its thread.
final class ServerCell: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: read and written on the guest's ioreq thread only.
  var server: IOReqServer?
}

/// The driver's latest status on its way from the ioreq thread to the supervisor.
///
/// At most one report is under way, however often the guest writes its status register: a guest that resets its device in a storm
/// cannot fill the supervisor's mailbox.
final class StatusRelay: Sendable {
  private let latest = Mutex<DeviceStatus?>(nil)

  /// - Returns: whether a report must be sent; else one is under way and will carry this status.
  func put(_ status: DeviceStatus) -> Bool {
    latest.withLock { latest in
      defer { latest = status }
      return latest == nil
    }
  }

  func take() -> DeviceStatus { latest.withLock { $0.take() ?? [] } }
}

/// Limits how often something that a guest can bring about is logged and announced.
struct Chatter {
  private static let limit = 20
  private static let period: UInt64 = 60_000_000_000
  private var start: UInt64 = 0
  private var count = 0

  /// What to do with one more: say it, say that the following ones are left out, or nothing.
  enum Verdict {
    case say
    case sayLast
    case silent
  }

  mutating func next(at now: UInt64) -> Verdict {
    if now &- start > Self.period {
      start = now
      count = 0
    }
    count += 1
    return count < Self.limit ? .say : count == Self.limit ? .sayLast : .silent
  }
}

/// One device of a guest. Confined to the supervisor's loop.
final class DeviceRecord {
  let key: DeviceKey
  var phase = DevicePhase.opening
  /// The entry's keys as they were when the device was started or refused: a change of them is a reason to try again.
  var keys: [String: String]
  var entry: DeviceEntry?
  var slot: DeviceSlot?
  /// The device's data threads, to be joined when it has ended.
  var threads: [LoopThread] = []
  var backend: DeviceBackend?
  var transport: (any DeviceTransport)?
  /// Its side of Xenbus, when the guest reaches it that way.
  var link: XenbusLink?
  /// What survives its backends; made with the first.
  var state: DeviceState?
  let account = DeviceAccount()
  let rate: RateNode
  var limits = RateLimits()
  var restarts = RestartHistory()
  /// Faults of the guest, which have a budget of their own.
  var faults = RestartHistory()
  var policy = RestartPolicy()
  /// The backend is on its way out, and what comes then.
  var isStoppingBackend = false
  var afterStop: AfterStop?
  /// Tries to start it that failed, before it was served for the first time.
  var failedStarts = 0
  /// An image that a spare is being filled with.
  var attaching: String?
  var isDetaching = false
  /// A restart or another try is under way: a number that changes with each.
  var restartTicket: UInt64 = 0
  /// The driver believes the device to be live, and what was saved of it cannot be used.
  var mustBeReset: String?
  /// What the guest's driver makes us say of it.
  var chatter = Chatter()
  /// Queues that are held by an error of the store, and why.
  var heldQueues: [Int: String] = [:]
  /// What the watchdog found last.
  var stuck: StuckRequest?
  /// The image is open, the guest's server is there: the device can go into its slot.
  var isAttached = false
  /// The toolstack waits for state 6 (rather than having removed the entry).
  var wantsClosedState = false
  /// Everything of it that reaches guest memory is gone.
  var isReleased = false
  /// The image is closed and the thread has ended.
  var isStopped = false

  /// What comes when the backend has stopped.
  enum AfterStop {
    case rest
    case start(afterMilliseconds: UInt64)
  }

  /// As operators name it; also when its entry is wrong.
  var name: String {
    if let entry { return entry.name }
    let type = keys["type"].flatMap(DeclaredDevice.DeviceType.init(toolstack:))
    return keys["dev"] ?? "\(type?.prefix ?? "")\(key.device)"
  }

  /// By what it is served, for people.
  var servedBy: String {
    let mode = backend?.mode ?? "?"
    return entry?.form.disk.map { "\($0.path), \(mode)" } ?? mode
  }

  /// Ends and joins the data threads.
  func joinThreads() {
    for thread in threads { thread.stopAndJoin() }
    threads = []
  }

  init(key: DeviceKey, keys: [String: String], rate: RateNode) {
    self.rate = rate
    self.key = key
    self.keys = keys
  }
}
