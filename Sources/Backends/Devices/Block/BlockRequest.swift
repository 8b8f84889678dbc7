package import Virtqueue

/// How a request ended, as the status byte says it (virtio 1.2, 5.2.6).
package enum BlockStatus: UInt8, Sendable {
  case ok = 0  // VIRTIO_BLK_S_OK
  case ioError = 1  // VIRTIO_BLK_S_IOERR
  case unsupported = 2  // VIRTIO_BLK_S_UNSUPP
}

/// What a request asks for.
package enum BlockRequestKind: Equatable {
  case read
  case write
  case flush
  case getID
  case getLifetime
  case discard
  case writeZeroes
  case secureErase
  case unknown(UInt32)
}

/// A request as its descriptor chain says it: parsed, checked for its shape, not yet for its place on the disk.
package struct BlockRequest {
  package var kind: BlockRequestKind
  package var sector: UInt64
  /// Bytes of data, without header and status.
  package var dataBytes: UInt64

  /// Bytes of the header that starts the readable part.
  package static let headerBytes = 16

  /// Where the status byte of a request goes: the last byte of the writable part.
  ///
  /// - Returns: nil when the chain has no room for one, or no whole header: then there is no way to answer.
  package static func statusAddress(_ chain: DescriptorChain) -> UInt64? {
    guard chain.readableBytes >= UInt64(headerBytes), chain.writableBytes >= 1 else { return nil }
    var last = chain.writable + (chain.writableCount &- 1)
    while last.pointee.length == 0 { last -= 1 }  // ends: writableBytes is not 0
    return last.pointee.address &+ UInt64(last.pointee.length &- 1)
  }

  /// Reads the header of a chain for which `statusAddress` has an answer.
  ///
  /// - Throws: when the header's memory is not mapped.
  package static func parse(
    _ chain: DescriptorChain, memory: inout GuestMemoryView
  ) throws(GuestMemoryFault) -> BlockRequest {
    let header: (UInt64, UInt64)
    if chain.readableCount > 0, chain.buffers[0].length >= UInt32(headerBytes),
      let words = try memory.words(chain.buffers[0].address)
    {
      header = words
    } else {
      header = try copyHeader(chain, memory: &memory)
    }
    let type = UInt32(truncatingIfNeeded: UInt64(littleEndian: header.0))
    let kind: BlockRequestKind =
      switch type {
      case 0: .read  // VIRTIO_BLK_T_IN
      case 1: .write  // VIRTIO_BLK_T_OUT
      case 4: .flush  // VIRTIO_BLK_T_FLUSH
      case 8: .getID  // VIRTIO_BLK_T_GET_ID
      case 10: .getLifetime  // VIRTIO_BLK_T_GET_LIFETIME
      case 11: .discard  // VIRTIO_BLK_T_DISCARD
      case 13: .writeZeroes  // VIRTIO_BLK_T_WRITE_ZEROES
      case 14: .secureErase  // VIRTIO_BLK_T_SECURE_ERASE
      default: .unknown(type)
      }
    let readsFromGuest = kind != .read && kind != .getID && kind != .getLifetime
    return BlockRequest(
      kind: kind, sector: UInt64(littleEndian: header.1),
      dataBytes: readsFromGuest ? chain.readableBytes &- UInt64(headerBytes) : chain.writableBytes &- 1)
  }

  /// The header's two words, out of as many pieces as it is in: type u32, reserved u32; sector u64.
  @inline(never)
  private static func copyHeader(
    _ chain: DescriptorChain, memory: inout GuestMemoryView
  ) throws(GuestMemoryFault) -> (UInt64, UInt64) {
    // Aligned storage of 16 bytes on the stack.
    var header: (UInt64, UInt64) = (0, 0)
    var fault: GuestMemoryFault?
    withUnsafeMutableBytes(of: &header) { bytes in
      guard let start = bytes.baseAddress else { return }
      var cursor = ChainCursor(chain.buffers, count: chain.readableCount)
      do throws(GuestMemoryFault) {
        _ = try cursor.read(&memory, to: start, count: headerBytes)
      } catch {
        fault = error
      }
    }
    if let fault { throw fault }
    return header
  }

  /// Whether `sectors` from `sector` on lie on a disk of `capacity` bytes.
  package static func isOnDisk(sector: UInt64, bytes: UInt64, capacity: UInt64) -> Bool {
    let (start, overflow) = sector.multipliedReportingOverflow(by: BlockConfiguration.sectorSize)
    guard !overflow, start <= capacity else { return false }
    return bytes <= capacity &- start
  }
}
