import CLinux
package import Devices
package import EventLoop
import Glibc
import Synchronization

/// Block engine over io_uring: one ring for each queue, whose descriptor is readable while completions are there.
///
/// Confined to the queue's data thread. The image's open files are registered with the ring, the locked one among them. That matters when the
/// process is killed: it may be gone before what it has submitted is, other than with libaio, but the kernel holds the ring's files until
/// the last request is done. So the next process that gets the image's lock, or claims the block device, finds nothing under way
/// that could still write (`RawImage`). Small bounce buffers are registered too: the kernel need not look their pages up.
package final class IOUringEngine: BlockEngine {
  package let image: RawImage
  /// As with libaio: an open file of its own where the page cache is used.
  private let reopened: Int32?
  private let descriptor: Int32
  package var readiness: Int32 { ring.descriptor }
  package var alarm: Int32? { ready.raw }

  private let ready: EventDescriptor
  private let ring: SubmissionRing
  private var isOpen = true
  private let depth: Int
  /// RWF_DSYNC (linux/fs.h): the write is durable when it completes.
  private static let durable: UInt32 = 2
  private var side: SideCompletions
  private var outstanding = 0

  /// Registered memory; empty where there is none.
  private var registered: UnsafeMutableRawBufferPointer?
  /// Of all engines, in bytes: what is registered is pinned.
  private static let registeredBytes = Atomic<Int>(0)
  private static let registeredLimit = 64 << 20

  /// - Parameter depth: operations at a time at most; tags are below it.
  /// - Throws: the errno of io_uring_setup, or of registering the files: the kernel has no rings for us.
  package init(image: RawImage, depth: Int) throws(Errno) {
    self.image = image
    self.depth = depth
    ready = try EventDescriptor()
    ring = try SubmissionRing(depth: depth)
    let reopened = image.reopened()
    descriptor = reopened ?? image.descriptor
    self.reopened = reopened
    side = SideCompletions(image: image, descriptor: descriptor, depth: depth, wakeUp: ready.raw)
    // O_NONBLOCK, with which images are opened, makes the kernel believe that a block device never blocks, and fail requests where it does.
    if image.isBlockDevice { Self.clearNonblocking(descriptor) }
    let failure = withUnsafePointer(to: (descriptor, image.descriptor)) { files in
      files.withMemoryRebound(to: Int32.self, capacity: 2) { clinux_ring_register_files(ring.descriptor, $0, 2) }
    }
    guard failure == 0 else { throw Errno(failure) }
  }

  /// Why the kernel makes no ring, for people.
  package static func reason(_ errno: Errno) -> String {
    switch errno.code {
    case EPERM: "io_uring is not permitted (kernel.io_uring_disabled, or the service's system call filter)"
    case ENOSYS: "this kernel has no io_uring"
    case ENOTSUP: "this kernel's io_uring is older than Linux 5.12"
    default: "io_uring cannot be set up: \(errno)"
    }
  }

  private static func clearNonblocking(_ descriptor: Int32) {
    _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~O_NONBLOCK)
  }

  deinit {
    side.stop()
    close()
    if let reopened { Glibc.close(reopened) }
  }

  // MARK: BlockEngine

  package var geometry: BlockGeometry { image.geometry }
  package var reachesGuestMemory: Bool { image.isDirect }
  package var movesDataInSubmit: Bool { false }
  package var canRetryFlush: Bool { image.isDirect }
  package var memoryAlignment: Int { image.memoryAlignment }
  package var now: UInt64 { EventLoop.now() }
  /// The kernel delivers completions on the thread's way out of it, so they end its sleep (EINTR) before its look at the ring's descriptor.
  package var interruptsSleep: Bool { true }
  /// A copy into registered memory costs less than looking up a page of another's.
  package var bouncesUpTo: UInt64 { registered == nil ? 0 : 4096 }

  /// Pins `bytes` from `start` on, where the budget of all engines and the process's limit (RLIMIT_MEMLOCK) allow it.
  package func register(_ start: UnsafeMutableRawPointer, bytes: Int) {
    guard registered == nil, isOpen, bytes > 0 else { return }
    let before = Self.registeredBytes.add(bytes, ordering: .relaxed).oldValue
    guard before <= Self.registeredLimit - bytes,
      clinux_ring_register_memory(ring.descriptor, start, UInt64(bytes)) == 0
    else {
      Self.registeredBytes.subtract(bytes, ordering: .relaxed)
      return
    }
    registered = UnsafeMutableRawBufferPointer(start: start, count: bytes)
  }

  package func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    for index in 0..<count {
      let request = requests + index
      guard Int(request.pointee.tag) < depth else { continue }
      switch request.pointee.operation {
      case .discard, .writeZeroes, .secureErase: side.startOnWorker(request.pointee)
      case .flush, .read, .write:
        prepare(request)
        ring.put(request.pointee.tag)
      }
    }
    enter()
  }

  private func prepare(_ request: UnsafeMutablePointer<EngineRequest>) {
    // Word by word: what a tag's submission had before is the kernel's no more, and all of it that is used is written.
    let submission = ring.submission(request.pointee.tag)
    submission.pointee.flags = UInt8(clinux_ring_fixed_file)  // place 0 of the registered files
    submission.pointee.user_data = UInt64(request.pointee.tag)
    submission.pointee.operation_flags = 0
    guard request.pointee.operation != .flush else {
      submission.pointee.opcode = UInt8(clinux_ring_fsync)
      submission.pointee.operation_flags = UInt32(clinux_ring_datasync)
      (submission.pointee.offset, submission.pointee.address, submission.pointee.length) = (0, 0, 0)
      return
    }
    let isRead = request.pointee.operation == .read
    let first = request.pointee.vectors.pointee
    submission.pointee.offset = request.pointee.offset
    if request.pointee.vectorCount == 1 {
      submission.pointee.address = UInt64(UInt(bitPattern: first.start))
      submission.pointee.length = UInt32(truncatingIfNeeded: first.length)
      if isRegistered(first) {
        submission.pointee.opcode = UInt8(isRead ? clinux_ring_read_fixed : clinux_ring_write_fixed)
      } else {
        submission.pointee.opcode = UInt8(isRead ? clinux_ring_read : clinux_ring_write)
      }
    } else {
      submission.pointee.address = UInt64(UInt(bitPattern: request.pointee.vectors))
      submission.pointee.length = UInt32(truncatingIfNeeded: request.pointee.vectorCount)
      submission.pointee.opcode = UInt8(isRead ? clinux_ring_readv : clinux_ring_writev)
    }
    if request.pointee.isDurable, !isRead { submission.pointee.operation_flags = Self.durable }
  }

  @inline(__always)
  private func isRegistered(_ vector: DataVector) -> Bool {
    guard let registered, let start = registered.baseAddress, let place = vector.start, place >= start else {
      return false
    }
    return place - start <= registered.count &- vector.length
  }

  private func enter() {
    outstanding &+= ring.enter { tag, result in side.fail(tag, result) }
  }

  package func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    var count = side.take(into: completions, capacity: capacity)
    guard outstanding > 0, count < capacity else { return count }
    var harvest = ring.completions()
    guard !harvest.isEmpty else { return count }
    var goesAgain = false
    while !harvest.isEmpty, count < capacity {
      let (tag, result) = ring.next(&harvest)
      outstanding &-= 1
      if result != Int(ring.submission(tag).pointee.length), isUnfinished(tag, result) {
        ring.put(tag)
        goesAgain = true
        continue
      }
      completions[count] = EngineCompletion(tag: tag, result: result)
      count &+= 1
    }
    ring.give(harvest)
    if goesAgain { enter() }
    return count
  }

  /// Whether a read or write has to go once more, then by a thread of the kernel's that may block: a try without blocking was refused by what
  /// lies below, or ended early. Both are no news of the store.
  private func isUnfinished(_ tag: UInt32, _ result: Int) -> Bool {
    let submission = ring.submission(tag)
    let flags = submission.pointee.flags
    guard submission.pointee.opcode != UInt8(clinux_ring_fsync), flags & UInt8(clinux_ring_async) == 0 else {
      return false
    }
    if result < 0 {
      guard [-Int(EAGAIN), -Int(EOPNOTSUPP), -Int(EINTR)].contains(result) else { return false }
      // An open file that is said not to block fails what would.
      Self.clearNonblocking(descriptor)
    } else if result == bytes(of: submission) {
      return false
    }
    submission.pointee.flags = flags | UInt8(clinux_ring_async)
    return true
  }

  private func bytes(of submission: UnsafeMutablePointer<clinux_submission>) -> Int {
    let length = Int(submission.pointee.length)
    guard submission.pointee.opcode <= UInt8(clinux_ring_writev),
      let vectors = UnsafePointer<DataVector>(bitPattern: UInt(submission.pointee.address))
    else { return length }
    var sum = 0
    for index in 0..<length { sum &+= vectors[index].length }
    return sum
  }

  package func waitForCompletion() {
    guard side.earlyCount == 0 else { return }
    var descriptors = (
      pollfd(fd: ring.descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: ready.raw, events: Int16(POLLIN), revents: 0)
    )
    _ = withUnsafeMutablePointer(to: &descriptors) {
      $0.withMemoryRebound(to: pollfd.self, capacity: 2) { poll($0, 2, 1000) }
    }
    ready.drain()
  }

  /// The kernel answers for its stores by itself.
  package func abandon() {}

  /// The image can be locked anew, by others too, once this has returned and the image is closed.
  package func close() {
    guard isOpen else { return }
    isOpen = false
    clinux_ring_unregister(ring.descriptor, registered == nil ? 0 : 1)
    if let registered { Self.registeredBytes.subtract(registered.count, ordering: .relaxed) }
    registered = nil
    ring.close()
  }

  package func acknowledgeReadiness() {}
  package func acknowledgeAlarm() { ready.drain() }
}
