import CLinux
import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Xen

/// vxd dies while a slow disk still works on what it was given. With io_uring the process is gone before those requests are: the next vxd
/// must not begin before them, or an old write would land on top of a newer one.
@Suite(
  .serialized,
  .enabled(if: SlowGroup.areThere, "the kernel has no control groups that limit I/O, or they are not ours to make"))
struct SlowStoreCrashTests {
  private static let pieces = 16
  private static let pieceBytes = 64 << 10

  /// Where the kernel permits no io_uring, its part is left out.
  private static let cases: [(String, Bool)] =
    [("libaio", false)] + (clinux_probe_ring() == 0 ? [("io_uring", false), ("io_uring", true)] : [])

  @Test(arguments: Self.cases)
  func writeOfADeadDaemonNeverLandsOnANewerOne(engine: String, onBlockDevice: Bool) throws {
    guard !onBlockDevice || LoopDevice.areThere else { return }
    let stage = try DaemonStage(profiles: #"{"version": 1, "disks": [{"guest": "*", "engine": "\#(engine)"}]}"#)
    let file = stage.folder.file("slow.img", bytes: 0)
    try fill(file, Array(repeating: UInt8(ascii: "-"), count: Self.pieces * Self.pieceBytes))
    let device = onBlockDevice ? LoopDevice(file) : nil
    try #require(device != nil || !onBlockDevice)
    defer { device?.detach() }
    let image = device?.path ?? file
    let domain = try SimulatedDomain(identifier: 1, memoryBytes: 32 << 20)
    try stage.toolstack.create(domain, name: "alpha")
    try stage.toolstack.attach(disk: "xvde", image: image, to: 1)
    try #require(stage.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 1), "\(stage.daemon.report)")
    let driver = SimulatedDriver(
      registers: TrappedRegisters(domain: domain, base: SlotTable.slot(0).base), memory: domain.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors, .blockFlush], queueSize: 128)
    let guest = SimulatedBlockGuest(domain: domain, driver: driver)
    #expect(facts(stage)?["engine"]?.stringValue == engine)

    // Writes that would take a minute, each of which the kernel has.
    let slow = try #require(SlowGroup(image, bytesPerSecond: Self.pieceBytes / 4))
    #expect(slow.add(stage.daemon.pid))
    try write(UInt8(ascii: "a"), driver, guest)
    #expect(
      eventually { facts(stage)?["requests"]?.integerValue == Int64(Self.pieces) }, "\(stage.daemon.report)")
    if engine == "io_uring" {
      stage.daemon.kill()
      #expect(isHeld(image), "the process is gone, and nothing keeps the next one from the image")
      try stage.daemon.start()
      #expect(eventually { facts(stage) != nil }, "\(stage.daemon.report)")
      slow.release()
    } else {
      // Its death waits for its writes.
      _ = Glibc.kill(stage.daemon.pid, SIGKILL)
      slow.release()
      stage.daemon.kill()
      #expect(!isHeld(image))
      try stage.daemon.start()
    }

    // They are answered by the next vxd, whose writes are not slow; what the guest writes then is the newest.
    for _ in 0..<Self.pieces { _ = try guest.waitForUsed() }
    try write(UInt8(ascii: "b"), driver, guest)
    for _ in 0..<Self.pieces { _ = try guest.waitForUsed() }
    #expect(try guest.flush() == 0)
    stage.daemon.kill()
    #expect(eventually { !isHeld(image) })
    let old = try content(image).count { $0 != UInt8(ascii: "b") }
    #expect(old == 0, "so many bytes are not what was written last")
  }

  private func facts(_ stage: DaemonStage) -> JSONValue? {
    guard let client = try? ControlClient(path: stage.socket) else { return nil }
    return try? client.call("device.get", ["guest": "alpha", "device": "xvde"])
  }

  /// Makes the writes available, one for each piece; waits for none.
  private func write(_ byte: UInt8, _ driver: SimulatedDriver, _ guest: SimulatedBlockGuest) throws {
    let data = (guest.dataAddress + 65535) & ~65535
    memset(driver.memory.pointer(data), Int32(byte), Self.pieceBytes)
    for piece in 0..<Self.pieces {
      let header = data + UInt64(Self.pieceBytes) + UInt64(piece) * 64
      guest.putHeader(at: header, type: 1, sector: UInt64(piece * Self.pieceBytes / 512))
      let chain: [SimulatedDriver.Buffer] = [
        .init(header, 16, writable: false), .init(data, UInt32(Self.pieceBytes), writable: false),
        .init(header + 16, 1, writable: true),
      ]
      _ = try #require(driver.add(chain, indirect: true))
    }
    driver.notifyIfWanted()
  }

  /// Whether somebody has the image: its lock, or the block device for himself.
  private func isHeld(_ image: String) -> Bool {
    let descriptor = open(image, O_RDWR | O_EXCL | O_CLOEXEC)
    guard descriptor >= 0 else { return errno == EBUSY }
    defer { close(descriptor) }
    return clinux_lock_description(descriptor, 1) != 0
  }

  private func fill(_ path: String, _ bytes: [UInt8]) throws {
    let descriptor = OwnedDescriptor(adopting: open(path, O_WRONLY | O_CLOEXEC))
    try #require(Glibc.write(descriptor.raw, bytes, bytes.count) == bytes.count && fsync(descriptor.raw) == 0)
  }

  private func content(_ path: String) throws -> [UInt8] {
    let descriptor = OwnedDescriptor(adopting: open(path, O_RDONLY | O_CLOEXEC))
    var bytes = [UInt8](repeating: 0, count: Self.pieces * Self.pieceBytes)
    try #require(read(descriptor.raw, &bytes, bytes.count) == bytes.count)
    return bytes
  }
}
