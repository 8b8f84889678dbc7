import Synchronization

/// Runs something when the last of several has happened.
package final class Countdown: Sendable {
  private let left: Atomic<Int>
  private let action: @Sendable () -> Void

  package init(left: Int, _ action: @escaping @Sendable () -> Void) {
    self.left = Atomic(left)
    self.action = action
  }

  package func step() {
    if left.wrappingSubtract(1, ordering: .acquiringAndReleasing).newValue == 0 { action() }
  }
}
