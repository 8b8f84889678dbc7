/// What others wrote (a guest on its console, a driver domain into Xenstore) as it may be shown on an operator's terminal: control characters,
/// with which a terminal can be made to do things, become the escapes that JSON has for them.
extension String {
  /// - Parameter keepsLines: whether the ends of lines stay what they are.
  package func visible(keepsLines: Bool) -> String {
    guard unicodeScalars.contains(where: { Self.isControl($0, keepsLines) }) else { return self }
    var text = ""
    for scalar in unicodeScalars {
      guard Self.isControl(scalar, keepsLines) else {
        text.unicodeScalars.append(scalar)
        continue
      }
      let digits = String(scalar.value, radix: 16)
      text += "\\u" + String(repeating: "0", count: max(0, 4 - digits.count)) + digits
    }
    return text
  }

  /// C0 but the tab, DEL, C1, and the marks that turn the direction of text.
  private static func isControl(_ scalar: Unicode.Scalar, _ keepsLines: Bool) -> Bool {
    switch scalar.value {
    case 0x09: false
    case 0x0a: !keepsLines
    case 0..<0x20, 0x7f..<0xa0, 0x200e, 0x200f, 0x202a...0x202e, 0x2066...0x2069: true
    default: false
    }
  }
}
