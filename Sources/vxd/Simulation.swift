import EventLoop
import Glibc
import Logging
import SimulatedXen
import Synchronization
import Xen

/// `vxd --simulate`: a simulated Xen with a toolstack that creates a guest, and that guest, which uses its disk until the end.
///
/// The supervisor and everything below it are real; only Xen and the guest are simulated.
final class Simulation: Sendable {
  let hypervisor = SimulatedHypervisor()
  let socketPath: String
  private let server: XenstoreServer
  private let folder: String
  private let player: LoopThread
  private let isStopping = Atomic<Bool>(false)
  private static let guestName = "demo"
  private static let domain: DomainID = 1

  init() throws {
    var template = Array("/tmp/vxd-simulation-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw Errno.last }
    folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    socketPath = folder + "/xenstored"
    server = try XenstoreServer(path: socketPath)
    player = try LoopThread(name: "sim-guest")
  }

  /// Starts the play on a thread of its own.
  func play(log: Logger) {
    player.loop.enqueue { [self] in
      do {
        log.notice("simulated guest '\(Self.guestName)': xenstored's socket is \(socketPath) (XENSTORED_PATH)")
        try playGuest(log)
      } catch {
        log.error("the simulated guest failed: \(error)")
      }
    }
  }

  private func playGuest(_ log: Logger) throws {
    let image = folder + "/disk.img"
    let descriptor = OwnedDescriptor(adopting: open(image, O_RDWR | O_CREAT | O_CLOEXEC, 0o600))
    guard descriptor.raw >= 0, ftruncate(descriptor.raw, 64 << 20) == 0 else { throw Errno.last }
    let toolstack = try SimulatedToolstack(server: server, hypervisor: hypervisor)
    let domain = try SimulatedDomain(identifier: Self.domain, memoryBytes: 64 << 20)
    try toolstack.create(domain, name: Self.guestName)
    try toolstack.attach(disk: "xvde", image: image, to: Self.domain)
    guard toolstack.wait(for: "2", of: "state", disk: "xvde", domain: Self.domain) else {
      log.error("the simulated toolstack waited in vain for backend state 2")
      return
    }
    log.notice("simulated guest '\(Self.guestName)' boots")
    let driver = SimulatedDriver(
      registers: TrappedRegisters(domain: domain, base: SlotTable.slot(0).base), memory: domain.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors, .eventIndex])
    try useDisk(SimulatedBlockGuest(domain: domain, driver: driver), log)
    _ = try toolstack.destroy(Self.domain, disks: ["xvde"])
  }

  /// Writes patterns and reads them back, ten times a second, and says every ten seconds what it did.
  private func useDisk(_ guest: SimulatedBlockGuest, _ log: Logger) throws {
    var round: UInt64 = 0
    while !isStopping.load(ordering: .acquiring) {
      let pattern = (0..<4096).map { UInt8(truncatingIfNeeded: round &+ UInt64($0) &* 7) }
      let sector = round % 16384 * 8
      guard try guest.write(pattern, sector: sector) == 0, try guest.flush() == 0 else {
        log.error("simulated guest: a write failed")
        return
      }
      let answer = try guest.read(sector: sector, count: 4096)
      guard answer.status == 0, answer.bytes == pattern else {
        log.error("simulated guest: what was read is not what was written")
        return
      }
      round += 1
      if round % 100 == 1 { log.info("simulated guest: \(round) blocks written, flushed and read back equal") }
      usleep(100_000)  // a guest with something else to do
    }
  }

  /// Lets the guest power off and its toolstack clean up, then ends the simulated Xen.
  func endGuest() {
    isStopping.store(true, ordering: .releasing)
    player.stopAndJoin()
  }

  func stop() {
    server.stop()
    unlink(folder + "/disk.img")
    rmdir(folder)
  }
}
