/// The rules of RFC 8259 that json-c is lax about, looked at before it builds the value: numbers of other forms (`NaN`, `Infinity`, `1.`,
/// `1e999`), control characters in strings, names with a NUL in them, which it would cut off.
///
/// Also marks integers that do not fit 64 bits, which json-c would clip: with an exponent they are kept as they are written.
/// And finds the ids of JSON-RPC requests, which go back byte for byte: a value does not keep how it was written.
struct JSONScanner {
  /// Appended to integers that do not fit; a text that has it already means the same number without it.
  static let mark = "e+0"

  private let text: [UInt8]
  private var index = 0
  /// What json-c is to read.
  private(set) var prepared: [UInt8] = []
  /// Where the ids of requests are, by their place in a batch (0 without one): the last member of that name, where it is no array or object.
  private var ids: [Int: Range<Int>] = [:]
  /// How many arrays and objects are open; whether the outermost is an array, and how many of its elements are complete.
  private var depth = 0
  private var isBatch = false
  private var element = 0
  /// The next value is that of a request's member `id`.
  private var isID = false

  /// - Throws: `JSONText.Fault.syntax` with the byte at which the text is wrong.
  init(_ text: [UInt8]) throws(JSONText.Fault) {
    self.text = text
    prepared.reserveCapacity(text.count + 16)
    try scan()
  }

  /// The id of a request, byte by byte; nil for none, or one that is an array or object.
  func id(ofRequest place: Int) -> String? { ids[place].map { String(decoding: text[$0], as: UTF8.self) } }

  private func byte(_ offset: Int = 0) -> UInt8? { index + offset < text.count ? text[index + offset] : nil }

  private func isDigit(_ offset: Int = 0) -> Bool {
    byte(offset).map { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ?? false
  }

  private mutating func scan() throws(JSONText.Fault) {
    while let next = byte() {
      let start = index
      switch next {
      case UInt8(ascii: "\""): try string()
      case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): try number()
      case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"): try word()
      case UInt8(ascii: "{"), UInt8(ascii: "}"), UInt8(ascii: "["), UInt8(ascii: "]"), UInt8(ascii: ","),
        UInt8(ascii: ":"),
        0x20, 0x09, 0x0a, 0x0d:
        structure(next)
        prepared.append(next)
        index += 1
        continue
      default: throw .syntax("unexpected character", offset: index)
      }
      note(start..<index)
    }
  }

  /// Whether the member names here are those of requests.
  private var isInRequest: Bool { depth == (isBatch ? 2 : 1) }

  private mutating func structure(_ byte: UInt8) {
    switch byte {
    case UInt8(ascii: "{"), UInt8(ascii: "["):
      if isID { ids[element] = nil }
      isID = false
      if depth == 0 { isBatch = byte == UInt8(ascii: "[") }
      depth += 1
    case UInt8(ascii: "}"), UInt8(ascii: "]"): depth -= 1
    case UInt8(ascii: ","): if isBatch, depth == 1 { element += 1 }
    default: break
    }
  }

  /// A string, number or word has been read.
  private mutating func note(_ token: Range<Int>) {
    if isID {
      ids[element] = token
      isID = false
    } else if isInRequest, text[token.lowerBound] == UInt8(ascii: "\""), isFollowedByColon {
      isID = Self.isNameOfID(text[token])
    }
  }

  private var isFollowedByColon: Bool {
    text[index...].first { ![0x20, 0x09, 0x0a, 0x0d].contains($0) } == UInt8(ascii: ":")
  }

  /// Whether a string is "id"; its letters may be escaped.
  private static func isNameOfID(_ string: ArraySlice<UInt8>) -> Bool {
    guard string.count <= 14 else { return false }
    var rest = string.dropFirst().dropLast()
    for letter in "id".utf8 {
      let escaped = Array("\\u00\(String(letter, radix: 16))".utf8)
      if rest.first == letter {
        rest = rest.dropFirst()
      } else if rest.starts(with: escaped) {
        rest = rest.dropFirst(escaped.count)
      } else {
        return false
      }
    }
    return rest.isEmpty
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
    if isFollowedByColon { throw .syntax("a name must not contain U+0000", offset: start) }
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
