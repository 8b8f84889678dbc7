/// The rules of RFC 8259 that json-c is lax about, looked at before it builds the value: numbers of other forms (`NaN`, `Infinity`, `1.`,
/// `1e999`), control characters in strings, names with a NUL in them, which it would cut off.
///
/// Also marks integers that do not fit 64 bits, which json-c would clip: with an exponent they are kept as they are written.
struct JSONScanner {
  /// Appended to integers that do not fit; a text that has it already means the same number without it.
  static let mark = "e+0"

  private let text: [UInt8]
  private var index = 0
  private var prepared: [UInt8] = []

  /// What json-c is to read.
  ///
  /// - Throws: `JSONText.Fault.syntax` with the byte at which the text is wrong.
  static func prepare(_ text: [UInt8]) throws(JSONText.Fault) -> [UInt8] {
    var scanner = JSONScanner(text: text)
    try scanner.scan()
    return scanner.prepared
  }

  private init(text: [UInt8]) {
    self.text = text
    prepared.reserveCapacity(text.count + 16)
  }

  private func byte(_ offset: Int = 0) -> UInt8? { index + offset < text.count ? text[index + offset] : nil }

  private func isDigit(_ offset: Int = 0) -> Bool {
    byte(offset).map { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ?? false
  }

  private mutating func scan() throws(JSONText.Fault) {
    while let next = byte() {
      switch next {
      case UInt8(ascii: "\""): try string()
      case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): try number()
      case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"): try word()
      case UInt8(ascii: "{"), UInt8(ascii: "}"), UInt8(ascii: "["), UInt8(ascii: "]"), UInt8(ascii: ","),
        UInt8(ascii: ":"),
        0x20, 0x09, 0x0a, 0x0d:
        prepared.append(next)
        index += 1
      default: throw .syntax("unexpected character", offset: index)
      }
    }
  }

  private mutating func string() throws(JSONText.Fault) {
    let start = index
    var hasNUL = false
    index += 1
    while let next = byte(), next != UInt8(ascii: "\"") {
      guard next >= 0x20 else { throw .syntax("a control character in a string must be escaped", offset: index) }
      if next == UInt8(ascii: "\\") {
        // What follows is json-c's business, but for the end of the string.
        if byte(1) == UInt8(ascii: "u"), (2...5).allSatisfy({ byte($0) == UInt8(ascii: "0") }) { hasNUL = true }
        index += 1
      }
      index += 1
    }
    guard index < text.count else { throw .syntax("the text ends within a string", offset: text.count) }
    index += 1
    prepared += text[start..<index]
    guard hasNUL else { return }
    let behind = text[index...].first { ![0x20, 0x09, 0x0a, 0x0d].contains($0) }
    if behind == UInt8(ascii: ":") { throw .syntax("a name must not contain U+0000", offset: start) }
  }

  private mutating func number() throws(JSONText.Fault) {
    let start = index
    if byte() == UInt8(ascii: "-") { index += 1 }
    guard isDigit() else { throw .syntax("a digit expected", offset: index) }
    if byte() == UInt8(ascii: "0"), isDigit(1) { throw .syntax("a number must not begin with 0", offset: index) }
    while isDigit() { index += 1 }
    var isInteger = true
    if byte() == UInt8(ascii: ".") {
      isInteger = false
      index += 1
      try digits()
    }
    if byte() == UInt8(ascii: "e") || byte() == UInt8(ascii: "E") {
      isInteger = false
      index += 1
      if byte() == UInt8(ascii: "+") || byte() == UInt8(ascii: "-") { index += 1 }
      try digits()
    }
    let words = String(decoding: text[start..<index], as: UTF8.self)
    guard let value = Double(words), value.isFinite else {
      throw .syntax("the number is too large for a double", offset: start)
    }
    prepared += text[start..<index]
    if isInteger && Int64(words) == nil { prepared += Self.mark.utf8 }
  }

  private mutating func digits() throws(JSONText.Fault) {
    guard isDigit() else { throw .syntax("a digit expected", offset: index) }
    while isDigit() { index += 1 }
  }

  private mutating func word() throws(JSONText.Fault) {
    for known in ["true", "false", "null"] where text[index...].starts(with: known.utf8) {
      prepared += known.utf8
      index += known.utf8.count
      return
    }
    throw .syntax("unexpected character", offset: index)
  }
}
