import DeviceHost
import EventLoop
import Synchronization
import Virtqueue
import Xen

/// What buses with trapped registers have in common: the guest's ioreq server, its memory by foreign mappings, and what of both outlives the
/// daemon. On the guest's thread, but for the functions under "For the supervisor".
final class RegisterServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: `ioreq`, `prepared` and `uuid` are read and written on the guest's thread only, by functions that
  // are given `OnGuestThread`, and by private ones that these call; the rest does not change or is under a lock.
  let handle: any GuestHandle
  let pool: ForeignMappingPool
  private let guest: GuestFacts
  private let settings: SupervisorSettings
  private let report: @Sendable (BusReport) -> Void
  private let loop: EventLoop
  private var domain: DomainID { guest.domain }
  private var ioreq: IOReqServer?
  /// Buses that the present server has been prepared for.
  private var prepared: Set<ObjectIdentifier> = []
  /// The guest's, as it was when the server was started.
  private var uuid: String?
  /// What the supervisor asks for, or has said before the first start.
  private let shared = Mutex(Shared())

  private struct Shared {
    var buses: [Member] = []
    var report: (server: StatusBoard.IOReqServerReport, vcpus: Int)?
    /// The server of an earlier daemon, until it is adopted or known to be gone.
    var earlier: UInt16?
    /// Windows that are claimed, and that the guest looks for devices in as long as it runs, whatever becomes of those.
    var windows: Set<UInt64> = []
    /// INTx pins of the guest's PCI bus that its devices drive, on whatever bus: each may belong to one only, since a level has one owner.
    var pins: [DeviceKey: DeviceSlot.Interrupt] = [:]
  }

  /// A bus owns its server.
  private struct Member {
    weak var bus: (any RegisterBus)?
  }

  init(_ guest: GuestFacts, _ host: BusHost, _ thread: GuestThread) throws(XenError) {
    self.guest = guest
    loop = thread.loop
    settings = host.settings
    report = host.report
    handle = try host.hypervisor.open(guest.domain)
    pool = ForeignMappingPool(guest: handle, bucketShift: settings.bucketShift, budgetBytes: settings.mappingBudget)
  }

  // MARK: For the supervisor

  /// Prepares each server for a bus too.
  func add(_ bus: any RegisterBus) { shared.withLock { $0.buses.append(Member(bus: bus)) } }

  /// Notes which pin a device drives; nil for none.
  func setPin(_ pin: DeviceSlot.Interrupt?, of key: DeviceKey) { shared.withLock { $0.pins[key] = pin } }

  /// Whether another device drives a pin.
  func isTaken(_ pin: DeviceSlot.Interrupt) -> Bool { shared.withLock { $0.pins.values.contains(pin) } }

  var facts: ServerFacts {
    let report = shared.withLock { $0.report }
    let row = report.map { Fact(name: "ioreq server", value: "\($0.server.identifier), for \($0.vcpus) vCPUs") }
    return ServerFacts(
      rows: row.map { [$0] } ?? [], vcpus: report?.vcpus ?? 0, channels: report?.vcpus ?? 0, server: report?.server,
      mappings: pool.gauges)
  }

  /// What becomes of the devices when xl saves the guest. Nobody carries their state, so all depends on whether the guest has reset them. xl migrates
  /// a guest that runs, and nobody would tell it which pages of the guest's memory vxd writes to meanwhile.
  static let savingNote = GuestNote.byXenDrivers(
    present: .note(
      "xl save and xl restore keep these devices; xl migrate corrupts the guest's memory: shut it down instead"),
    absent: .warning(
      "xl save and xl migrate lose the state of these devices: the guest has no Xen drivers that would reset them first; shut it down instead"
    ),
    unknown: .note(
      "xl save and xl restore keep these devices only if the guest has Xen drivers, as Linux has; xl migrate corrupts the guest's memory: shut it down instead"
    ))

  /// Devices that an earlier daemon left files of; none when they are of another guest, whose domain number came again, or of another life of
  /// this one: rings of that time are not to be served.
  func earlierDevices(_ folder: StateFolder, uuid: String?) -> [DeviceKey] {
    guard let saved = folder.guest(domain) else { return [] }
    guard saved.isOf(uuid: uuid, started: guest.started) else {
      folder.forgetAll(domain)
      return []
    }
    shared.withLock {
      $0.earlier = saved.server
      $0.windows = Set(saved.windows)
    }
    return folder.contents.devices.filter { $0.domain == domain }
  }

  /// xl in dom0 gives the first four disks of an HVM guest to QEMU as IDE drives too: two writers on one image. Guests on Arm have no QEMU.
  func warning(_ key: DeviceKey) -> String? {
    guard !guest.isParavirtual, key.kind == .disk, let index = DeviceEntry.diskIndex(key.device), index < 4 else {
      return nil
    }
    return "QEMU has disks xvda to xvdd of an HVM guest too, as IDE drives, and is a second writer on the image: "
      + "use vdev=xvde or later, or name the backend (backend=Domain-0)"
  }

  // MARK: The server

  /// The server; ESRCH when there is none.
  func server(_ here: OnGuestThread) throws(XenError) -> IOReqServer {
    guard let ioreq else { throw XenError("ioreq server", Errno(3) /* ESRCH */) }
    return ioreq
  }

  /// The server for a device of a bus that is to be put there.
  func server(preparedFor bus: any RegisterBus, _ here: OnGuestThread) throws(XenError) -> IOReqServer {
    let ioreq = try server(here)
    if !prepared.contains(ObjectIdentifier(bus)) {
      try bus.prepare(ioreq, here)
      prepared.insert(ObjectIdentifier(bus))
    }
    return ioreq
  }

  /// Makes the ioreq server, or takes over that of an earlier daemon, whose guest may be waiting for answers from it.
  func start(uuid: String?, _ here: OnGuestThread) -> BusEvent {
    self.uuid = uuid
    do throws(XenError) {
      let made = try makeServer()
      (ioreq, prepared) = (made, [])
      for window in shared.withLock({ $0.windows }).sorted() { try made.claim(window: window) }
      for bus in shared.withLock({ $0.buses.compactMap(\.bus) }) { _ = try server(preparedFor: bus, here) }
      made.serveAll()
      let report = StatusBoard.IOReqServerReport(identifier: made.identifier, counters: made.counters)
      shared.withLock { $0.report = (report, made.vcpuCount) }
      return .serverStarted
    } catch {
      giveUp()
      return .serverFailed(
        "cannot create an ioreq server for the guest (\(error)); this requires dom0, and an HVM guest or a guest on Arm, where Xen must be built with CONFIG_IOREQ_SERVER"
      )
    }
  }

  private func makeServer() throws(XenError) -> IOReqServer {
    let ignores = settings.ignoresInvalidations
    if let number = shared.withLock({ $0.earlier }) {
      do throws(XenError) {
        let server = try IOReqServer(
          guest: handle, pool: pool, loop: loop, adopting: number, ignoresInvalidations: ignores)
        shared.withLock { $0.earlier = nil }
        return server
      } catch {
        // Anything else may be over soon. The guest's accesses wait for that server then, which another one would not answer.
        guard IOReqServer.isGone(error) else { throw error }
        // And with it whoever waited for it: a new one serves as well.
        shared.withLock { $0.earlier = nil }
      }
    }
    do throws(XenError) {
      // Known to a later daemon before it can hold up a vCPU.
      return try IOReqServer(guest: handle, pool: pool, loop: loop, ignoresInvalidations: ignores) { save($0) }
    } catch {
      save(nil)
      throw error
    }
  }

  /// The server is there, and cannot be used: one that an earlier daemon has made is left for the next try, since vCPUs may wait for it.
  private func giveUp() {
    guard let server = ioreq else { return }
    ioreq = nil
    if server.isAdopted {
      shared.withLock { $0.earlier = server.identifier }
      server.leave()
    } else {
      server.destroy()
      // Its number may be QEMU's next.
      save(nil)
    }
  }

  /// Has accesses to a window answered for as long as the guest runs: an empty slot, until a device is put there.
  func claim(window base: UInt64, _ here: OnGuestThread) throws(XenError) {
    let ioreq = try server(here)
    try ioreq.claim(window: base)
    remember(window: base, of: ioreq, here)
  }

  /// Remembers a window, also for a later daemon; to be called once Xen has taken it. What Xen has refused is not asked for again with each start of
  /// the server: the guest's other devices would wait for it.
  func remember(window base: UInt64, of ioreq: IOReqServer, _ here: OnGuestThread) {
    if shared.withLock({ $0.windows.insert(base).inserted }) { save(ioreq.identifier) }
  }

  private func save(_ identifier: UInt16?) {
    let windows = shared.withLock { $0.windows.sorted() }
    let saved = StateFolder.Guest(
      server: identifier, uuid: uuid, transport: guest.transport, started: guest.started, windows: windows)
    try? settings.stateFolder?.save(saved, of: domain)
  }

  // MARK: The guest's look through its PCI bus

  /// Has the guest's first look through its bus wait for `answerScan`, and reports it.
  func holdScan(_ server: IOReqServer, _ here: OnGuestThread) {
    let number = server.identifier
    server.holdConfiguration { [loop, report, domain, longest = settings.longestScanHold, weak self] in
      // Whatever becomes of the question, the guest gets an answer.
      loop.schedule(afterMilliseconds: longest) { [weak self] in
        if let server = self?.ioreq, server.identifier == number { server.answerWaitingConfiguration() }
      }
      report(.scan(domain))
    }
  }

  /// - Parameter absent: functions that are not to be found on the bus, too late for a guest that has looked already; nil where nobody says.
  /// - Returns: those that a driver has found, and that stay.
  func answerScan(without absent: [PCIAddress]?, _ here: OnGuestThread) -> [PCIAddress] {
    if let absent { return ioreq?.answerConfiguration(without: absent) ?? [] }
    ioreq?.answerWaitingConfiguration()
    return []
  }

  // MARK: The end

  /// Gives all mappings back; the server stays, and the guest's accesses are answered.
  func releaseMemory(_ here: OnGuestThread) { pool.invalidate() }

  /// Lets go of the server, for a later daemon.
  func leave(_ here: OnGuestThread) {
    ioreq?.leave()
    ioreq = nil
    // One that could not be adopted so far is for the later daemon too: vCPUs wait in it.
    shared.withLock { $0.earlier = nil }
  }

  /// Ends the server, and takes the guest's memory back.
  func close(_ here: OnGuestThread) {
    ioreq?.close()
    ioreq = nil
    // One that could not be adopted would let the guest's accesses wait for ever.
    if let earlier = shared.withLock({ $0.earlier.take() }) { try? handle.destroyIOReqServer(earlier) }
    shared.withLock { $0.report = nil }
    pool.close()
  }
}
