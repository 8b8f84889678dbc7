package import Devices
import EventLoop
import Synchronization

/// What goes wrong with a store, steered from any thread while it works.
package final class FaultPlan: Sendable {
  /// A fault for one kind of operation.
  package struct Fault: Sendable {
    /// Operations that it hits; nil hits all.
    package var operations: Set<BlockOperation>?
    /// What they complete with: a negated errno.
    package var result: Int
    /// How many of them; then the store works again.
    package var count: Int

    package init(_ operations: Set<BlockOperation>? = nil, result: Int, count: Int = .max) {
      self.operations = operations
      self.result = result
      self.count = count
    }
  }

  private struct State {
    var faults: [Fault] = []
    var isHolding = false
    var late = 0
    var injected = 0
  }

  private let state = Mutex(State())

  package init() {}

  /// Adds a fault.
  package func add(_ fault: Fault) { state.withLock { $0.faults.append(fault) } }

  /// The store works from now on.
  package func clear() { state.withLock { $0.faults = [] } }

  /// Completions stay in the store until this is false again.
  package var isHolding: Bool {
    get { state.withLock { $0.isHolding } }
    set { state.withLock { $0.isHolding = newValue } }
  }

  /// Looks for completions that find none yet, once nothing is held any more.
  package var late: Int {
    get { state.withLock { $0.late } }
    set { state.withLock { $0.late = newValue } }
  }

  /// Whether a look for completions finds none.
  func hidesCompletions() -> Bool {
    state.withLock { state in
      guard !state.isHolding, state.late > 0 else { return state.isHolding }
      state.late -= 1
      return true
    }
  }

  /// Operations that were hit.
  package var injected: Int { state.withLock { $0.injected } }

  /// What an operation is to complete with, if a fault hits it.
  func result(of operation: BlockOperation) -> Int? {
    state.withLock { state in
      for index in state.faults.indices
      where state.faults[index].count > 0 && state.faults[index].operations?.contains(operation) ?? true {
        state.faults[index].count -= 1
        state.injected += 1
        return state.faults[index].result
      }
      return nil
    }
  }
}

/// A real engine with faults in front of it.
package final class FaultyEngine: EngineDecorator {
  package let engine: any BlockEngine
  private let plan: FaultPlan
  private var failed: [EngineCompletion] = []
  private var held: [EngineCompletion] = []

  package init(_ engine: any BlockEngine, _ plan: FaultPlan) {
    self.engine = engine
    self.plan = plan
  }

  package func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    for index in 0..<count {
      if let result = plan.result(of: requests[index].operation) {
        failed.append(EngineCompletion(tag: requests[index].tag, result: result))
      } else {
        engine.submit(requests + index, count: 1)
      }
    }
  }

  package func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    let count = engine.reap(into: completions, capacity: capacity)
    for index in 0..<count { held.append(completions[index]) }
    held += failed
    failed = []
    guard !plan.hidesCompletions() else { return 0 }
    let given = min(capacity, held.count)
    for index in 0..<given { completions[index] = held[index] }
    held.removeFirst(given)
    return given
  }

  package func waitForCompletion() {
    if held.isEmpty && failed.isEmpty { engine.waitForCompletion() }
    if plan.isHolding { yieldThread() }
  }
}
