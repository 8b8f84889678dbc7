/// A function on bus 0 of segment 0, the only one that an HVM guest has.
package struct PCIAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// 0 to 31.
  package let device: UInt8
  /// 0 to 7.
  package let function: UInt8

  package init(device: UInt8, function: UInt8 = 0) {
    self.device = device & 31
    self.function = function & 7
  }

  /// Segment, bus, device and function as Xen numbers them.
  package var number: UInt32 { UInt32(device) << 3 | UInt32(function) }

  /// As lspci shows it: 00:10.0.
  package var description: String {
    let digits = String(device, radix: 16)
    return "00:\(digits.utf8.count < 2 ? "0" : "")\(digits).\(function)"
  }

  package static func < (left: Self, right: Self) -> Bool { left.number < right.number }
}

/// Accesses of a guest that an ioreq server answers.
package enum AccessRange: Hashable, Sendable, CustomStringConvertible {
  case memory(ClosedRange<UInt64>)
  case ports(ClosedRange<UInt64>)
  case configuration(PCIAddress)

  package var description: String {
    func hex(_ range: ClosedRange<UInt64>) -> String {
      "0x\(String(range.lowerBound, radix: 16)) to 0x\(String(range.upperBound, radix: 16))"
    }
    return switch self {
    case .memory(let range): "addresses \(hex(range))"
    case .ports(let range): "ports \(hex(range))"
    case .configuration(let address): "PCI function \(address)"
    }
  }
}
