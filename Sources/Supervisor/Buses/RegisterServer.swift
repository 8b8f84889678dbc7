import DeviceHost
import EventLoop
import Synchronization
import Virtqueue
import Xen

/// What buses with trapped registers have in common: the guest's ioreq server on the guest's thread, its memory by foreign mappings, and
/// what of both outlives the daemon. On the supervisor's loop, but for what jobs do.
final class RegisterServer {
  let thread: LoopThread
  let handle: any GuestHandle
  let pool: ForeignMappingPool
  private let guest: GuestFacts
  private let host: BusHost
  private let cell = ServerCell()
  private var domain: DomainID { guest.domain }
  /// What each bus does before the first access is answered: it puts restored devices in their places.
  private var preparations: [() -> Preparation] = []
  private var isStarted = false
  /// The guest's, as it was when the server was started.
  private var uuid: String?
  /// INTx pins of the guest's PCI bus that its devices drive, on whatever bus: each may belong to one only, since a level has one owner.
  private var pins: [DeviceKey: DeviceSlot.Interrupt] = [:]

  static let note =
    "xl save and migrate do not carry the state of these devices (ioreq-based): shut the guest down instead"

  typealias Preparation = @Sendable (IOReqServer) throws(XenError) -> Void

  init(_ guest: GuestFacts, _ host: BusHost, _ thread: LoopThread) throws(XenError) {
    self.guest = guest
    self.host = host
    self.thread = thread
    handle = try host.hypervisor.open(guest.domain)
    pool = ForeignMappingPool(
      guest: handle, bucketShift: host.settings.bucketShift, budgetBytes: host.settings.mappingBudget)
  }

  /// - Parameter body: makes the preparation, each time that the server is started; where it is there already, at once.
  func prepare(_ body: @escaping () -> Preparation) {
    preparations.append(body)
    guard isStarted else { return }
    let (cell, late) = (cell, body())
    // What fails here is claimed with the first device.
    thread.loop.enqueue { if let server = cell.server { try? late(server) } }
  }

  /// Notes which pin a device drives; nil for none.
  func setPin(_ pin: DeviceSlot.Interrupt?, of key: DeviceKey) { pins[key] = pin }

  /// Whether another device drives a pin.
  func isTaken(_ pin: DeviceSlot.Interrupt) -> Bool { pins.values.contains(pin) }

  var facts: ServerFacts {
    let server = cell.report.withLock { $0 }
    let row = server.map { Fact(name: "ioreq server", value: "\($0.report.identifier), for \($0.vcpus) vCPUs") }
    return ServerFacts(
      rows: row.map { [$0] } ?? [], vcpus: server?.vcpus ?? 0, channels: server?.vcpus ?? 0, server: server?.report,
      mappings: { [pool] in pool.statistics })
  }

  /// Devices that an earlier daemon left files of; none when they are of another guest, whose domain number came again, or of another life of
  /// this one: rings of that time are not to be served.
  func earlierDevices(_ folder: StateFolder, uuid: String?) -> [DeviceKey] {
    guard let saved = folder.guest(domain) else { return [] }
    guard saved.isOf(uuid: uuid, started: guest.started) else {
      folder.forgetAll(domain)
      return []
    }
    cell.earlier.withLock { $0 = saved.server }
    cell.windows.withLock { $0 = Set(saved.windows) }
    return folder.contents.devices.filter { $0.domain == domain }
  }

  // MARK: The guest's look through its PCI bus

  /// How long the first accesses to configuration spaces wait at most for `answerScan`, in milliseconds: more than QEMU's monitor is given.
  static let longestHold: UInt64 = 5000

  /// Part of a preparation: has the guest's first look through its bus wait for `answerScan`, and reports it.
  func holdScan() -> Preparation {
    let (cell, loop, report, domain) = (cell, thread.loop, host.report, domain)
    return { server in
      let number = server.identifier
      server.holdConfiguration {
        // Whatever becomes of the question, the guest gets an answer.
        loop.schedule(afterMilliseconds: Self.longestHold) {
          if let server = cell.server, server.identifier == number { server.answerConfiguration() }
        }
        report(.scan(domain))
      }
    }
  }

  /// Lets the guest look through its bus.
  ///
  /// - Parameter absent: functions that are not to be found there. Too late for a guest that has looked already.
  func answerScan(without absent: [PCIAddress] = []) {
    let cell = cell
    thread.loop.enqueue { cell.server?.answerConfiguration(without: absent) }
  }

  // MARK: Jobs for the guest's thread

  /// Makes the ioreq server, or takes over that of an earlier daemon, whose guest may be waiting for answers from it.
  func start(uuid: String?) -> BusJob {
    let (domain, folder, cell, handle, pool, loop) = (
      domain, host.settings.stateFolder, cell, handle, pool, thread.loop
    )
    let preparations = preparations.map { $0() }
    isStarted = true
    self.uuid = uuid
    let (transport, started) = (guest.transport, guest.started)
    let ignoresInvalidations = host.settings.ignoresInvalidations
    return {
      let windows = cell.windows.withLock { $0 }.sorted()
      do throws(XenError) {
        let server = try cell.makeServer(
          handle, pool, loop, ignoresInvalidations: ignoresInvalidations
        ) { identifier in
          // Known to a later daemon before it can hold up a vCPU.
          try? folder?.save(
            StateFolder.Guest(server: identifier, uuid: uuid, transport: transport, started: started, windows: windows),
            of: domain)
        }
        cell.server = server
        for window in windows { try server.claim(window: window) }
        for prepare in preparations { try prepare(server) }
        server.serveAll()
        cell.report.withLock {
          $0 = (
            StatusBoard.IOReqServerReport(identifier: server.identifier, counters: server.counters), server.vcpuCount
          )
        }
        return .serverStarted
      } catch {
        cell.giveUp()
        return .serverFailed(
          "cannot create an ioreq server for the guest (\(error)); it needs dom0, an HVM guest or one on Arm, and there a Xen that is built with CONFIG_IOREQ_SERVER"
        )
      }
    }
  }

