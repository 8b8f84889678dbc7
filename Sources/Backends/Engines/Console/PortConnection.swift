/// Decides when a port is connected to another program's socket (`connect`): a value. Events go in with the time, and what is to be done comes out.
///
/// With `whenOpen` the guest opens and closes; without it, the port is as if it were open from its beginning to its end.
package struct PortConnection: Equatable, Sendable {
  package enum State: Equatable, Sendable {
    /// The guest has its port closed: there is no connection. The guest is told that the other end is open, since a program that opens the port is
    /// connected then: one that were told otherwise would find the port at its end in the moment before.
    case closed
    /// The guest has it open, and the next attempt is due.
    ///
    /// - isSevered: a connection was lost, or refused, since it was opened: nobody is at the other end, and the guest is told so.
    case waiting(until: UInt64, isSevered: Bool)
    /// An attempt is being made, and its outcome is the next event.
    case connecting
    case connected
    case ended
  }

  package enum Event: CaseIterable, Sendable {
    /// The guest opens its port.
    case opened
    /// It has its port open since a backend before this one, whose connection is lost.
    case resumed
    case closed
    case connected
    case refused
    /// The other side has ended the connection.
    case lost
    /// The time that was asked for has come.
    case due
    /// The port ends here.
    case ended
  }

  package enum Effect: Equatable, Sendable {
    case connect
    case disconnect
    /// `due` is to come at this time, and not at another one that was asked for before.
    case wake(UInt64)
    /// It is not to come.
    case sleep
    /// What came for the guest and was not read is dropped.
    case forget
  }

  /// Between two attempts, in nanoseconds, behind one that failed and behind a loss.
  package static let pause: UInt64 = 1_000_000_000
  /// Attempts that may follow each other at once, beyond which there is one in each pause: a guest opens its port as often as it likes.
  package static let burst: UInt64 = 5

  package private(set) var state = State.closed
  /// The time up to which attempts are paid for: each costs a pause.
  private var paid: UInt64 = 0

  package init() {}

  /// What the guest is told of the other end.
  package var isOpen: Bool {
    switch state {
    case .closed, .connecting, .connected: true
    case .waiting(_, let isSevered): !isSevered
    case .ended: false
    }
  }

  /// - Parameter now: monotonic nanoseconds.
  package mutating func handle(_ event: Event, at now: UInt64) -> [Effect] {
    switch (state, event) {
    case (.closed, .opened):
      guard now < allowed else { return attempt(at: now) }
      return wait(until: allowed, isSevered: false)
    case (.closed, .resumed), (.connecting, .refused), (.connected, .lost):
      return wait(until: max(now &+ Self.pause, allowed), isSevered: true)
    case (.waiting(let time, _), .due):
      return now < time ? [.wake(time)] : attempt(at: now)
    case (.connecting, .connected):
      state = .connected
      return []
    case (.waiting, .closed):
      state = .closed
      return [.sleep, .forget]
    case (.connected, .closed):
      state = .closed
      return [.disconnect, .forget]
    case (.waiting, .ended):
      state = .ended
      return [.sleep]
    case (.connected, .ended):
      state = .ended
      return [.disconnect]
    case (.closed, .ended), (.connecting, .ended):
      state = .ended
      return []
    default: return []
    }
  }

  private var allowed: UInt64 {
    let credit = (Self.burst - 1) * Self.pause
    return paid > credit ? paid - credit : 0
  }

  private mutating func attempt(at now: UInt64) -> [Effect] {
    paid = max(paid, now) &+ Self.pause
    state = .connecting
    return [.connect]
  }

  private mutating func wait(until time: UInt64, isSevered: Bool) -> [Effect] {
    state = .waiting(until: time, isSevered: isSevered)
    return [.wake(time)]
  }
}
