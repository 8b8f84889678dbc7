import Synchronization
import TestSupport
import Testing

/// What looks for owners in the status board (`StatusBoardTests`) finds them.
@Suite struct OwnerSearchTests {
  private final class Owner: Sendable {}
  private final class Tally: Sendable { let word = Atomic<UInt64>(0) }
  private final class Pair: Sendable {
    let first = Tally()
    let hidden: Owner? = nil
  }

  private struct Value {
    var numbers = [1, 2]
    var text: String? = "text"
    var tally: Tally? = Tally()
    var names: [String: Set<Int>] = ["a": [1]]
    var choice = Choice.some(3, [Tally()])
  }

  private protocol Thing {}

  private enum Choice { case some(Int, [Tally]) }

  private func found(_ value: Any) -> [String] {
    OwnerSearch(value, counters: [Tally.self, Pair.self]).found.map { String($0.prefix { $0 != ":" }) }
  }

  @Test func valuesAndNamedCountersPass() {
    #expect(found(Value()).isEmpty)
  }

  @Test func functionsAndObjectsAreFound() {
    struct Bad {
      var plain: () -> Int = { 1 }
      var optional: (@Sendable () -> Int)?
      var none: [() -> Void] = []
      var owner = Owner()
      var gone: Owner?
      var nobody: [String: Owner] = [:]
      var existential: (any Thing)?
      var anything: (any Sendable)?
      var inside = [[(1, Owner())]]
      var pair = Pair()
    }
    #expect(
      found(Bad()) == [
        ".plain", ".optional", ".none", ".owner", ".gone", ".nobody", ".existential", ".anything",
        ".inside.0.0..1", ".pair.hidden",
      ])
  }
}
