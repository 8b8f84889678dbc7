/// One message of the Xenstore wire protocol (xen: docs/misc/xenstore.txt, public/io/xs_wire.h): a header of four u32 and
/// at most 4096 bytes.
struct XenstoreMessage: Equatable {
  enum Kind: UInt32 {
    case control = 0
    case directory = 1
    case read = 2
    case getPermissions = 3
    case watch = 4
    case unwatch = 5
    case transactionStart = 6
    case transactionEnd = 7
    case getDomainPath = 10
    case write = 11
    case makeDirectory = 12
    case remove = 13
    case setPermissions = 14
    case watchEvent = 15
    case error = 16
    case isDomainIntroduced = 17
    case directoryPart = 22
    case resetWatches = 21
  }

  static let headerBytes = 16
  static let payloadLimit = 4096

  var kind: UInt32
  var request: UInt32
  var transaction: UInt32
  var payload: [UInt8]

  /// Takes the first whole message off a buffer.
  ///
  /// - Returns: nil when more bytes are needed.
  /// - Throws: when the length is beyond the protocol's limit; the connection is closed then.
  static func take(from buffer: inout [UInt8]) throws(ProtocolFault) -> XenstoreMessage? {
    guard buffer.count >= headerBytes else { return nil }
    func word(_ index: Int) -> UInt32 {
      (0..<4).reduce(0) { $0 | UInt32(buffer[index * 4 + $1]) << UInt32(8 * $1) }
    }
    let length = Int(word(3))
    guard length <= payloadLimit else { throw ProtocolFault() }
    guard buffer.count >= headerBytes + length else { return nil }
    let message = XenstoreMessage(
      kind: word(0), request: word(1), transaction: word(2),
      payload: Array(buffer[headerBytes..<(headerBytes + length)]))
    buffer.removeFirst(headerBytes + length)
    return message
  }

  var bytes: [UInt8] {
    var bytes: [UInt8] = []
    for word in [kind, request, transaction, UInt32(payload.count)] {
      for shift in [0, 8, 16, 24] { bytes.append(UInt8(truncatingIfNeeded: word >> UInt32(shift))) }
    }
    return bytes + payload
  }

  /// The payload as texts that end with a zero byte each.
  var texts: [String] {
    payload.split(separator: 0, omittingEmptySubsequences: false).map { String(decoding: $0, as: UTF8.self) }
  }
}

/// A message that no protocol knows.
struct ProtocolFault: Error {}
