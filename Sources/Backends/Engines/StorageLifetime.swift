import CLinux
package import Devices
import Glibc

/// Wear of an eMMC device as Linux shows it in sysfs (linux: Documentation/driver-api/mmc/mmc-dev-attrs.rst): `life_time` has
/// two numbers, `pre_eol_info` one, hexadecimal as in the device's EXT_CSD register.
package enum StorageLifetime {
  /// - Parameter root: where sysfs is mounted.
  /// - Returns: nil for a device that tells nothing, as most do.
  package static func read(deviceNumber: UInt64, root: String = "/sys") -> BlockLifetime? {
    let number = dev_t(truncatingIfNeeded: deviceNumber)
    let folder = "\(root)/dev/block/\(clinux_device_major(number)):\(clinux_device_minor(number))/device"
    guard let times = numbers("\(folder)/life_time"), times.count == 2,
      let end = numbers("\(folder)/pre_eol_info"), end.count == 1
    else { return nil }
    return BlockLifetime(preEndOfLife: end[0], typicalA: times[0], typicalB: times[1])
  }

  private static func numbers(_ path: String) -> [UInt16]? {
    guard let file = fopen(path, "re") else { return nil }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 64)
    guard fgets(&line, 64, file) != nil else { return nil }
    let text = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    var values: [UInt16] = []
    for word in text.split(whereSeparator: \.isWhitespace) {
      let digits = word.hasPrefix("0x") ? word.dropFirst(2) : word
      guard let value = UInt16(digits, radix: 16) else { return nil }
      values.append(value)
    }
    return values
  }
}
