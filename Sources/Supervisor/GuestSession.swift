import Backends
import EventLoop
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
  let pool: ForeignMappingPool
  let handle: any GuestHandle
  let thread: LoopThread
  /// Holds the ioreq server for the guest's thread, which alone touches it.
  let cell = ServerCell()
  var phase = Phase.starting
  var report: StatusBoard.IOReqServerReport?
  var vcpus = 0
  var devices: [DeviceKey: DeviceRecord] = [:]
  /// The ioreq server is ended, the memory unmapped, the thread joined.
  var isServerClosed = false

  init(
    domain: DomainID, name: String, uuid: String?, handle: any GuestHandle, pool: ForeignMappingPool, thread: LoopThread
  ) {
    self.domain = domain
    self.name = name
    self.uuid = uuid
    self.handle = handle
    self.pool = pool
    self.thread = thread
  }

  var takenSlots: Set<Int> { Set(devices.values.compactMap { $0.slot?.index }) }
}

/// A place for the ioreq server on its thread.
final class ServerCell: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: read and written on the guest's ioreq thread only.
  var server: IOReqServer?
}

/// One device of a guest. Confined to the supervisor's loop.
final class DeviceRecord {
  let key: DeviceKey
  var phase = DevicePhase.opening
  /// The entry's keys as they were when the device was started or refused: a change of them is a reason to try again.
  var keys: [String: String]
  var entry: DeviceEntry?
  var slot: DeviceSlot?
  var thread: LoopThread?
  var backend: BlockBackend?
  var transport: MMIOTransport?
  /// The image is open, the guest's server is there: the device can go into its slot.
  var isAttached = false
  /// The toolstack waits for state 6 (rather than having removed the entry).
  var wantsClosedState = false
  /// Everything of it that reaches guest memory is gone.
  var isReleased = false
  /// The image is closed and the thread has ended.
  var isStopped = false

  init(key: DeviceKey, keys: [String: String]) {
    self.key = key
    self.keys = keys
  }
}
