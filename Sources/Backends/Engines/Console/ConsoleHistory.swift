import EventLoop
import Glibc

/// The last bytes that a guest wrote to a port, in a file of the runtime directory that is mapped: they survive the daemon, not the host.
final class ConsoleHistory {
  private static let magic: UInt64 = 0x5453_4948_5344_5856  // "VXDSHIST"
  private static let headerBytes = 64

  private let memory: UnsafeMutableRawPointer
  private let capacity: Int
  private var length: Int { Self.headerBytes + capacity }

  /// - Parameters:
  ///   - path: nil keeps it in this process only.
  ///   - capacity: bytes that are remembered, at least 1.
  init(path: String?, capacity: Int) throws(Errno) {
    self.capacity = capacity
    let length = Self.headerBytes + capacity
    var flags = MAP_PRIVATE | MAP_ANONYMOUS
    var raw: Int32 = -1
    if let path {
      raw = try retrying { open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600) }
      // All of it now: a store to a file system that is full would be a SIGBUS.
      let result = posix_fallocate(raw, 0, off_t(length))
      guard result == 0, ftruncate(raw, off_t(length)) == 0 else {
        Glibc.close(raw)
        throw Errno(result == 0 ? errno : result)
      }
      flags = MAP_SHARED
    }
    let start = mmap(nil, length, PROT_READ | PROT_WRITE, flags, raw, 0)
    let failure = Errno.last
    if raw >= 0 { Glibc.close(raw) }
    guard let start, start != MAP_FAILED else { throw failure }
    memory = start
    let isKnown =
      memory.load(as: UInt64.self) == Self.magic
      && memory.load(fromByteOffset: 8, as: UInt64.self) == UInt64(capacity)
    guard !isKnown else { return }
    memory.storeBytes(of: 0, toByteOffset: 16, as: UInt64.self)
    memory.storeBytes(of: UInt64(capacity), toByteOffset: 8, as: UInt64.self)
    memory.storeBytes(of: Self.magic, as: UInt64.self)
  }

  deinit { munmap(memory, length) }

  /// Bytes that were ever written.
  private var total: UInt64 { memory.load(fromByteOffset: 16, as: UInt64.self) }

  func append(_ bytes: UnsafeRawBufferPointer) {
    var place = Int(total % UInt64(capacity))
    for byte in bytes.suffix(capacity) {
      memory.storeBytes(of: byte, toByteOffset: Self.headerBytes + place, as: UInt8.self)
      place += 1
      if place == capacity { place = 0 }
    }
    // What is longer than the ring has gone round: the place moves with what was stored.
    let stored = UInt64(min(bytes.count, capacity))
    memory.storeBytes(of: total &+ stored, toByteOffset: 16, as: UInt64.self)
  }

  /// What is remembered, oldest first.
  var bytes: [UInt8] {
    let count = Int(min(total, UInt64(capacity)))
    let start = Int((total - UInt64(count)) % UInt64(capacity))
    return (0..<count).map {
      memory.load(fromByteOffset: Self.headerBytes + (start + $0) % capacity, as: UInt8.self)
    }
  }
}
