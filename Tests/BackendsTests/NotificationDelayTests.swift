import Devices
import TestSupport
import Testing

/// Notifications that are kept back: never for longer than the driver said, and none is lost.
@Suite struct NotificationDelayTests {
  private static let most: UInt64 = 128

  private func delay(packets: UInt32, microseconds: UInt32) -> NotificationDelay {
    var delay = NotificationDelay()
    delay.set(NotificationLimits(packets: packets, microseconds: microseconds))
    return delay
  }

  @Test func nothingIsKeptBackWithoutALimitOfTimeOrForOnePacket() {
    #expect(!delay(packets: 0, microseconds: 0).isOn)
    #expect(!delay(packets: 1000, microseconds: 0).isOn)
    #expect(!delay(packets: 1, microseconds: 50).isOn)
    #expect(delay(packets: 0, microseconds: 50).isOn && delay(packets: 2, microseconds: 1).isOn)
  }

  @Test func longestDelayIsBoundedWhateverTheDriverSays() {
    let limits = NotificationLimits(packets: .max, microseconds: .max)
    #expect(limits.microseconds == NotificationLimits.longest && limits.packets == .max)
  }

  @Test func packetsOrTimeEndTheDelay() {
    var delay = delay(packets: 3, microseconds: 50)
    func published(_ count: UInt64, _ now: UInt64, isWanted: Bool = true) -> Bool {
      delay.published(packets: count, isWanted: isWanted, most: Self.most, at: now)
    }
    #expect(!published(1, 1000) && delay.due == 51_000)
    // Wanted once is owed, whatever the driver wants of the next ones.
    #expect(!published(1, 2000, isWanted: false) && delay.due == 51_000)
    #expect(published(1, 3000) && delay.due == 0)
    #expect(!published(1, 4000))
    #expect([53_999, 54_000, .max].map { delay.elapsed(at: $0) } == [false, true, false] && delay.due == 0)
    // Packets that nobody wanted to be told of do not count.
    for _ in 0..<10 { #expect(!published(1, 60_000, isWanted: false) && delay.due == 0) }
    #expect(!published(2, 60_000) && published(1, 60_001))
  }

  @Test func driverWhoseBuffersRunOutIsNotKeptWaiting() {
    var delay = delay(packets: 0, microseconds: 10_000)
    let told = [127, 1].map { delay.published(packets: $0, isWanted: true, most: Self.most, at: 5) }
    #expect(told == [false, true])
  }

  @Test func whatIsOwedIsDueAtOnceWhenTheLimitsChange() {
    var delay = delay(packets: 0, microseconds: 10_000)
    let isTold = delay.published(packets: 1, isWanted: true, most: Self.most, at: 5)
    delay.set(NotificationLimits())
    let isDue = delay.elapsed(at: 6)
    #expect(!isTold && !delay.isOn && isDue)
  }

  /// Any packets at any times, with limits that change among them.
  @Test(arguments: 0..<100) func everyWantedNotificationComesWithinTheLimits(seed: Int) {
    var random = SeededGenerator(seed: UInt64(seed))
    var limits = NotificationLimits(packets: 0, microseconds: 100)
    var delay = delay(packets: 0, microseconds: 100)
    // What a driver is owed: since when, and for how many packets.
    var (now, owedSince, owed) = (UInt64(1), UInt64?.none, UInt64(0))
    func told() {
      #expect(owedSince != nil, "seed \(seed)")
      (owedSince, owed) = (nil, 0)
    }
    for _ in 0..<5000 {
      // The loop comes back at the time that it is asked to.
      let step = UInt64.random(in: 0...80_000, using: &random)
      if delay.due != 0, delay.due <= now + step {
        now = max(now, delay.due)
        let isDue = delay.elapsed(at: now)
        #expect(isDue, "seed \(seed)")
        told()
      } else {
        now += step
      }
      switch Int.random(in: 0..<40, using: &random) {
      case 0:
        limits = NotificationLimits(
          packets: UInt32.random(in: 0...20, using: &random), microseconds: UInt32.random(in: 0...500, using: &random))
        delay.set(limits)
      default:
        let count = UInt64.random(in: 1...16, using: &random)
        let isWanted = Int.random(in: 0..<3, using: &random) > 0
        guard delay.isOn else {
          // As the pump: by the queue itself, beside what is owed of before.
          continue
        }
        if isWanted, owedSince == nil { owedSince = now }
        if owedSince != nil { owed += count }
        if delay.published(packets: count, isWanted: isWanted, most: Self.most, at: now) { told() }
      }
      if let owedSince {
        let isLate = now - owedSince > UInt64(limits.microseconds) * 1000 && delay.due > now
        #expect(!isLate && delay.due != 0, "seed \(seed)")
        #expect(
          !delay.isOn || delay.due == 1 || owed < UInt64(limits.packets == 0 ? 128 : limits.packets), "seed \(seed)")
      } else {
        #expect(delay.due == 0, "seed \(seed)")
      }
    }
  }
}
