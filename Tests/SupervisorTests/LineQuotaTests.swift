import Supervisor
import Testing

/// Lines that a guest may put into the daemon's log.
@Suite struct LineQuotaTests {
  private static let second: UInt64 = 1_000_000_000

  @Test func linesBeyondTheQuotaAreCountedAndToldLater() {
    var quota = LineQuota(lines: 10, seconds: 30)
    let verdicts = (0..<25).map { quota.next(at: 100 * Self.second + UInt64($0)) }
    #expect(verdicts[..<10].allSatisfy { $0 == .say(left: 0) })
    #expect(verdicts[10...].allSatisfy { $0 == .drop })
    // The first line of the next period tells how many there were in between.
    #expect(quota.next(at: 131 * Self.second) == .say(left: 15))
    #expect(quota.next(at: 131 * Self.second) == .say(left: 0))
  }

  @Test func slowLinesAllGoThrough() {
    var quota = LineQuota(lines: 2, seconds: 1)
    for line: UInt64 in 0..<100 { #expect(quota.next(at: line * Self.second / 2 + Self.second) == .say(left: 0)) }
  }

}
