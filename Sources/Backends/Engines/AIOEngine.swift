import CAIO
import CLinux
package import Devices
import EventLoop
import Glibc
import HostMemory

/// Block engine over libaio: one context per queue, completions announced by an eventfd.
///
/// Confined to the queue's data thread. Each tag has one control block, so that starting an operation allocates nothing.
package final class AIOEngine: BlockEngine {
  package let image: RawImage
  /// An open file of its own where the page cache is used: each sees what could not be written. Closed with the engine.
  private let reopened: Int32?
  private let descriptor: Int32
  package var readiness: Int32 { ready.raw }

  private let ready: EventDescriptor
  private var context: io_context_t?
  private var ring: CompletionRing?
  private let depth: Int
  // All zero at first.
  private let tables: UntouchedMemory
  private let blocks: UnsafeMutablePointer<iocb>
  private let pointers: UnsafeMutablePointer<UnsafeMutablePointer<iocb>?>
  private let events: UnsafeMutablePointer<io_event>
  /// For requests without data.
  private let noVectors = UnsafeMutablePointer<DataVector>.allocate(capacity: 1)
  private static let eventCapacity = 64
  /// RWF_DSYNC (linux/fs.h): the write is durable when it completes.
  private static let durable: UInt32 = 2
  /// Operations that the context did not take yet: their control blocks, first in first out.
  private var backlog: UnsafeMutablePointer<UnsafeMutablePointer<iocb>?>
  private var backlogCount = 0
  private var side: SideCompletions
  private var outstanding = 0
  private var flushesByWorker = false

  private static let smallestContext: Int32 = 16

  /// - Parameter depth: operations at a time at most; tags are below it.
  package init(image: RawImage, depth: Int) throws(ImageFault) {
    self.image = image
    self.depth = depth
    reopened = image.reopened()
    descriptor = reopened ?? image.descriptor
    do throws(Errno) {
      ready = try EventDescriptor()
    } catch {
      throw .host(what: "cannot make an eventfd", error)
    }
    var tables = UntouchedMemory(
      bytes: UntouchedMemory.bytes(iocb.self, depth) + 2
        * UntouchedMemory.bytes(UnsafeMutablePointer<iocb>?.self, depth)
        + UntouchedMemory.bytes(io_event.self, Self.eventCapacity)
    )
    blocks = tables.take(iocb.self, depth)
    pointers = tables.take(UnsafeMutablePointer<iocb>?.self, depth)
    backlog = tables.take(UnsafeMutablePointer<iocb>?.self, depth)
    events = tables.take(io_event.self, Self.eventCapacity)
    self.tables = tables
    side = SideCompletions(image: image, descriptor: descriptor, depth: depth, wakeUp: ready.raw)
    // The host has 65536 operations for all processes as it comes: with many disks, some get less than they asked for, and what is
    // beyond it waits in the backlog.
    var events = Int32(clamping: depth)
    var result = io_setup(events, &context)
    while result == -EAGAIN && events > Self.smallestContext {
      events /= 2
      result = io_setup(events, &context)
    }
    ring = context.flatMap(CompletionRing.init)
    guard result == 0 else {
      throw .host(what: "cannot create an aio context\(Self.remedy(result))", Errno(-result))
    }
  }

  /// What keeps io_setup from making a context, where its error says so; else the error speaks for itself.
  ///
  /// - Parameter result: a negated errno.
  package static func remedy(_ result: Int32) -> String {
    switch -result {
    case EAGAIN: " (fs.aio-max-nr is used up: sysctl fs.aio-max-nr=1048576)"
    case ENOSYS: " (this kernel has no asynchronous I/O: CONFIG_AIO)"
    default: ""
    }
  }

  deinit {
    side.stop()
    close()
    if let reopened { Glibc.close(reopened) }
    noVectors.deallocate()
  }

  // MARK: BlockEngine

  package var geometry: BlockGeometry { image.geometry }
  package var reachesGuestMemory: Bool { true }
  package var movesDataInSubmit: Bool { !image.isDirect }
  package var canRetryFlush: Bool { image.isDirect }
  package var memoryAlignment: Int { image.memoryAlignment }
  package var now: UInt64 { EventLoop.now() }

  package func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    var prepared = 0
    for index in 0..<count {
      let request = requests + index
      let tag = Int(request.pointee.tag)
      guard tag < depth else { continue }
      let operation = request.pointee.operation
      switch operation {
      case .discard, .writeZeroes, .secureErase:
        side.startOnWorker(request.pointee)
        continue
      case .flush where flushesByWorker:
        side.startOnWorker(request.pointee)
        continue
      case .flush, .read, .write: break
      }
      prepare(blocks + tag, request)
      pointers[prepared] = blocks + tag
      prepared &+= 1
    }
    if backlogCount > 0 {
      for index in 0..<prepared { append(toBacklog: pointers[index]) }
      retryBacklog()
    } else {
      start(pointers, prepared)
    }
  }

  private func prepare(_ block: UnsafeMutablePointer<iocb>, _ request: UnsafeMutablePointer<EngineRequest>) {
    let offset = Int64(truncatingIfNeeded: request.pointee.offset)
    let count = Int32(truncatingIfNeeded: request.pointee.vectorCount)
    let vectors = UnsafeRawPointer(request.pointee.vectors).assumingMemoryBound(to: iovec.self)
    let first = request.pointee.vectors.pointee
    switch request.pointee.operation {
    // The kernel copies a vector of vectors in and checks it: one alone goes without.
    case .read where count == 1: io_prep_pread(block, descriptor, first.start, first.length, offset)
    case .write where count == 1: io_prep_pwrite(block, descriptor, first.start, first.length, offset)
    case .read: io_prep_preadv(block, descriptor, vectors, count, offset)
    case .write: io_prep_pwritev(block, descriptor, vectors, count, offset)
    case .flush, .discard, .writeZeroes, .secureErase: io_prep_fdsync(block, descriptor)
    }
    if request.pointee.isDurable, request.pointee.operation == .write { block.pointee.aio_rw_flags = Self.durable }
    block.pointee.data = UnsafeMutableRawPointer(bitPattern: UInt(request.pointee.tag) &+ 1)
    // Buffered reads and writes are over when io_submit returns: no need to be woken for them.
    if image.isDirect || request.pointee.operation == .flush { io_set_eventfd(block, ready.raw) }
  }

  /// Hands control blocks to the kernel; what it cannot take now goes to the backlog.
  private func start(_ list: UnsafeMutablePointer<UnsafeMutablePointer<iocb>?>, _ count: Int) {
    var done = 0
    while done < count {
      let result = Int(io_submit(context, count &- done, list + done))
      if result > 0 {
        done &+= result
        outstanding &+= result
      } else if result == -Int(EAGAIN) {
        // Vectors of buffered I/O point into guest memory that is ours for this batch only: the device tries again by itself.
        guard image.isDirect else {
          for index in done..<count { fail(list[index], result) }
          return
        }
        for index in done..<count { append(toBacklog: list[index]) }
        if outstanding == 0 { ready.signal() }  // nothing else would bring us back
        return
      } else if result != -Int(EINTR) {
        fail(list[done], result == 0 ? -Int(EIO) : result)
        done &+= 1
      }
    }
  }

  private func append(toBacklog block: UnsafeMutablePointer<iocb>?) {
    backlog[backlogCount] = block
    backlogCount &+= 1
  }

  private func retryBacklog() {
    guard backlogCount > 0 else { return }
    let count = backlogCount
    for index in 0..<count { pointers[index] = backlog[index] }
    backlogCount = 0
    start(pointers, count)
  }

  private func fail(_ block: UnsafeMutablePointer<iocb>?, _ result: Int) {
    guard let block else { return }
    let tag = UInt32(truncatingIfNeeded: UInt(bitPattern: block.pointee.data) &- 1)
    if result == -Int(EINVAL), block.pointee.aio_lio_opcode == Int16(IO_CMD_FDSYNC.rawValue) {
      // A kernel or file system without asynchronous fdatasync.
      flushesByWorker = true
      side.startOnWorker(EngineRequest(operation: .flush, tag: tag, offset: 0, vectors: noVectors))
      return
    }
    side.fail(tag, result)
  }

  package func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    var count = side.take(into: completions, capacity: capacity)
    if outstanding > 0, count < capacity {
      let result = harvest(min(capacity &- count, Self.eventCapacity))
      for index in 0..<max(result, 0) {
        completions[count] = EngineCompletion(
          tag: UInt32(truncatingIfNeeded: UInt(bitPattern: events[index].data) &- 1),
          result: Int(bitPattern: events[index].res))
        count &+= 1
      }
      outstanding &-= max(result, 0)
      if result > 0 { retryBacklog() }
    } else if backlogCount > 0 {
      retryBacklog()
    }
    return count
  }

  /// Completions into `events`; never waits.
  private func harvest(_ capacity: Int) -> Int {
    if let ring { return ring.take(into: events, capacity: capacity) }
    var none = timespec()
    return Int(io_getevents(context, 0, capacity, events, &none))
  }

  package func waitForCompletion() {
    guard side.earlyCount == 0 else { return }
    if outstanding > 0 && side.workerOutstanding == 0 && !image.isDirect { return }
    var descriptor = pollfd(fd: ready.raw, events: Int16(POLLIN), revents: 0)
    _ = poll(&descriptor, 1, 1000)
    ready.drain()
  }

  /// The kernel answers for its stores by itself; what it has not been given need not be done.
  package func abandon() {
    for index in 0..<backlogCount { fail(backlog[index], -Int(ECANCELED)) }
    backlogCount = 0
  }

  package func close() {
    // The kernel waits for a grace period of its own, tens of milliseconds long.
    if let context { io_destroy(context) }
    context = nil
    ring = nil
  }

  package func acknowledgeReadiness() { ready.drain() }
}
