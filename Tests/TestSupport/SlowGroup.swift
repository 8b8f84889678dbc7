import EventLoop
package import Glibc

/// A control group whose processes write slowly to one block device: the kernel holds their requests back, as a slow disk does.
package final class SlowGroup {
  private let folder: String
  private let limit: (file: String, unlimited: String)

  /// - Parameters:
  ///   - path: a block device, or a file, whose device is meant.
  ///   - bytesPerSecond: what all of the group's processes may write.
  /// - Returns: nil where the kernel has no such groups, or they are not ours to make.
  package init?(_ path: String, bytesPerSecond: Int) {
    var status = stat()
    guard stat(path, &status) == 0 else { return nil }
    let isDevice = status.st_mode & S_IFMT == S_IFBLK
    guard let device = Self.wholeDevice(isDevice ? status.st_rdev : status.st_dev) else { return nil }
    let name = "vxd-test-\(getpid())-\(UInt32.random(in: 0 ... .max))"
    for (root, file, value, unlimited) in [
      ("/sys/fs/cgroup/blkio", "blkio.throttle.write_bps_device", "\(device) \(bytesPerSecond)", "\(device) 0"),
      ("/sys/fs/cgroup", "io.max", "\(device) wbps=\(bytesPerSecond)", "\(device) wbps=max"),
    ] {
      let folder = "\(root)/\(name)"
      guard mkdir(folder, 0o755) == 0 else { continue }
      if Self.write(value, to: "\(folder)/\(file)") {
        (self.folder, limit) = (folder, ("\(folder)/\(file)", unlimited))
        return
      }
      rmdir(folder)
    }
    return nil
  }

  deinit { _ = eventually { rmdir(folder) == 0 } }

  package static let areThere: Bool = {
    let folder = TemporaryFolder()
    return SlowGroup(folder.file("probe", bytes: 4096), bytesPerSecond: 1 << 20) != nil
  }()

  /// Takes a process in. It leaves by its end.
  package func add(_ process: pid_t) -> Bool { Self.write("\(process)", to: "\(folder)/cgroup.procs") }

  /// What is held back goes on, and so does all that comes.
  package func release() { _ = Self.write(limit.unlimited, to: limit.file) }

  private static func write(_ text: String, to path: String) -> Bool {
    let descriptor = open(path, O_WRONLY | O_CLOEXEC)
    guard descriptor >= 0 else { return false }
    defer { close(descriptor) }
    let bytes = Array(text.utf8)
    return Glibc.write(descriptor, bytes, bytes.count) == bytes.count
  }

  /// Limits are of whole disks: major and minor number of the one that a device is, or is a partition of.
  private static func wholeDevice(_ number: dev_t) -> String? {
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00)
    let folder = "/sys/dev/block/\(major):\(minor)"
    let isPartition = access("\(folder)/partition", F_OK) == 0
    guard let file = fopen("\(folder)/\(isPartition ? "../" : "")dev", "re") else { return nil }
    defer { fclose(file) }
    var text = [CChar](repeating: 0, count: 32)
    guard fgets(&text, 32, file) != nil else { return nil }
    return String(decoding: text.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}
