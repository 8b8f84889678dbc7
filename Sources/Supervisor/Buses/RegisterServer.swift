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
  private let domain: DomainID
  private let started: String?
  private let host: BusHost
  private let cell = ServerCell()

  init(_ facts: GuestFacts, _ host: BusHost) throws(XenError) {
    domain = facts.domain
    started = facts.started
    self.host = host
    handle = try host.hypervisor.open(domain)
    pool = ForeignMappingPool(
      guest: handle, bucketShift: host.settings.bucketShift, budgetBytes: host.settings.mappingBudget)
    do throws(Errno) {
      thread = try LoopThread(name: "vxd-ioreq-\(domain)")
      thread.label("\(domain)")
    } catch {
      throw XenError("start of the ioreq thread", error)
    }
  }

  var facts: BusFacts {
    let server = cell.report.withLock { $0 }
    let row = server.map { Fact(name: "ioreq server", value: "\($0.report.identifier), for \($0.vcpus) vCPUs") }
    return BusFacts(
      rows: row.map { [$0] } ?? [], vcpus: server?.vcpus ?? 0, channels: server?.vcpus ?? 0, server: server?.report,
      mappings: { [pool] in pool.statistics })
  }

  /// Devices that an earlier daemon left files of; none when they are of another guest, whose domain number came again, or of another life of
  /// this one: rings of that time are not to be served.
  func earlierDevices(_ folder: StateFolder, uuid: String?) -> [DeviceKey] {
    guard let saved = folder.guest(domain) else { return [] }
    guard saved.isOf(uuid: uuid, started: started) else {
      folder.forgetAll(domain)
      return []
    }
    cell.earlier.withLock { $0 = saved.server }
    return folder.contents.devices.filter { $0.domain == domain }
  }

  // MARK: Jobs for the guest's thread

  /// Makes the ioreq server, or takes over that of an earlier daemon, whose guest may be waiting for answers from it.
  ///
  /// - Parameters:
  ///   - needs: what a guest must have for it, when it cannot be made.
  ///   - prepare: puts restored devices in their places, before the first access is answered.
  func start(
    uuid: String?, transport: GuestTransport, needs: String,
    prepare: @escaping @Sendable (IOReqServer) throws(XenError) -> Void
  ) -> BusJob {
    let (domain, folder, cell, handle, pool, loop) = (
      domain, host.settings.stateFolder, cell, handle, pool, thread.loop
    )
    let started = started
    let ignoresInvalidations = host.settings.ignoresInvalidations
    return {
      do throws(XenError) {
        let server = try cell.makeServer(
          handle, pool, loop, ignoresInvalidations: ignoresInvalidations
        ) { identifier in
          // Known to a later daemon before it can hold up a vCPU.
          try? folder?.save(
            StateFolder.Guest(server: identifier, uuid: uuid, transport: transport, started: started), of: domain)
        }
        cell.server = server
        try prepare(server)
        server.serveAll()
        cell.report.withLock {
          $0 = (
            StatusBoard.IOReqServerReport(identifier: server.identifier, counters: server.counters), server.vcpuCount
          )
        }
        return .serverStarted
      } catch {
        cell.giveUp()
        return .serverFailed("cannot create an ioreq server for the guest (\(error)); \(needs)")
      }
    }
  }

  /// Lets go of the server, for a later daemon.
  func leave() -> BusJob {
    let cell = cell
    return {
      cell.server?.leave()
      cell.server = nil
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

  /// xl in dom0 gives the first four disks of an HVM guest to QEMU as IDE drives too: two writers on one image.
  static func warning(_ key: DeviceKey) -> String? {
    guard key.kind == .disk, let index = DeviceEntry.diskIndex(key.device), index < 4 else { return nil }
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
