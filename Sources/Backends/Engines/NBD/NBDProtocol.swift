/// Numbers of the NBD protocol (the NBD project's doc/proto.md), all big-endian on the wire.
enum NBDProtocol {
  static let initialMagic: UInt64 = 0x4e42_444d_4147_4943  // "NBDMAGIC"
  static let optionMagic: UInt64 = 0x4948_4156_454f_5054  // "IHAVEOPT"
  static let optionReplyMagic: UInt64 = 0x0003_e889_0455_65a9
  static let requestMagic: UInt32 = 0x2560_9513
  static let replyMagic: UInt32 = 0x6744_6698

  /// Handshake flags: fixed newstyle, no padding.
  static let fixedNewstyle: UInt16 = 1
  static let noZeroes: UInt16 = 2

  static let optionGo: UInt32 = 7
  static let replyAcknowledged: UInt32 = 1
  static let replyInformation: UInt32 = 3
  static let replyIsError: UInt32 = 1 << 31
  static let informationExport: UInt16 = 0
  static let informationBlockSize: UInt16 = 3

  static let requestBytes = 28
  static let replyBytes = 16

  /// Transmission flags of an export.
  struct ExportFlags: OptionSet {
    let rawValue: UInt16
    static let readOnly = ExportFlags(rawValue: 2)
    static let canFlush = ExportFlags(rawValue: 4)
    static let canForceUnitAccess = ExportFlags(rawValue: 8)
    static let canTrim = ExportFlags(rawValue: 32)
    static let canWriteZeroes = ExportFlags(rawValue: 64)
    static let canMultipleConnections = ExportFlags(rawValue: 256)
  }

  enum Command: UInt16 {
    case read = 0
    case write = 1
    case flush = 3
    case trim = 4
    case writeZeroes = 6
  }

  /// Command flags: force unit access; write zeroes without making a hole.
  static let forceUnitAccess: UInt16 = 1
  static let noHole: UInt16 = 2

  /// An error of a reply as Linux' errno: the protocol's numbers are the same ones, others count as EINVAL.
  static func errno(_ error: UInt32) -> Int {
    switch error {
    case 0: 0
    case 1, 5, 12, 22, 28, 75, 95, 108: Int(error)
    default: 22
    }
  }

  /// Writes one request's header.
  static func putRequest(
    at start: UnsafeMutableRawPointer, flags: UInt16, command: Command, handle: UInt64, offset: UInt64, length: UInt32
  ) {
    start.storeBytes(of: requestMagic.bigEndian, as: UInt32.self)
    start.storeBytes(of: flags.bigEndian, toByteOffset: 4, as: UInt16.self)
    start.storeBytes(of: command.rawValue.bigEndian, toByteOffset: 6, as: UInt16.self)
    start.storeBytes(of: handle.bigEndian, toByteOffset: 8, as: UInt64.self)
    start.storeBytes(of: offset.bigEndian, toByteOffset: 16, as: UInt64.self)
    start.storeBytes(of: length.bigEndian, toByteOffset: 24, as: UInt32.self)
  }
}
