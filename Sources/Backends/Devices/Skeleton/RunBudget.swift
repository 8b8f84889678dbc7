package import Synchronization

/// What one run of a pump may do before the other sources of its thread have their turn.
///
/// A driver can keep its queues filled for ever, so nothing that a pump does in a run may go on until they are empty. Chains are taken
/// from a queue against the budget (`takeChain`), data that moves is paid for (`pay`), and a pump that has more to do once it is spent
/// returns: the skeleton runs it again. It is spent early when jobs wait for the thread, so that a reset, a limit or an operator
/// waits for a few chains, whatever the driver does.
package struct RunBudget {
  /// Chains of a run at most, in all of its queues together.
  package static let chains = 256
  /// Bytes that a run moves before it leaves; the step with which they are reached ends first.
  package static let bytes = 16 << 20
  /// Chains that a run may take although jobs wait: they may come without end too.
  package static let chainsBesideJobs = 16
  /// Translations that a view may miss in a run: each may leave a mapping behind that is withdrawn only when the batch ends.
  package static let misses: UInt64 = 256

  private var chainsLeft: Int
  private var bytesLeft: Int
  private var graceLeft = Self.chainsBesideJobs
  /// Set while jobs wait; nil where there is no loop. Belongs to the loop, which outlives the run.
  private let interruption: UnsafeMutablePointer<Atomic<Bool>>?
  /// Nothing more is to be begun in this run.
  package private(set) var isSpent = false

  package init(
    chains: Int = Self.chains, bytes: Int = Self.bytes, interruption: UnsafeMutablePointer<Atomic<Bool>>? = nil
  ) {
    chainsLeft = chains
    bytesLeft = bytes
    self.interruption = interruption
  }

  /// Asks for a chain to be taken.
  ///
  /// - Returns: false when the run is over.
  package mutating func takeChain() -> Bool {
    guard !isSpent else { return false }
    chainsLeft &-= 1
    graceLeft &-= 1
    guard chainsLeft >= 0, graceLeft >= 0 || !hasJobs else {
      isSpent = true
      return false
    }
    return true
  }

  /// Data was moved, or is about to be.
  package mutating func pay(bytes: UInt64) {
    bytesLeft &-= Int(truncatingIfNeeded: min(bytes, 1 << 40))
    if bytesLeft <= 0 { isSpent = true }
  }

  /// Between two steps of something long: whether the next one may begin.
  package mutating func allowsStep() -> Bool {
    if graceLeft < Self.chainsBesideJobs, hasJobs { isSpent = true }
    graceLeft &-= 1
    return !isSpent
  }

  /// Ends the run early.
  package mutating func spend() { isSpent = true }

  private var hasJobs: Bool { interruption?.pointee.load(ordering: .relaxed) ?? false }
}
