import Engines
import Glibc
import TestSupport
import Testing

/// Serialized: between fork and exec, a child process holds the descriptors, and so the locks, of a test beside it.
@Suite(.serialized) struct RawImageTests {
  private let folder = TemporaryFolder()

  private func fault(_ body: () throws -> Void) -> String? {
    do {
      try body()
      return nil
    } catch let error as ImageFault {
      return error.message
    } catch {
      return "another error: \(error)"
    }
  }

  @Test func capacityIsWholeSectors() throws {
    let image = try RawImage(
      path: folder.file("odd", bytes: 1_000_000), holder: "a", readOnly: false, discard: true, direct: false)
    #expect(image.geometry.capacity == 999_936)
    #expect(image.geometry.logicalBlock == 512)
  }

  @Test func missingImageIsNamed() {
    let words = fault { _ = try RawImage(path: "/nowhere/x", holder: "a", readOnly: false, discard: false) }
    #expect(words == "cannot open '/nowhere/x': No such file or directory")
  }

  @Test func imageThatIsTooSmallIsRefused() {
    let path = folder.file("small", bytes: 511)
    let words = fault { _ = try RawImage(path: path, holder: "a", readOnly: false, discard: false) }
    #expect(words?.contains("has 511 bytes") == true)
  }

  @Test func folderIsNoImage() {
    let words = fault { _ = try RawImage(path: "/tmp", holder: "a", readOnly: true, discard: false) }
    #expect(words?.contains("/tmp") == true)
  }

  @Test func secondWriterIsToldWhoTheFirstIs() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    let first = try RawImage(path: path, holder: "web1/xvde", readOnly: false, discard: false)
    let words = fault { _ = try RawImage(path: path, holder: "web2/xvde", readOnly: false, discard: false) }
    #expect(words?.contains("in use by web1/xvde") == true)
    let reader = fault { _ = try RawImage(path: path, holder: "web3/xvde", readOnly: true, discard: false) }
    #expect(reader?.contains("in use by web1/xvde") == true)
    withExtendedLifetime(first) {}
  }

  @Test func readersShareAnImage() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    let first = try RawImage(path: path, holder: "a", readOnly: true, discard: false)
    let second = try RawImage(path: path, holder: "b", readOnly: true, discard: false)
    withExtendedLifetime((first, second)) {}
  }

  /// A disk with a partition table for blocks of 512 bytes, on a store whose sectors have 4096: as it is, the guest would not find its partitions.
  @Test(.enabled(if: canMakeLargeSectors, "loop devices with large sectors cannot be made here"))
  func diskKeepsSmallBlocksOnAStoreWithLargeOnes() throws {
    let file = folder.file("store", bytes: 4 << 20)
    let made = try ChildProcess.run("losetup", ["--sector-size", "4096", "--find", "--show", file])
    let device = made.output.split(separator: "\n").first.map(String.init) ?? ""
    #expect(made.status == 0 && device.hasPrefix("/dev/loop"))
    defer { _ = try? ChildProcess.run("losetup", ["--detach", device]) }
    do {
      let image = try RawImage(path: device, holder: "a", readOnly: false, discard: false)
      #expect(image.geometry.logicalBlock == 4096 && image.isDirect && !image.hasSmallBlocks)
    }
    let image = try RawImage(path: device, holder: "a", readOnly: false, discard: false, block: 512)
    #expect(image.geometry.logicalBlock == 512 && !image.isDirect && image.hasSmallBlocks)
    #expect(image.memoryAlignment == 1)
    var sector = [UInt8](repeating: 9, count: 512)
    #expect(pwrite(image.descriptor, &sector, 512, 512) == 512 && fdatasync(image.descriptor) == 0)
    #expect(pread(image.descriptor, &sector, 512, 0) == 512 && sector == [UInt8](repeating: 0, count: 512))
    #expect(pread(image.descriptor, &sector, 512, 512) == 512 && sector == [UInt8](repeating: 9, count: 512))
  }

  private static let canMakeLargeSectors: Bool = {
    let folder = TemporaryFolder()
    let file = folder.file("probe", bytes: 1 << 20)
    guard let made = try? ChildProcess.run("losetup", ["--sector-size", "4096", "--find", "--show", file]),
      made.status == 0, let device = made.output.split(separator: "\n").first
    else { return false }
    _ = try? ChildProcess.run("losetup", ["--detach", String(device)])
    return true
  }()

  @Test func blocksMayBeLargerThanTheStoreNeeds() throws {
    let image = try RawImage(
      path: folder.file("disk", bytes: 1 << 20 | 512), holder: "a", readOnly: false, discard: false, block: 4096)
    #expect(image.geometry.logicalBlock == 4096 && image.geometry.capacity == 1 << 20 && !image.hasSmallBlocks)
  }

  @Test func lockEndsWithTheImage() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    for _ in 0..<3 { _ = try RawImage(path: path, holder: "a", readOnly: false, discard: false) }
  }

  /// Another process: its pid is known from who has the file open, since the lock itself has none.
  @Test(.enabled(if: ChildProcess.isInstalled("python3"), "python3 is not installed"))
  func foreignHolderIsNamedByItsProcess() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    // flock(1) cannot take such locks; python can, and is on every Debian that builds vxd.
    let script = """
      import fcntl,struct,sys
      f=open(sys.argv[1],'r+b')
      fcntl.fcntl(f,37,struct.pack('hhqqi4x',1,0,0,0,0))
      print('locked',flush=True)
      sys.stdin.read()
      """
    let ends = try ChildProcess.pair()
    let holder: ChildProcess
    do {
      defer { close(ends.far) }
      holder = try ChildProcess("python3", ["-c", script, path], input: ends.far, output: ends.far)
    }
    var answer = [UInt8](repeating: 0, count: 16)
    #expect(read(ends.near, &answer, 7) >= 6)
    let refusal = fault { _ = try RawImage(path: path, holder: "web1/xvde", readOnly: false, discard: false) }
    #expect(refusal?.contains("in use by process \(holder.pid) (python3") == true, "\(refusal ?? "no fault")")
    // The end of what it reads; its words may still be on their way.
    shutdown(ends.near, Int32(SHUT_WR))
    #expect(holder.wait() == 0)
    close(ends.near)
  }
}
