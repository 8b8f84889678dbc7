/// The head of an HTTP request, as far as a metrics endpoint needs it (RFC 9112).
struct MetricsRequest {
  /// Bytes of a head at most; longer ones are answered 431.
  static let limit = 8192

  let method: Substring
  /// Without the query, and without scheme and host where it came in absolute form.
  let path: Substring
  /// By lower-case name.
  private let fields: [(name: String, value: String)]

  func values(_ name: String) -> [String] { fields.filter { $0.name == name }.map(\.value) }

  /// - Parameter head: up to the empty line. Lines end with CR LF, or LF alone (RFC 9112, 2.2).
  /// - Returns: nil if the text is not an HTTP/1 request.
  init?(_ head: [UInt8]) {
    let lines = String(decoding: head, as: UTF8.self).unicodeScalars.split(separator: "\n").map { line in
      Substring(line.last == "\r" ? line.dropLast() : line)
    }
    guard let first = lines.first(where: { !$0.isEmpty }) else { return nil }
    let words = first.split(separator: " ")
    guard words.count == 3, words[2].hasPrefix("HTTP/1.") else { return nil }
    method = words[0]
    var target = words[1]
    for scheme in ["http://", "https://"] where target.lowercased().hasPrefix(scheme) {
      target = target.dropFirst(scheme.count)
      target = target.firstIndex(of: "/").map { target[$0...] } ?? "/"
    }
    guard target.hasPrefix("/") || target == "*" else { return nil }
    path = target.prefix { $0 != "?" }
    fields = lines.drop { $0 != first }.dropFirst().compactMap { line in
      guard let colon = line.firstIndex(of: ":") else { return nil }
      return (line[..<colon].lowercased(), String(line[line.index(after: colon)...].trimmingSpaces))
    }
  }

  /// Looks for the end of the head as bytes come in, each byte once.
  struct Boundary {
    /// What the last bytes were: nothing, or the end of a line that may turn out to be the head's.
    private var afterLine = false
    private var hasText = false

    /// - Returns: whether the head ends with this byte.
    mutating func ends(with byte: UInt8) -> Bool {
      switch byte {
      case 0x0a:
        defer { afterLine = hasText }
        // Empty lines before the request are not its end.
        return afterLine
      case 0x0d: return false
      default:
        (afterLine, hasText) = (false, true)
        return false
      }
    }
  }
}
