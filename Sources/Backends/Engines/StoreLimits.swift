import CLinux
import Glibc

/// What a block device says that its store can do (linux: Documentation/ABI/stable/sysfs-block), in bytes; 0 where it cannot, or does not
/// say.
package struct StoreLimits: Equatable, Sendable {
  /// The unit that is discarded, and the most that one call takes.
  package var discardGranularity: UInt64 = 0
  package var discardMaximum: UInt64 = 0
  /// The size of transfers that it likes best.
  package var optimalSize: UInt64 = 0

  package init() {}

  /// - Parameter root: where sysfs is mounted.
  package static func read(deviceNumber: UInt64, root: String = "/sys") -> StoreLimits {
    let number = dev_t(truncatingIfNeeded: deviceNumber)
    let folder = "\(root)/dev/block/\(clinux_device_major(number)):\(clinux_device_minor(number))"
    // A partition has those of its disk.
    let queue = access("\(folder)/queue", F_OK) == 0 ? "\(folder)/queue" : "\(folder)/../queue"
    var limits = StoreLimits()
    limits.discardGranularity = value("\(queue)/discard_granularity")
    limits.discardMaximum = value("\(queue)/discard_max_bytes")
    limits.optimalSize = value("\(queue)/optimal_io_size")
    return limits
  }

  private static func value(_ path: String) -> UInt64 {
    guard let file = fopen(path, "re") else { return 0 }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 64)
    guard fgets(&line, 64, file) != nil else { return 0 }
    return UInt64(
      String(decoding: line.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)) ?? 0
  }
}
