/// What `vxctl console` and a console port say to each other over the port's socket: frames of a type, a length of two bytes (the higher
/// one first), and so many bytes.
package struct ConsoleFrame: Equatable, Sendable {
  package enum Kind: UInt8, Sendable {
    /// Both ways: bytes of the terminal. From the port, what it remembers comes first.
    case data = 0x64
    /// To the port: the terminal's columns and rows, two bytes each, the higher one first.
    case size = 0x73
    /// To the port: wants to write; one byte: 1 to take that from whoever has it.
    case write = 0x77
    /// From the port: one byte, 1 when this client may write from now on, 0 when it may not (any more), 2 when it may not even watch.
    case mode = 0x6d
  }

  package var kind: Kind
  package var bytes: [UInt8]

  /// Bytes of a frame at most.
  package static let limit = 4096

  package init(_ kind: Kind, _ bytes: [UInt8]) {
    self.kind = kind
    self.bytes = bytes
  }

  package var encoded: [UInt8] {
    [kind.rawValue, UInt8(truncatingIfNeeded: bytes.count >> 8), UInt8(truncatingIfNeeded: bytes.count)] + bytes
  }

  /// Bytes in frames of the largest size.
  package static func data(_ bytes: some Sequence<UInt8>) -> [UInt8] {
    var result: [UInt8] = []
    var piece: [UInt8] = []
    for byte in bytes {
      piece.append(byte)
      if piece.count == limit {
        result += ConsoleFrame(.data, piece).encoded
        piece = []
      }
    }
    return piece.isEmpty ? result : result + ConsoleFrame(.data, piece).encoded
  }
}

/// Takes frames out of a stream.
package struct ConsoleFrameReader {
  private var buffer: [UInt8] = []

  package init() {}

  package mutating func append(_ bytes: some Sequence<UInt8>) { buffer += bytes }

  /// The next frame; nil when it is not complete.
  ///
  /// - Throws: `Malformed` for what is no frame.
  package mutating func next() throws(Malformed) -> ConsoleFrame? {
    guard buffer.count >= 3 else { return nil }
    let length = Int(buffer[1]) << 8 | Int(buffer[2])
    guard let kind = ConsoleFrame.Kind(rawValue: buffer[0]), length <= ConsoleFrame.limit else { throw Malformed() }
    guard buffer.count >= 3 + length else { return nil }
    defer { buffer.removeFirst(3 + length) }
    return ConsoleFrame(kind, Array(buffer[3..<3 + length]))
  }

  package struct Malformed: Error {}
}
