import EventLoop
import Synchronization

/// Brings a lost connection back, on a thread of its own that exists from the first loss on.
final class NBDConnector: Sendable {
  /// Pause between two tries in milliseconds: doubles from the first to the second. So does the pause before the first try, while
  /// connections are lost again soon: a server that accepts and hangs up is not asked all the time.
  private static let pauses: (first: UInt64, last: UInt64) = (100, 2000)
  /// Nanoseconds after which a connection has been a good one.
  private static let goodLife: UInt64 = 10_000_000_000

  private struct State: ~Copyable {
    var thread: LoopThread?
    var connected: OwnedDescriptor?
    var isWanted = false
    var isStopped = false
    /// When the last connection was made, and what the next one waits for if that does not last.
    var connectedAt: UInt64
    var pause = NBDConnector.pauses.first
    /// Wakes the owner when its requests have waited for too long.
    var timer: UInt64 = 0
  }

  private let address: NBDAddress
  private let capacity: UInt64
  private let handshakeMilliseconds: UInt64
  private let wakeUp: Int32
  /// Signalled by `stop`, for a try that is under way.
  private let callOff: EventDescriptor
  private let state: Mutex<State>

  /// - Parameters:
  ///   - capacity: bytes that the export must still have.
  ///   - handshakeMilliseconds: how long a try may take.
  ///   - wakeUp: the eventfd to signal when a connection is there, and when the time is over; it outlives the connector.
  init(
    _ address: NBDAddress, capacity: UInt64, handshakeMilliseconds: UInt64, wakeUp: Int32
  ) throws(Errno) {
    self.address = address
    self.capacity = capacity
    self.handshakeMilliseconds = handshakeMilliseconds
    self.wakeUp = wakeUp
    callOff = try EventDescriptor()
    state = Mutex(State(connectedAt: EventLoop.now()))
  }

  /// Starts to look for a connection, until there is one or the connector is stopped.
  ///
  /// - Parameter limit: after so many nanoseconds the owner is woken, to give up what waits.
  func start(limit: UInt64) {
    let plan: (loop: EventLoop, pause: UInt64)? = state.withLock { state in
      guard !state.isStopped else { return nil }
      state.isWanted = true
      if state.thread == nil { state.thread = try? LoopThread(name: "vxd-nbd", work: .guests) }
      guard let loop = state.thread?.loop else { return nil }
      guard EventLoop.now() &- state.connectedAt < Self.goodLife else {
        state.pause = Self.pauses.first
        return (loop, 0)
      }
      defer { state.pause = min(state.pause * 2, Self.pauses.last) }
      return (loop, state.pause)
    }
    guard let (loop, pause) = plan else { return }
    loop.enqueue { [weak self] in
      guard let self else { return }
      let old = state.withLock { $0.timer }
      if old != 0 { loop.cancel(timer: old) }
      let timer = loop.schedule(afterMilliseconds: limit / 1_000_000 + 1) { [weak self] in self?.signal() }
      state.withLock { $0.timer = timer }
      if pause == 0 { attempt(loop, pause: Self.pauses.first) } else { attempt(loop, after: pause) }
    }
  }

  private func attempt(_ loop: EventLoop, after pause: UInt64) {
    loop.schedule(afterMilliseconds: pause) { [weak self] in
      self?.attempt(loop, pause: min(pause * 2, Self.pauses.last))
    }
  }

  /// - Parameter pause: before the next try, if this one fails.
  private func attempt(_ loop: EventLoop, pause: UInt64) {
    guard state.withLock({ $0.isWanted && !$0.isStopped }) else { return }
    let patience = NBDPatience(milliseconds: handshakeMilliseconds, callOff: callOff.raw)
    if let connection = try? NBDConnection(address, patience), connection.capacity >= capacity {
      hand(connection)
    } else {
      attempt(loop, after: pause)
    }
  }

  private func hand(_ connection: consuming NBDConnection) {
    var descriptor: OwnedDescriptor? = connection.takeDescriptor()
    state.withLock { state in
      state.isWanted = false
      state.connectedAt = EventLoop.now()
      state.connected = descriptor.take()
    }
    signal()
  }

  private func signal() { EventDescriptor.signal(wakeUp) }

  /// The new connection, once.
  func take() -> OwnedDescriptor? { state.withLock { $0.connected.take() } }

  /// Ends the thread, and a try that is under way.
  func stop() {
    callOff.signal()
    let thread: LoopThread? = state.withLock { state in
      state.isStopped = true
      defer { state.thread = nil }
      return state.thread
    }
    thread?.stopAndJoin()
  }
}
