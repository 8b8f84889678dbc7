import Synchronization

/// A value on its way to another thread, where a newer one takes the place of one that has not been fetched: what a guest can say again
/// and again fills no mailbox.
package final class Latest<Value: Sendable>: Sendable {
  private let waiting = Mutex<Value?>(nil)

  package init() {}

  /// - Returns: whether nothing was waiting: then the caller sees to it that it is fetched.
  package func put(_ value: Value) -> Bool {
    waiting.withLock { waiting in
      defer { waiting = value }
      return waiting == nil
    }
  }

  package func take() -> Value? {
    waiting.withLock { waiting in
      defer { waiting = nil }
      return waiting
    }
  }
}
