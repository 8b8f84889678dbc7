import Synchronization

/// A change that a request asks for, checked and ready: it can be carried out, or just described.
package struct ControlChange: Sendable {
  /// What is done, for a dry run and for the log.
  package var summary: String
  /// Why this change, other than its method, is for role admin only; nil when it is not.
  package var adminReason: String?
  /// Carries it out. Never waits; what takes time is told by an event.
  package var perform: @Sendable () -> JSONValue

  package init(
    _ summary: String, adminReason: String? = nil, perform: @escaping @Sendable () -> JSONValue = { ["accepted": true] }
  ) {
    self.summary = summary
    self.adminReason = adminReason
    self.perform = perform
  }
}

/// A requested change, for the audit log.
package struct ControlAudit: Sendable {
  package enum Outcome: Sendable {
    /// Accepted, and about to be carried out; with its summary.
    case accepted(String)
    case refused(ControlFault)
  }

  package var caller: ControlCaller
  package var method: String
  package var parameters: JSONValue
  package var outcome: Outcome
}

/// Answers to changes by their idempotency keys: a client that did not get its answer asks again, and nothing is done twice. Each user has
/// keys of its own.
final class IdempotencyStore: Sendable {
  private struct Entry {
    var request: String
    var answer: JSONValue
  }

  private struct State {
    var entries: [String: Entry] = [:]
    var order: [String] = []
  }

  /// Keys that are remembered; the oldest are forgotten first.
  static let limit = 1024
  /// Bytes of a request that is remembered with its key. With this, the store has at most 16 MiB.
  static let requestLimit = 16 << 10
  private let state = Mutex(State())

  /// Does `body` once for a key.
  ///
  /// - Parameter request: what the key was given for; the same key for something else is a mistake.
  func once(
    _ key: String, by user: UInt32, _ request: String, _ body: () throws(ControlFault) -> JSONValue
  ) throws(ControlFault) -> JSONValue {
    let entry = "\(user) \(key)"
    if let known = state.withLock({ $0.entries[entry] }) {
      guard known.request == request else {
        throw ControlFault(
          code: -32004, message: "the idempotency key '\(key)' was used for another request",
          data: ["field": "params.idempotencyKey", "remedy": "use a new key for each change"])
      }
      return known.answer
    }
    let answer = try body()
    state.withLock { state in
      state.entries[entry] = Entry(request: request, answer: answer)
      state.order.append(entry)
      if state.order.count > Self.limit { state.entries[state.order.removeFirst()] = nil }
    }
    return answer
  }
}
