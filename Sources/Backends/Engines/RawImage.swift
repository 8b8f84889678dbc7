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
  /// Direct I/O was wanted, and would have needed larger blocks than were asked for.
  package let hasSmallBlocks: Bool

  package var descriptor: Int32 { owned.raw }

  /// Another open file of the same image, for one queue of several: the kernel tells each open file once that something could not be
  /// written, whoever asks first. The lock stays with the first one.
  ///
  /// - Returns: a descriptor, which the caller closes; nil where it needs none or there is none to be had.
  func reopened() -> Int32? {
    guard !isDirect else { return nil }
    let raw = open("/proc/self/fd/\(owned.raw)", (geometry.readOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK)
    return raw >= 0 ? raw : nil
  }

  /// Opens and locks an image.
  ///
  /// - Parameters:
  ///   - holder: who uses it, for the error message that another one gets.
  ///   - direct: whether to try O_DIRECT; where the file system refuses it, buffered I/O is used.
  ///   - block: logical block size, a power of two from 512 to 4096; nil for the smallest that the image's storage can do with direct
  ///     I/O. A smaller one makes I/O buffered.
  ///   - left: how to wait for requests that an ended process left behind.
  package init(
    path: String, holder: String, readOnly: Bool, discard: Bool, direct wantsDirect: Bool = true,
    block wantedBlock: UInt32? = nil, after left: LeftRequests = .none
  ) throws(ImageFault) {
    self.path = path
    self.holder = holder
    let place: TrustedPath
    do throws(TrustedPath.Fault) { place = try TrustedPath(path, followsLast: true) } catch {
      throw .cannotFollow(path: path, "\(error)")
    }
    // What is opened below is what was looked at here.
    let found: OwnedDescriptor
    do throws(Errno) { found = OwnedDescriptor(adopting: try place.open(clinux_o_path())) } catch {
      throw .cannotOpen(path: path, error)
    }
    var kind = stat()
    guard fstat(found.raw, &kind) == 0 else { throw .cannotOpen(path: path, Errno.last) }
    // A block device that this host has mounted, or uses in another way, or that is open under another name, is refused by the kernel.
    let isExclusive = !readOnly && clinux_is_block_device(kind.st_mode) != 0
    let access = (readOnly ? O_RDONLY : O_RDWR) | (isExclusive ? O_EXCL : 0) | O_CLOEXEC | O_NONBLOCK
    let reopened = "/proc/self/fd/\(found.raw)"
    func attempt(_ direct: Bool) -> (descriptor: Int32, failure: Int32) {
      let raw = open(reopened, direct ? access | clinux_o_direct() : access)
      return (raw, raw < 0 ? errno : 0)
    }
    var direct = wantsDirect
    var opened = attempt(direct)
    if opened.failure == EBUSY, isExclusive, ImageLock.holder(of: kind) == nil {
      // It may be taken by requests that a process left behind when it was killed, as with the lock below.
      left.wait {
        opened = attempt(direct)
        return opened.failure == EBUSY
      }
    }
    if direct, opened.failure == EINVAL {
      direct = false
      opened = attempt(direct)
    }
    guard opened.failure == 0 else {
      if opened.failure == EISDIR { throw .notAnImage(path: path) }
      if opened.failure == EBUSY, isExclusive { throw .busy(path: path, holder: ImageLock.holder(of: kind)) }
      throw .cannotOpen(path: path, Errno(opened.failure))
    }
    let raw = opened.descriptor
    let descriptor = OwnedDescriptor(adopting: raw)
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw .cannotOpen(path: path, Errno.last) }
    var bytes = UInt64(clamping: status.st_size)
    var logical: UInt32 = 512
    var physical: UInt32 = 4096
    var discards = discard && !readOnly
    var (secureErase, lifetime): (Bool, BlockLifetime?) = (false, nil)
    var limits = StoreLimits()
    var alignment: UInt32?
    isBlockDevice = clinux_is_block_device(status.st_mode) != 0
    if isBlockDevice {
      let size = clinux_block_device_size(raw, &bytes)
      guard size == 0 else { throw .host(what: "cannot read the size of '\(path)'", Errno(size)) }
      (secureErase, lifetime) = (
        !readOnly && clinux_block_device_can_secure_erase(raw) != 0,
        StorageLifetime.read(deviceNumber: UInt64(status.st_rdev))
      )
      limits = StoreLimits.read(deviceNumber: UInt64(status.st_rdev))
      discards = discards && limits.discardMaximum > 0
      let blocks = clinux_block_device_blocks(raw, &logical, &physical)
      guard blocks == 0 else { throw .host(what: "cannot read the block size of '\(path)'", Errno(blocks)) }
    } else {
      guard clinux_is_regular(status.st_mode) != 0 else { throw .notAnImage(path: path) }
      if direct {
        switch Self.directAlignment(raw) {
        case .some(let found): (alignment, logical) = (max(found.memory, found.place), found.place)
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
      limits.discardGranularity = UInt64(clamping: status.st_blksize)
    }
    guard bytes >= 512 else { throw .tooSmall(path: path, bytes: bytes) }
    let needed = logical
    if let wantedBlock { logical = wantedBlock }
    hasSmallBlocks = direct && logical < needed
    if hasSmallBlocks {
      guard fcntl(raw, F_SETFL, fcntl(raw, F_GETFL) & ~clinux_o_direct()) == 0 else {
        throw .host(what: "cannot leave direct I/O on '\(path)'", Errno.last)
      }
      direct = false
    }
    identity = try ImageLock.take(raw, path: path, holder: holder, exclusive: !readOnly, after: left)
    owned = descriptor
    isDirect = direct
    memoryAlignment = direct ? Int(alignment ?? logical) : 1
    var geometry = BlockGeometry(
      capacity: bytes - bytes % UInt64(logical), logicalBlock: logical, physicalBlock: max(physical, logical),
      canDiscard: discards, readOnly: readOnly, canSecureErase: secureErase, lifetime: lifetime)
    // Zeroing a block device never gives anything back (BLKZEROOUT).
    geometry.canUnmapZeroes = discards && !isBlockDevice
    geometry.discardGranularity = limits.discardGranularity
    geometry.optimalSize = limits.optimalSize
    self.geometry = geometry
  }

  /// The size as it is now, for a disk that is to follow it.
  ///
  /// - Parameter bytes: what a regular file is to grow to first; nil leaves it as it is.
  /// - Returns: the capacity in bytes, a multiple of the logical block.
  package func resize(to bytes: UInt64?) throws(ImageFault) -> UInt64 {
    var present: UInt64 = 0
    if isBlockDevice {
      guard bytes == nil else {
        throw .cannotResize(
          path: path, "only regular files can be grown here; grow a block device with its own tools first")
      }
      let failure = clinux_block_device_size(descriptor, &present)
      guard failure == 0 else { throw .host(what: "cannot read the size of '\(path)'", Errno(failure)) }
    } else {
      var status = stat()
      guard fstat(descriptor, &status) == 0 else { throw .host(what: "cannot examine '\(path)'", Errno.last) }
      present = UInt64(clamping: status.st_size)
      if let bytes {
        guard bytes >= present else {
          throw .cannotResize(
            path: path, "\(bytes) bytes are less than its present \(present); shrinking would lose data")
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

  /// Alignment of memory and of places on the file that direct I/O needs: 512 or 4096 for places; nil when it is not to be had. The kernel
  /// says so, or it is tried.
  private static func directAlignment(_ descriptor: Int32) -> (memory: UInt32, place: UInt32)? {
    var (memory, place): (UInt32, UInt32) = (0, 0)
    if clinux_direct_alignment(descriptor, &memory, &place) == 0 {
      guard memory > 0, place > 0, place <= 4096, memory <= 4096 else { return nil }
      return (memory, max(512, place))
    }
    let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
    defer { buffer.deallocate() }
    for size in [512, 4096] where pread(descriptor, buffer, size, 0) >= 0 { return (UInt32(size), UInt32(size)) }
    return nil
  }
}
