import Testing

@testable import Lifecycle

@Suite struct BudgetTests {
  private func at(_ seconds: UInt64, _ chance: Double = 0.5) -> Moment {
    Moment(nanoseconds: seconds * 1_000_000_000, chance: chance)
  }

  // MARK: Restarts

  @Test func pausesDoubleWithinTheirBoundsAndTheBudgetEnds() {
    var policy = RestartPolicy()
    policy.limit = 8
    policy.firstPause = 100
    policy.longestPause = 1000
    var budget = RestartBudget()
    for pause: UInt64 in [100, 200, 400, 800, 1000, 1000, 1000, 1000] {
      #expect(budget.next(policy, at: at(1)) == .restart(after: pause))
    }
    #expect(budget.next(policy, at: at(2)) == .quarantine)
    // Old failures are forgotten.
    #expect(budget.next(policy, at: at(602, 0)) == .restart(after: 50))
    #expect(budget.next(policy, at: at(602, 1)) == .restart(after: 300))
    budget.forgive()
    #expect(budget.next(policy, at: at(602)) == .restart(after: 100))
    #expect(budget.count == 11)
  }

  @Test(arguments: [(0, 0.0), (.max, 1.0), (-1, .infinity), (20, -.infinity)] as [(Int, Double)])
  func pauseOfAnyTryIsANumber(tries: Int, chance: Double) {
    var policy = RestartPolicy()
    policy.firstPause = .max
    policy.longestPause = .max
    let pause = RestartBudget.pause(policy, tries: tries, at: at(1, chance))
    #expect(pause >= 1 << 39 && pause <= 3 << 39)
  }

  // MARK: Churn

  @Test func guestThatOpensItsDeviceWithoutEndIsSlowed() {
    var churn = ChurnBudget<Int>()
    var pauses: [Milliseconds] = []
    for second in 0..<12 { pauses.append(churn.pause(for: 1, at: at(UInt64(second)))) }
    #expect(pauses == [0, 0, 0, 0, 0, 1000, 2000, 4000, 8000, 16000, 30000, 30000])
    // Another device is not, and quiet pays.
    #expect(churn.pause(for: 2, at: at(12)) == 0)
    #expect(churn.pause(for: 1, at: at(700)) == 0)
  }

  @Test func newsOfADeviceAreLimitedWhateverBecomesOfIt() {
    var churn = ChurnBudget<Int>()
    var verdicts: [ChurnBudget<Int>.Verdict] = []
    for _ in 0..<30 { verdicts.append(churn.verdict(for: 1, at: at(1))) }
    #expect(verdicts.prefix(19).allSatisfy { $0 == .say })
    #expect(verdicts[19] == .sayLast)
    #expect(verdicts.suffix(10).allSatisfy { $0 == .silent })
    #expect(churn.verdict(for: 1, at: at(62)) == .say)
  }

  @Test func churnIsBoundedAndForgottenWithItsDomain() {
    var churn = ChurnBudget<Int>()
    for key in 0..<ChurnBudget<Int>.capacity + 10 { _ = churn.pause(for: key, at: at(UInt64(key))) }
    #expect(churn.count == ChurnBudget<Int>.capacity)
    churn.forget { $0 >= 100 }
    #expect(churn.count == 90)
  }

  // MARK: Crashes

  @Test func deviceInABatchAtThreeDeathsInARowIsNotStarted() {
    var fuse = CrashFuse<String>()
    fuse.noteDeath(inBatch: ["a", "b"])
    fuse.noteDeath(inBatch: ["a"])
    #expect(fuse.reason(for: "a") == nil)
    fuse.noteDeath(inBatch: ["a", "b"])
    #expect(fuse.reason(for: "a") == "it was serving requests at each of the last 3 crashes of vxd")
    #expect(fuse.reason(for: "b") == nil)
    // As the next daemon reads it.
    var next = CrashFuse(deaths: fuse.deaths)
    #expect(next == fuse)
    next.forgive("a")
    #expect(next.reason(for: "a") == nil)
  }

  @Test func onlyTheLastDeathsCountAndHealthEndsThem() {
    var fuse = CrashFuse<String>()
    for _ in 0..<3 { fuse.noteDeath(inBatch: ["a"]) }
    fuse.noteDeath(inBatch: [])
    #expect(fuse.reason(for: "a") == nil)
    for _ in 0..<3 { fuse.noteDeath(inBatch: ["a"]) }
    #expect(fuse.reason(for: "a") != nil)
    fuse.noteHealth()
    #expect(fuse.reason(for: "a") == nil)
    #expect(CrashFuse(deaths: Array(repeating: Set(["a"]), count: 9)).deaths.count == 3)
  }
}
