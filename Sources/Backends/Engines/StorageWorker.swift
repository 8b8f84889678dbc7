import CLinux
import Devices
import EventLoop
import Glibc
import Synchronization

/// A thread for what an engine does not hand to the kernel: discard, write zeroes, and libaio's flush on kernels without asynchronous fdatasync.
///
/// These are rare. The thread is started by the first of them and ends with the engine.
final class StorageWorker: Sendable {
  private let image: RawImage
  /// Of the image; the engine's.
  private let descriptor: Int32
  private let thread: LoopThread
  private let wakeUp: Int32
  private let finished = Mutex<[EngineCompletion]>([])

  /// - Parameter wakeUp: the eventfd to signal when something is finished; it outlives the worker.
  init(image: RawImage, descriptor: Int32, wakeUp: Int32) throws(Errno) {
    self.image = image
    self.descriptor = descriptor
    self.wakeUp = wakeUp
    thread = try LoopThread(name: "vxd-storage", work: .guests)
  }

  func stop() { thread.stopAndJoin() }

  func start(_ request: EngineRequest) {
    // Only values travel: these operations have no data.
    let (operation, tag, offset, length) = (request.operation, request.tag, request.offset, request.length)
    let (isDurable, mayUnmap) = (request.isDurable, request.mayUnmap)
    thread.loop.enqueue { [self] in
      var result = Self.perform(operation, image, descriptor, offset, length, mayUnmap: mayUnmap)
      if result == 0, isDurable, fdatasync(descriptor) != 0 { result = -Int(errno) }
      finished.withLock { $0.append(EngineCompletion(tag: tag, result: result)) }
      EventDescriptor.signal(wakeUp)
    }
  }

  /// Takes what is finished, at most `capacity`.
  func take(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    finished.withLock { finished in
      let count = min(capacity, finished.count)
      for index in 0..<count { completions[index] = finished[index] }
      finished.removeFirst(count)
      return count
    }
  }

  /// - Returns: 0 or a negated errno.
  private static func perform(
    _ operation: BlockOperation, _ image: RawImage, _ descriptor: Int32, _ offset: UInt64, _ length: UInt64,
    mayUnmap: Bool
  ) -> Int {
    if operation == .flush { return fdatasync(descriptor) == 0 ? 0 : -Int(errno) }
    guard length > 0 else { return 0 }
    if image.isBlockDevice {
      switch operation {
      case .discard: return -Int(clinux_block_device_discard(descriptor, offset, length))
      case .secureErase: return -Int(clinux_block_device_secure_erase(descriptor, offset, length))
      default: return -Int(clinux_block_device_zero(descriptor, offset, length))
      }
    }
    guard operation != .secureErase else { return -Int(EOPNOTSUPP) }
    guard let start = Int64(exactly: offset), let count = Int64(exactly: length) else { return -Int(EINVAL) }
    if operation == .discard || mayUnmap {
      let failure = clinux_fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, count)
      guard operation == .writeZeroes, failure == EOPNOTSUPP else { return -Int(failure) }
    }
    // What is allocated stays so: no hole, unless the driver allows it.
    let failure = clinux_fallocate(descriptor, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, start, count)
    guard failure == EOPNOTSUPP else { return -Int(failure) }
    return writeZeroes(descriptor, off_t(start), off_t(count))
  }

  private static func writeZeroes(_ descriptor: Int32, _ start: off_t, _ count: off_t) -> Int {
    let size = 1 << 20
    let zeroes = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 4096)
    defer { zeroes.deallocate() }
    memset(zeroes, 0, size)
    var done: off_t = 0
    while done < count {
      let written = pwrite(descriptor, zeroes, Int(min(off_t(size), count - done)), start + done)
      if written < 0 && errno == EINTR { continue }
      guard written > 0 else { return written == 0 ? -Int(EIO) : -Int(errno) }
      done += off_t(written)
    }
    return 0
  }
}
