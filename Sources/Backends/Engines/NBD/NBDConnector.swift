import EventLoop
import Synchronization

/// Brings a lost connection back, on a thread of its own that exists from the first loss on.
final class NBDConnector: Sendable {
  /// Pause between two tries in milliseconds: doubles from the first to the second.
  private static let pauses: (first: UInt64, last: UInt64) = (100, 2000)

  private struct State: ~Copyable {
    var thread: LoopThread?
    var connected: OwnedDescriptor?
    var isWanted = false
    var isStopped = false
  }

  private let address: NBDAddress
  private let capacity: UInt64
  private let wakeUp: Int32
  private let state = Mutex(State())

  /// - Parameters:
  ///   - capacity: bytes that the export must still have.
  ///   - wakeUp: the eventfd to signal when a connection is there, and when the time is over; it outlives the connector.
  init(_ address: NBDAddress, capacity: UInt64, wakeUp: Int32) throws(Errno) {
    self.address = address
    self.capacity = capacity
    self.wakeUp = wakeUp
  }

  /// Starts to look for a connection, until there is one or the connector is stopped.
  ///
  /// - Parameter limit: after so many nanoseconds the owner is woken, to give up what waits.
  func start(limit: UInt64) {
    let loop: EventLoop? = state.withLock { state in
      guard !state.isStopped else { return nil }
      state.isWanted = true
      if state.thread == nil { state.thread = try? LoopThread(name: "vxd-nbd") }
      return state.thread?.loop
    }
    guard let loop else { return }
    loop.enqueue { [weak self] in
      loop.schedule(afterMilliseconds: limit / 1_000_000 + 1) { [weak self] in self?.signal() }
      self?.attempt(loop, pause: Self.pauses.first)
    }
  }

  private func attempt(_ loop: EventLoop, pause: UInt64) {
    guard state.withLock({ $0.isWanted && !$0.isStopped }) else { return }
    if let connection = try? NBDConnection(address), connection.capacity >= capacity {
      hand(connection)
    } else {
      loop.schedule(afterMilliseconds: pause) { [weak self] in
        self?.attempt(loop, pause: min(pause * 2, Self.pauses.last))
      }
    }
  }

  private func hand(_ connection: consuming NBDConnection) {
    var descriptor: OwnedDescriptor? = connection.takeDescriptor()
    state.withLock { state in
      state.isWanted = false
      state.connected = descriptor.take()
    }
    signal()
  }

  private func signal() { EventDescriptor.signal(wakeUp) }

  /// The new connection, once.
  func take() -> OwnedDescriptor? { state.withLock { $0.connected.take() } }

  /// Ends the thread; waits for a try that is under way.
  func stop() {
    let thread: LoopThread? = state.withLock { state in
      state.isStopped = true
      defer { state.thread = nil }
      return state.thread
    }
    thread?.stopAndJoin()
  }
}
