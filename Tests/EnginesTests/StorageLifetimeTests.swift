import Devices
import Engines
import Glibc
import TestSupport
import Testing

/// A folder that looks like sysfs of a machine with an eMMC.
@Suite struct StorageLifetimeTests {
  private let folder = TemporaryFolder()
  private static let device: UInt64 = 179 << 8  // 179:0, mmcblk0

  private func write(_ name: String, _ text: String) {
    let path = folder.path + "/dev/block/179:0/device"
    for end in ["/dev", "/dev/block", "/dev/block/179:0", "/dev/block/179:0/device"] { mkdir(folder.path + end, 0o700) }
    guard let file = fopen("\(path)/\(name)", "we") else { return }
    fputs(text, file)
    fclose(file)
  }

  private func clear() {
    for name in ["life_time", "pre_eol_info"] { unlink(folder.path + "/dev/block/179:0/device/\(name)") }
    for end in ["/dev/block/179:0/device", "/dev/block/179:0", "/dev/block", "/dev"] { rmdir(folder.path + end) }
  }

  @Test func wearIsReadAsTheDeviceTellsIt() {
    write("life_time", "0x01 0x0b\n")
    write("pre_eol_info", "0x02\n")
    defer { clear() }
    #expect(
      StorageLifetime.read(deviceNumber: Self.device, root: folder.path)
        == BlockLifetime(preEndOfLife: 2, typicalA: 1, typicalB: 11))
  }

  @Test(arguments: ["", "0x01\n", "x y\n", "0x01 0x02 0x03\n"]) func textOfAnotherFormIsNoWord(text: String) {
    write("life_time", text)
    write("pre_eol_info", "0x01\n")
    defer { clear() }
    #expect(StorageLifetime.read(deviceNumber: Self.device, root: folder.path) == nil)
  }

  @Test func deviceWithoutItTellsNothing() {
    #expect(StorageLifetime.read(deviceNumber: Self.device, root: folder.path) == nil)
  }
}