  /// Has accesses to a window answered for as long as the guest runs: an empty slot, until a device is put there.
  func claim(window base: UInt64, of key: DeviceKey) -> BusJob {
    let note = noting(window: base)
    let claim = use { server throws(XenError) in
      try server.claim(window: base)
      note(server)
    }
    return {
      do throws(XenError) {
        try claim()
        return .device(key, .claimed(nil))
      } catch {
        return .device(key, .claimed("base: \(error)"))
      }
    }
  }

  /// Remembers a window, also for a later daemon; to be called once Xen has taken it. What Xen has refused is not asked for again with each start of
  /// the server: the guest's other devices would wait for it.
  func noting(window base: UInt64) -> @Sendable (IOReqServer) -> Void {
    let (cell, domain, folder, guest, uuid) = (cell, domain, host.settings.stateFolder, guest, uuid)
    return { server in
      let windows = cell.windows.withLock { windows in windows.insert(base).inserted ? windows.sorted() : nil }
      guard let windows else { return }
      let saved = StateFolder.Guest(
        server: server.identifier, uuid: uuid, transport: guest.transport, started: guest.started, windows: windows)
      try? folder?.save(saved, of: domain)
    }
  }

  /// Gives all mappings back; the server stays, and the guest's accesses are answered.
  func releaseMemory() -> BusJob {
    let pool = pool
    return {
      pool.invalidate()
      return .memoryReleased
    }
  }

  /// Lets go of the server, for a later daemon.
  func leave() -> BusJob {
    let cell = cell
    return {
      cell.server?.leave()
      cell.server = nil
      // One that could not be adopted so far is for the later daemon too: vCPUs wait in it.
      cell.earlier.withLock { $0 = nil }
      return nil
    }
  }

  /// Ends the server, and takes the guest's memory back.
  func close() -> BusJob {
    let (cell, pool, handle) = (cell, pool, handle)
    return {
      cell.server?.close()
      cell.server = nil
      // One that could not be adopted would let the guest's accesses wait for ever.
      if let earlier = cell.earlier.withLock({ $0.take() }) { try? handle.destroyIOReqServer(earlier) }
      cell.report.withLock { $0 = nil }
      pool.close()
      return .serverClosed
    }
  }

  /// What a job does with the server, on the guest's thread; ESRCH when there is none.
  func use(
    _ body: @escaping @Sendable (IOReqServer) throws(XenError) -> Void
  ) -> @Sendable () throws(XenError) -> Void {
    let cell = cell
    return { () throws(XenError) in
      guard let server = cell.server else { throw XenError("ioreq server", Errno(3) /* ESRCH */) }
      try body(server)
    }
  }

  /// xl in dom0 gives the first four disks of an HVM guest to QEMU as IDE drives too: two writers on one image. Guests on Arm have no QEMU.
  func warning(_ key: DeviceKey) -> String? {
    guard !guest.isParavirtual, key.kind == .disk, let index = DeviceEntry.diskIndex(key.device), index < 4 else {
      return nil
    }
    return "vdev xvda to xvdd of an HVM guest is an IDE drive of QEMU's as well, a second writer on the image: "
      + "use vdev=xvde or later, or name the backend (backend=Domain-0)"
  }
}

/// A place for the ioreq server on its thread.
private final class ServerCell: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `server` is read and written on the guest's thread only; the rest is made for sharing.
  var server: IOReqServer?
  let report = Mutex<(report: StatusBoard.IOReqServerReport, vcpus: Int)?>(nil)
  /// The server of an earlier daemon, until it is adopted or known to be gone.
  let earlier = Mutex<UInt16?>(nil)
  /// Windows that are claimed, and that the guest looks for devices in as long as it runs, whatever becomes of those.
  let windows = Mutex<Set<UInt64>>([])

  /// Makes the server, or takes over that of an earlier daemon, whose guest may be waiting for answers from it.
  func makeServer(
    _ handle: any GuestHandle, _ pool: ForeignMappingPool, _ loop: EventLoop, ignoresInvalidations: Bool,
    onCreated: (UInt16) -> Void
  ) throws(XenError) -> IOReqServer {
    if let number = earlier.withLock({ $0 }) {
      do throws(XenError) {
        let server = try IOReqServer(
          guest: handle, pool: pool, loop: loop, adopting: number, ignoresInvalidations: ignoresInvalidations)
        earlier.withLock { $0 = nil }
        return server
      } catch {
        // Anything else may be over soon. The guest's accesses wait for that server then, which another one would not answer.
        guard IOReqServer.isGone(error) else { throw error }
        // And with it whoever waited for it: a new one serves as well.
        earlier.withLock { $0 = nil }
      }
    }
    return try IOReqServer(
      guest: handle, pool: pool, loop: loop, ignoresInvalidations: ignoresInvalidations, onCreated: onCreated)
  }

  /// The server is there, and cannot be used: one that an earlier daemon has made is left for the next try, since vCPUs may wait for it.
  func giveUp() {
    guard let server else { return }
    if server.isAdopted {
      earlier.withLock { $0 = server.identifier }
      server.leave()
    } else {
      server.close()
    }
    self.server = nil
  }
}
