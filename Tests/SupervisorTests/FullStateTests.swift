import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Xen

/// A tmpfs of so many KiB.
private final class SmallFileSystem {
  static let canBeMounted: Bool = {
    let folder = TemporaryFolder()
    guard let small = SmallFileSystem(folder.path + "/small", kilobytes: 64) else { return false }
    small.unmount()
    rmdir(small.path)
    return true
  }()

  let path: String
  private var isMounted = true

  init?(_ path: String, kilobytes: Int) {
    self.path = path
    mkdir(path, 0o700)
    guard mount("tmpfs", path, "tmpfs", 0, "size=\(kilobytes)k,mode=0700") == 0 else { return nil }
  }

  deinit { unmount() }

  /// Takes up all that is left.
  func fill() {
    let descriptor = open(path + "/filler", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
    defer { close(descriptor) }
    let page = [UInt8](repeating: 0xff, count: 4096)
    while write(descriptor, page, page.count) > 0 {}
  }

  func makeRoom() { unlink(path + "/filler") }

  func unmount() {
    if isMounted { umount2(path, Int32(MNT_DETACH)) }
    isMounted = false
  }
}

/// The file system with the saved state is full: a store to a page that it has no memory for would be a SIGBUS, and the end of vxd for all guests.
@Suite(.serialized, .enabled(if: SmallFileSystem.canBeMounted, "a file system cannot be mounted here"))
struct FullStateTests {
  private func reads(_ count: Int, _ driver: SimulatedDriver, _ guest: SimulatedBlockGuest) throws {
    // Chains that need all of a slot's buffers: one byte of the image's first sectors in each descriptor is enough.
    let place = (guest.dataAddress + 4095) & ~4095
    guest.putHeader(at: place, type: 0, sector: 0)
    for _ in 0..<count {
      let data = (0..<64).map { SimulatedDriver.Buffer(place + 8192 + UInt64($0) * 512, 512, writable: true) }
      let chain = [.init(place, 16, writable: false)] + data + [.init(place + 4096, 1, writable: true)]
      _ = try #require(driver.add(chain, indirect: true))
    }
    driver.notifyIfWanted()
  }

  @Test func fullFileSystemEndsNeitherVxdNorWhatItServes() throws {
    let stage = try DaemonStage()
    #expect(stage.daemon.terminate() == 0)
    let small = try #require(SmallFileSystem(stage.state, kilobytes: 1024))
    defer { small.unmount() }
    try stage.daemon.start()
    let domain = try stage.guest(1, name: "alpha", disks: ["xvde"])
    let driver = SimulatedDriver(
      registers: TrappedRegisters(domain: domain, base: SlotTable.slot(0).base), memory: domain.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors, .blockFlush, .blockSegmentsMaximum], queueSize: 128)
    let guest = SimulatedBlockGuest(domain: domain, driver: driver)
    let pid = stage.daemon.pid
    small.fill()

    // More requests at once than there is memory for, again and again: each is answered.
    for _ in 0..<3 {
      try reads(120, driver, guest)
      for _ in 0..<120 { _ = try guest.waitForUsed() }
      #expect(driver.memory.pointer((guest.dataAddress + 4095) & ~4095 + 4096).load(as: UInt8.self) == 0)
    }
    // What the registers' part and the notes of the device's type get.
    driver.reset()
    try driver.start(wanted: [.indirectDescriptors, .blockFlush, .blockSegmentsMaximum], queueSize: 128)
    #expect(try guest.write([UInt8](repeating: 7, count: 4096), sector: 8) == 0)

    // A disk for which there is no room is served without: that is said, and no part of its file is left.
    try stage.toolstack.create(try SimulatedDomain(identifier: 2, memoryBytes: 8 << 20), name: "beta")
    try stage.toolstack.attach(disk: "xvde", image: stage.folder.file("beta.img", bytes: 1 << 20), to: 2)
    #expect(stage.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 2), "\(stage.daemon.report)")
    #expect(stage.daemon.log.contains("2-virtio_disk-51776.device (No space left on device)"), "\(stage.daemon.report)")
    #expect(TemporaryFolder.names(stage.state).allSatisfy { !$0.hasSuffix(".new") })

    // vxd is killed with a full file system, and its guest goes on with the next one.
    try reads(120, driver, guest)
    #expect(stage.daemon.pid == pid)
    stage.daemon.kill()
    try stage.daemon.start()
    for _ in 0..<120 { _ = try guest.waitForUsed() }
    #expect(try guest.read(sector: 8, count: 4096).bytes == [UInt8](repeating: 7, count: 4096))

    // With room there is a file again.
    small.makeRoom()
    try stage.toolstack.create(try SimulatedDomain(identifier: 3, memoryBytes: 8 << 20), name: "gamma")
    try stage.toolstack.attach(disk: "xvde", image: stage.folder.file("gamma.img", bytes: 1 << 20), to: 3)
    #expect(stage.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 3), "\(stage.daemon.report)")
    #expect(TemporaryFolder.names(stage.state).contains("3-virtio_disk-51776.device"))
    #expect(stage.daemon.terminate() == 0)
  }
}
