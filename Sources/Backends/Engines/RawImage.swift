import CLinux
package import Devices
import EventLoop
import Glibc

/// An open raw image: a regular file or a block device. Its content is never looked at: the format is what the toolstack says.
package final class RawImage: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: all stored properties are immutable.
  private let owned: OwnedDescriptor
  private let identity: FileIdentity
  private let holder: String
  package let path: String
  package let geometry: BlockGeometry
  /// Opened with O_DIRECT; otherwise reads and writes go through the page cache.
  package let isDirect: Bool
  package let isBlockDevice: Bool
  /// Alignment of memory that direct I/O needs, in bytes; 1 for buffered I/O.
  package let memoryAlignment: Int

  package var descriptor: Int32 { owned.raw }

  /// Opens and locks an image.
  ///
  /// - Parameters:
  ///   - holder: who uses it, for the error message that another one gets.
  ///   - direct: whether to try O_DIRECT; where the file system refuses it, buffered I/O is used.
  package init(
    path: String, holder: String, readOnly: Bool, discard: Bool, direct wantsDirect: Bool = true
  ) throws(ImageFault) {
    self.path = path
    self.holder = holder
    let access = (readOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK
    var raw = wantsDirect ? open(path, access | clinux_o_direct()) : -1
    var direct = raw >= 0
    if raw < 0 {
      guard !wantsDirect || errno != EISDIR else { throw .notAnImage(path: path) }
      guard !wantsDirect || errno == EINVAL else { throw .cannotOpen(path: path, Errno.last) }
      raw = open(path, access)
      direct = false
    }
    guard raw >= 0 else { throw .cannotOpen(path: path, Errno.last) }
    let descriptor = OwnedDescriptor(adopting: raw)
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw .cannotOpen(path: path, Errno.last) }
    var bytes = UInt64(clamping: status.st_size)
    var logical: UInt32 = 512
    var physical: UInt32 = 4096
    var discards = discard && !readOnly
    var (secureErase, lifetime): (Bool, BlockLifetime?) = (false, nil)
    isBlockDevice = clinux_is_block_device(status.st_mode) != 0
    if isBlockDevice {
      let size = clinux_block_device_size(raw, &bytes)
      guard size == 0 else { throw .host(what: "cannot read the size of '\(path)'", Errno(size)) }
      (secureErase, lifetime) = (
        !readOnly && clinux_block_device_can_secure_erase(raw) != 0,
        StorageLifetime.read(deviceNumber: UInt64(status.st_rdev))
      )
      let blocks = clinux_block_device_blocks(raw, &logical, &physical)
      guard blocks == 0 else { throw .host(what: "cannot read the block size of '\(path)'", Errno(blocks)) }
    } else {
      guard clinux_is_regular(status.st_mode) != 0 else { throw .notAnImage(path: path) }
      if direct {
        switch Self.directAlignment(raw) {
        case .some(let alignment): logical = alignment
        case .none:
          // The file system took O_DIRECT at open but refuses every alignment.
          guard fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) & ~clinux_o_direct()) == 0 else {
            throw .host(what: "cannot leave direct I/O on '\(path)'", Errno.last)
          }
          direct = false
        }
      }
      // A hole punched behind the end changes nothing and tells whether the file system can do it.
      let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
      discards = discards && clinux_fallocate(raw, mode, Int64(clamping: bytes), 4096) == 0
    }
    guard bytes >= 512 else { throw .tooSmall(path: path, bytes: bytes) }
    identity = try ImageLock.take(raw, path: path, holder: holder, exclusive: !readOnly)
    owned = descriptor
    isDirect = direct
    memoryAlignment = direct ? Int(logical) : 1
    geometry = BlockGeometry(
      capacity: bytes - bytes % UInt64(logical), logicalBlock: logical, physicalBlock: max(physical, logical),
      canDiscard: discards, readOnly: readOnly, canSecureErase: secureErase, lifetime: lifetime)
  }

  /// The size as it is now, for a disk that is to follow it.
  ///
  /// - Parameter bytes: what a regular file is to grow to first; nil leaves it as it is.
  /// - Returns: the capacity in bytes, a multiple of the logical block.
  package func resize(to bytes: UInt64?) throws(ImageFault) -> UInt64 {
    var present: UInt64 = 0
    if isBlockDevice {
      guard bytes == nil else { throw .cannotResize(path: path, "a block device is grown by its own tools first") }
      let failure = clinux_block_device_size(descriptor, &present)
      guard failure == 0 else { throw .host(what: "cannot read the size of '\(path)'", Errno(failure)) }
    } else {
      var status = stat()
      guard fstat(descriptor, &status) == 0 else { throw .host(what: "cannot examine '\(path)'", Errno.last) }
      present = UInt64(clamping: status.st_size)
      if let bytes {
        guard bytes >= present else {
          throw .cannotResize(path: path, "\(bytes) bytes are less than its \(present): what is cut off would be lost")
        }
        guard let length = off_t(exactly: bytes), ftruncate(descriptor, length) == 0 else {
          throw .host(what: "cannot grow '\(path)'", Errno.last)
        }
        present = bytes
      }
    }
    guard present >= 512 else { throw .tooSmall(path: path, bytes: present) }
    return present - present % UInt64(geometry.logicalBlock)
  }

  deinit { ImageLock.release(identity, holder: holder) }

  /// The smallest unit that direct reads of this file accept: 512 or 4096; nil when none is.
  private static func directAlignment(_ descriptor: Int32) -> UInt32? {
    let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
    defer { buffer.deallocate() }
    for size in [512, 4096] where pread(descriptor, buffer, size, 0) >= 0 { return UInt32(size) }
    return nil
  }
}
