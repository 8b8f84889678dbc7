import Synchronization

/// A change that a request asks for, checked and ready: it can be carried out, or just told.
package struct ControlChange: Sendable {
  /// What would be done, for a dry run.
  package var summary: String
  /// Carries it out. Never waits; what takes time is told by an event.
  package var perform: @Sendable () -> JSONValue

  package init(_ summary: String, perform: @escaping @Sendable () -> JSONValue = { ["accepted": true] }) {
    self.summary = summary
    self.perform = perform
  }
}

/// Answers to changes by their idempotency keys: a client that did not get its answer asks again, and nothing is done twice.
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
  private let state = Mutex(State())

  /// Does `body` once for a key.
  ///
  /// - Parameter request: what the key was given for; the same key for something else is a mistake.
  func once(
    _ key: String, _ request: String, _ body: () throws(ControlFault) -> JSONValue
  ) throws(ControlFault) -> JSONValue {
    if let known = state.withLock({ $0.entries[key] }) {
      guard known.request == request else {
        throw ControlFault(
          code: -32004, message: "the idempotency key '\(key)' was used for another request",
          data: ["field": "params.idempotencyKey", "remedy": "use a new key for each change"])
      }
      return known.answer
    }
    let answer = try body()
    state.withLock { state in
      state.entries[key] = Entry(request: request, answer: answer)
      state.order.append(key)
      if state.order.count > Self.limit { state.entries[state.order.removeFirst()] = nil }
    }
    return answer
  }
}
