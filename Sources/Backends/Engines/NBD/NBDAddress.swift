/// Where an NBD export is, as the URIs of the NBD project say it:
///
///     nbd://host[:port]/export                 over TCP, port 10809 by default
///     nbd+unix:///export?socket=/path          over a Unix socket
///
/// The export's name may be empty (the server's default export). %-escapes are decoded. There is no TLS (nbds://).
package struct NBDAddress: Equatable, Sendable {
  package enum Place: Equatable, Sendable {
    case tcp(host: String, port: UInt16)
    case unix(path: String)
  }

  /// As it was written, for messages.
  package var text: String
  package var place: Place
  package var export: String

  /// Whether a string is meant as an address of this kind.
  package static func isAddress(_ text: String) -> Bool { text.hasPrefix("nbd") && text.contains("://") }

  package init(_ text: String) throws(ImageFault) {
    self.text = text
    guard let mark = text.range(of: "://") else { throw .badAddress(text, "'://' is missing") }
    let scheme = text[..<mark.lowerBound]
    let rest = text[mark.upperBound...]
    let query = rest.split(separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
    let parts = query[0].split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
    export = try Self.decode(parts.count > 1 ? parts[1] : "", text)
    guard export.utf8.count <= 4096 else { throw .badAddress(text, "the export's name is longer than 4096 bytes") }
    switch scheme {
    case "nbd":
      guard query.count == 1 else { throw .badAddress(text, "a TCP address has no '?'") }
      place = try Self.tcp(parts[0], text)
    case "nbd+unix":
      guard parts[0].isEmpty else { throw .badAddress(text, "a socket's address starts with nbd+unix:///") }
      guard query.count == 2, query[1].hasPrefix("socket=") else {
        throw .badAddress(text, "'?socket=/path' is missing")
      }
      let path = try Self.decode(query[1].dropFirst("socket=".count), text)
      guard path.hasPrefix("/"), path.utf8.count < 108 else {
        throw .badAddress(text, "the socket needs an absolute path of less than 108 bytes")
      }
      place = .unix(path: path)
    case "nbds", "nbds+unix": throw .badAddress(text, "TLS is not supported; use a Unix socket or a trusted network")
    default: throw .badAddress(text, "'\(scheme)' is neither 'nbd' nor 'nbd+unix'")
    }
  }

  /// host, host:port, [address], [address]:port
  private static func tcp(_ authority: Substring, _ text: String) throws(ImageFault) -> Place {
    var host = authority
    var port: UInt16 = 10809
    let afterBracket = authority.hasPrefix("[") ? authority.lastIndex(of: "]") : authority.startIndex
    guard let afterBracket else { throw .badAddress(text, "the bracket of the address is not closed") }
    if let colon = authority[afterBracket...].lastIndex(of: ":") {
      host = authority[..<colon]
      guard let number = UInt16(authority[authority.index(after: colon)...]), number > 0 else {
        throw .badAddress(text, "expected a port from 1 to 65535")
      }
      port = number
    }
    if host.hasPrefix("["), host.hasSuffix("]") { host = host.dropFirst().dropLast() }
    guard !host.isEmpty else { throw .badAddress(text, "the host is missing") }
    return .tcp(host: String(host), port: port)
  }

  private static func decode(_ part: Substring, _ text: String) throws(ImageFault) -> String {
    var bytes: [UInt8] = []
    var rest = part.utf8[...]
    while let byte = rest.popFirst() {
      guard byte == UInt8(ascii: "%") else {
        bytes.append(byte)
        continue
      }
      let digits = String(decoding: rest.prefix(2), as: UTF8.self)
      guard digits.utf8.count == 2, let value = UInt8(digits, radix: 16), value != 0 else {
        throw .badAddress(text, "'%\(digits)' is not a valid escape; expected % and two hexadecimal digits")
      }
      bytes.append(value)
      rest = rest.dropFirst(2)
    }
    return String(decoding: bytes, as: UTF8.self)
  }
}

extension String {
  /// The first place of a piece of text; the standard library has this only with regular expressions.
  fileprivate func range(of piece: String) -> Range<String.Index>? {
    var start = startIndex
    while start < endIndex {
      if self[start...].hasPrefix(piece) { return start..<index(start, offsetBy: piece.count) }
      start = index(after: start)
    }
    return nil
  }
}
