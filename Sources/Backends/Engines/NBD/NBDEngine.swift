import CLinux
package import Devices
import EventLoop
import Glibc

/// Block engine over an NBD export: image formats and network storage that a server of its own serves (qemu-storage-daemon,
/// nbdkit, qemu-nbd).
///
/// Confined to the queue's data thread. Requests are pipelined; replies come in any order. When the connection is lost, what is
/// outstanding waits, is sent again on the next connection, and fails only when none comes within the limit. Sending a write
/// again is harmless: the guest has not been told of it, so nothing it did afterwards depends on it.
package final class NBDEngine: BlockEngine {
  /// What an engine reports of its connection: nil when it is there, else why it is not. Called on any thread.
  package typealias Notice = @Sendable (_ trouble: String?) -> Void

  enum Phase: UInt8 {
    case free
    case queued
    case sent
  }

  struct Operation {
    var request: EngineRequest
    var phase = Phase.free
    /// A write without force unit access at the server whose flush is under way: bytes of the write.
    var flushingAfter = -1
    /// Writes that had been answered when this flush was started: what it makes durable.
    var covered: UInt64 = 0
  }

  /// Bytes of one step of a transfer through the pump's own buffers.
  private static let stepBytes: UInt32 = 1 << 20
  package let geometry: BlockGeometry
  /// Whether several connections see each other's writes and flushes (NBD_FLAG_CAN_MULTI_CONN).
  package let allowsSeveralQueues: Bool
  package var readiness: Int32 { epoll.raw }

  let depth: Int
  private let flags: NBDProtocol.ExportFlags
  private let reconnectLimit: UInt64
  private let onNotice: Notice
  private let epoll: OwnedDescriptor
  private let wakeUp: EventDescriptor
  private let connector: NBDConnector
  var descriptor: OwnedDescriptor?
  private var wantsWritable = false
  /// Counts the connections; a part of each handle, so that nothing of an older one is taken for the present one's.
  var generation: UInt32 = 1
  private var lostAt: UInt64 = 0
  private var isAbandoned = false

  let operations: UnsafeMutablePointer<Operation>
  let headers: UnsafeMutableRawPointer
  /// Tags to be sent, first in first out; bytes of the first that are sent already.
  let sendQueue: UnsafeMutablePointer<UInt32>
  var sendFirst = 0
  var sendCount = 0
  var sentOfFirst = 0
  let vectors: UnsafeMutablePointer<iovec>
  static let vectorCapacity = 128

  let replyHeader: UnsafeMutableRawPointer
  var replyHeaderBytes = 0
  /// The read whose data comes now, and how much of it has come; -1 between replies.
  var receivingTag = -1
  var receivedBytes = 0

  private let finished: UnsafeMutablePointer<EngineCompletion>
  private var finishedCount = 0
  private var outstanding = 0
  /// Writes that the server answered, and how many of them a later flush covers. The rest is in the server's cache, and gone with
  /// it when it dies.
  private var writesAnswered: UInt64 = 0
  private var writesCovered: UInt64 = 0

  /// Connects; blocks for as long as the server takes, within limits.
  ///
  /// - Parameters:
  ///   - depth: operations at a time at most; tags are below it.
  ///   - reconnectMilliseconds: how long requests wait for a lost server before they fail.
  ///   - handshakeMilliseconds: how long connecting and agreeing on the export may take, each time.
  package init(
    address: NBDAddress, readOnly: Bool, discard: Bool, depth: Int, reconnectMilliseconds: UInt64,
    handshakeMilliseconds: UInt64 = 10_000, onNotice: @escaping Notice
  ) throws(ImageFault) {
    let connection = try NBDConnection(address, NBDPatience(milliseconds: handshakeMilliseconds))
    flags = NBDProtocol.ExportFlags(rawValue: connection.flags)
    guard readOnly || !flags.contains(.readOnly) else {
      throw .nbd(address.text, "the export is read-only, but the disk is not (use mode 'r')")
    }
    guard connection.minimumBlock <= 4096, connection.minimumBlock.nonzeroBitCount == 1 else {
      throw .nbd(
        address.text,
        "the export's smallest block has \(connection.minimumBlock) bytes; expected a power of two up to 4096")
    }
    guard connection.maximumBytes >= Self.stepBytes else {
      throw .nbd(address.text, "the server takes \(connection.maximumBytes) bytes at a time; 1 MiB is needed")
    }
    let block = max(512, connection.minimumBlock)
    guard connection.capacity >= UInt64(block) else { throw .tooSmall(path: address.text, bytes: connection.capacity) }
    var geometry = BlockGeometry(
      capacity: connection.capacity - connection.capacity % UInt64(block), logicalBlock: block,
      physicalBlock: max(4096, block), canDiscard: discard && !readOnly && flags.contains(.canTrim),
      readOnly: readOnly, canWriteZeroes: flags.contains(.canWriteZeroes))
    geometry.canUnmapZeroes = geometry.canDiscard
    self.geometry = geometry
    allowsSeveralQueues = flags.contains(.canMultipleConnections) || flags.contains(.readOnly)
    self.depth = depth
    self.onNotice = onNotice
    reconnectLimit = reconnectMilliseconds &* 1_000_000
    do throws(Errno) {
      epoll = OwnedDescriptor(adopting: try retrying { epoll_create1(Int32(EPOLL_CLOEXEC)) })
      wakeUp = try EventDescriptor()
      connector = try NBDConnector(
        address, capacity: geometry.capacity, handshakeMilliseconds: handshakeMilliseconds, wakeUp: wakeUp.raw)
    } catch {
      throw .host(what: "cannot make an NBD engine", error)
    }
    operations = .allocate(capacity: depth)
    headers = .allocate(byteCount: depth * 32, alignment: 8)
    sendQueue = .allocate(capacity: depth)
    vectors = .allocate(capacity: Self.vectorCapacity)
    replyHeader = .allocate(byteCount: NBDProtocol.replyBytes, alignment: 8)
    finished = .allocate(capacity: depth)
    let none = EngineRequest(operation: .flush, tag: 0, offset: 0, vectors: noVectors)
    operations.initialize(repeating: Operation(request: none), count: depth)
    var event = epoll_event()
    event.events = EPOLLIN.rawValue
    guard epoll_ctl(epoll.raw, EPOLL_CTL_ADD, wakeUp.raw, &event) == 0 else {
      throw .host(what: "epoll", Errno.last)
    }
    adopt(connection.descriptor)
  }

  private let noVectors = UnsafeMutablePointer<DataVector>.allocate(capacity: 1)

  deinit {
    connector.stop()
    operations.deallocate()
    headers.deallocate()
    sendQueue.deallocate()
    vectors.deallocate()
    replyHeader.deallocate()
    finished.deallocate()
    noVectors.deallocate()
  }

  // MARK: BlockEngine

  package var reachesGuestMemory: Bool { false }
  package var movesDataInSubmit: Bool { false }
  package var memoryAlignment: Int { 1 }
  package var now: UInt64 { EventLoop.now() }

  package func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    for index in 0..<count {
      let tag = Int(requests[index].tag)
      guard tag < depth else { continue }
      operations[tag] = Operation(request: requests[index])
      outstanding &+= 1
      begin(tag)
    }
    send()
  }

  package func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    if descriptor == nil { lookForConnection() }
    if outstanding > finishedCount || descriptor != nil {
      send()
      receive()
    }
    let count = min(capacity, finishedCount)
    for index in 0..<count { completions[index] = finished[index] }
    finishedCount &-= count
    for index in 0..<finishedCount { finished[index] = finished[index &+ count] }
    outstanding &-= count
    if finishedCount > 0 { wakeUp.signal() }
    return count
  }

  package func waitForCompletion() {
    guard finishedCount == 0 else { return }
    var ready = pollfd(fd: epoll.raw, events: Int16(POLLIN), revents: 0)
    _ = poll(&ready, 1, 1000)
    acknowledgeReadiness()
  }

  package func acknowledgeReadiness() { wakeUp.drain() }

  package func close() { connector.stop() }

  package func abandon() {
    isAbandoned = true
    hangUp()
    failEverything()
  }

  // MARK: Operations

  private func begin(_ tag: Int) {
    let request = operations[tag].request
    switch request.operation {
    case .flush where !flags.contains(.canFlush), .discard where request.length == 0,
      .writeZeroes where request.length == 0:
      return finish(tag, 0)
    case .secureErase: return finish(tag, -Int(EOPNOTSUPP))
    default: break
    }
    guard !isAbandoned, descriptor != nil || waitsForConnection else { return finish(tag, -Int(EIO)) }
    enqueue(tag)
  }

  private func enqueue(_ tag: Int) {
    operations[tag].phase = .queued
    operations[tag].covered = writesAnswered
    sendQueue[(sendFirst &+ sendCount) % depth] = UInt32(truncatingIfNeeded: tag)
    sendCount &+= 1
    putHeader(tag)
  }

  private func putHeader(_ tag: Int) {
    let operation = operations[tag]
    var commandFlags: UInt16 = 0
    var length = operation.request.length
    let command: NBDProtocol.Command
    switch operation.request.operation {
    case .read, .write:
      command = operation.request.operation == .read ? .read : .write
      length = UInt64(dataBytes(tag))
    case .discard: command = .trim
    case .writeZeroes:
      command = .writeZeroes
      if !operation.request.mayUnmap { commandFlags |= NBDProtocol.noHole }
    case .flush, .secureErase: command = .flush
    }
    if operation.request.isDurable, command != .read, command != .flush, flags.contains(.canForceUnitAccess) {
      commandFlags |= NBDProtocol.forceUnitAccess
    }
    let isFlush = operation.flushingAfter >= 0 || command == .flush
    NBDProtocol.putRequest(
      at: headers + 32 &* tag, flags: isFlush ? 0 : commandFlags, command: isFlush ? .flush : command,
      handle: UInt64(generation) << 32 | UInt64(UInt(bitPattern: tag)), offset: isFlush ? 0 : operation.request.offset,
      length: isFlush ? 0 : UInt32(truncatingIfNeeded: length))
  }

  /// The server's answer to an operation.
  func answered(_ tag: Int, _ result: Int) {
    let operation = operations[tag]
    if result >= 0, operation.flushingAfter < 0, operation.request.isDurable, operation.request.operation != .read,
      operation.request.operation != .flush, !flags.contains(.canForceUnitAccess), flags.contains(.canFlush)
    {
      operations[tag].flushingAfter = result
      return enqueue(tag)
    }
    if result >= 0 {
      switch operation.request.operation {
      case .flush: writesCovered = max(writesCovered, operation.covered)
      case .write, .writeZeroes, .discard: if !operation.request.isDurable { writesAnswered &+= 1 }
      default: break
      }
    }
    finish(tag, result >= 0 && operation.flushingAfter >= 0 ? operation.flushingAfter : result)
  }

  private func finish(_ tag: Int, _ result: Int) {
    operations[tag].phase = .free
    operations[tag].flushingAfter = -1
    if finishedCount == 0 { wakeUp.signal() }
    finished[finishedCount] = EngineCompletion(tag: UInt32(truncatingIfNeeded: tag), result: result)
    finishedCount &+= 1
  }

  private func failEverything() {
    sendCount = 0
    sentOfFirst = 0
    for tag in 0..<depth where operations[tag].phase != .free { finish(tag, -Int(EIO)) }
  }

  // MARK: Connection

  private var waitsForConnection: Bool { EventLoop.now() &- lostAt < reconnectLimit }

  private func adopt(_ connected: consuming OwnedDescriptor) {
    var event = epoll_event()
    event.events = EPOLLIN.rawValue | EPOLLRDHUP.rawValue
    epoll_ctl(epoll.raw, EPOLL_CTL_ADD, connected.raw, &event)
    wantsWritable = false
    descriptor = consume connected
  }

  private func hangUp() {
    // Closing takes the socket out of the epoll set too.
    descriptor = nil
    replyHeaderBytes = 0
    receivingTag = -1
    sentOfFirst = 0
  }

  func lose(_ reason: String) {
    guard descriptor != nil else { return }
    hangUp()
    generation &+= 1
    lostAt = EventLoop.now()
    // All of it again, in the order of the tags: requests that are under way together have no order.
    sendFirst = 0
    sendCount = 0
    for tag in 0..<depth where operations[tag].phase != .free {
      // A write whose flush was under way is as lost as one that had no answer.
      operations[tag].flushingAfter = -1
      enqueue(tag)
    }
    let atRisk = writesAnswered &- writesCovered
    writesCovered = writesAnswered
    onNotice(
      atRisk == 0
        ? reason
        : "\(reason); if the server died, up to \(atRisk) acknowledged writes that were not flushed may be lost (\"cache\": \"writethrough\" prevents this)"
    )
    connector.start(limit: reconnectLimit)
  }

  private func lookForConnection() {
    guard !isAbandoned else { return }
    if let connected = connector.take() {
      adopt(connected)
      onNotice(nil)
      send()
    } else if lostAt != 0, !waitsForConnection {
      failEverything()
    }
  }

  func watch(writable: Bool) {
    guard writable != wantsWritable, let raw = descriptor?.raw else { return }
    wantsWritable = writable
    var event = epoll_event()
    event.events = EPOLLIN.rawValue | EPOLLRDHUP.rawValue | (writable ? EPOLLOUT.rawValue : 0)
    epoll_ctl(epoll.raw, EPOLL_CTL_MOD, raw, &event)
  }
}
