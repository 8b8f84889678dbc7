package import Lifecycle

/// The texts that a Xenbus frontend writes. All of them are the guest's to choose.
extension FrontendView.Setup {
  /// `SEQUENCE REFERENCE`.
  package init(_ text: String?) {
    guard let text else {
      self = .absent
      return
    }
    let words = text.split(separator: " ", omittingEmptySubsequences: false)
    guard words.count == 2, let sequence = UInt32(words[0]), let reference = UInt32(words[1]) else {
      self = .malformed
      return
    }
    self = .page(sequence: sequence, reference: reference)
  }
}

extension FrontendView.ConfigurationWrite {
  /// `NUMBER OFFSET BYTES-IN-HEX`; nil for anything else.
  package init?(_ text: String) {
    let words = text.split(separator: " ", omittingEmptySubsequences: false)
    guard words.count == 3, let number = UInt32(words[0]), let offset = Int(words[1]), (0...4096).contains(offset),
      let bytes = FrontendText.bytes(words[2]), bytes.count <= 8
    else { return nil }
    self.init(number: number, offset: offset, bytes: bytes)
  }
}

package enum FrontendText {
  /// The bytes of pairs of lower-case hexadecimal digits; nil for anything else.
  package static func bytes(_ hex: Substring) -> [UInt8]? {
    let digits = Array(hex.utf8)
    guard digits.count % 2 == 0 else { return nil }
    func value(_ digit: UInt8) -> UInt8? {
      switch digit {
      case UInt8(ascii: "0")...UInt8(ascii: "9"): digit - UInt8(ascii: "0")
      case UInt8(ascii: "a")...UInt8(ascii: "f"): digit - UInt8(ascii: "a") + 10
      default: nil
      }
    }
    var bytes: [UInt8] = []
    for index in stride(from: 0, to: digits.count, by: 2) {
      guard let high = value(digits[index]), let low = value(digits[index + 1]) else { return nil }
      bytes.append(high << 4 | low)
    }
    return bytes
  }

  /// The epoch that an offer names.
  package static func epoch(offer: String?) -> UInt32? {
    offer?.split(separator: " ").first { $0.hasPrefix("epoch=") }.flatMap { UInt32($0.dropFirst(6)) }
  }

  /// The device whose entry a path is of or below, for what reads such paths from outside.
  package static func key(_ kind: DeviceKey.Kind, path: String) -> DeviceKey? { XenstoreReader.key(kind, path: path) }
}
