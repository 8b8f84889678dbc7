/// Cuts a stream into lines. Does no I/O: bytes go in, whole messages come out.
package struct FrameReader {
  /// Bytes of a message at most, its newline not counted.
  package static let limit = 1 << 20

  /// What came of the bytes so far.
  package enum Item: Equatable {
    case message([UInt8])
    /// A line longer than the limit; its rest is dropped as it comes.
    case tooLong
  }

  private var pending: [UInt8] = []
  private var isSkipping = false

  /// Bytes of the message that has begun.
  package var held: Int { pending.count }

  package init() {}

  /// Takes bytes in and gives the items that are complete.
  package mutating func append(_ bytes: some Collection<UInt8>) -> [Item] {
    var items: [Item] = []
    var rest = bytes[...]
    while let newline = rest.firstIndex(of: 0x0a) {
      take(rest[..<newline], &items)
      if !isSkipping { items.append(.message(pending)) }
      pending.removeAll(keepingCapacity: pending.count < 65536)
      isSkipping = false
      rest = rest[rest.index(after: newline)...]
    }
    take(rest, &items)
    return items
  }

  /// What the stream's end leaves: a last line needs no newline.
  package mutating func finish() -> Item? {
    guard !isSkipping, !pending.isEmpty else { return nil }
    defer { pending = [] }
    return .message(pending)
  }

  private mutating func take(_ bytes: some Collection<UInt8>, _ items: inout [Item]) {
    guard !isSkipping else { return }
    guard pending.count + bytes.count <= Self.limit else {
      items.append(.tooLong)
      pending = []
      isSkipping = true
      return
    }
    pending.append(contentsOf: bytes)
  }
}
