package import Lifecycle
import Synchronization

/// One node of the tree of limits: daemon, guest or device. A request needs the word of its device's node and of all above.
///
/// Rates are kept by the generic cell rate algorithm in its debt form: each bucket is the time up to which its rate is used up. A
/// request goes through while that lies in the past, and moves it on by what it costs, so the long-run rate is exact whatever the
/// sizes. Nodes are shared by data threads without a lock: two requests that pass at the same moment both pay.
package final class RateNode: Sendable {
  private struct Bucket: ~Copyable {
    /// Units a second; 0 is no limit.
    let rate = Atomic<UInt64>(0)
    /// Monotonic nanoseconds.
    let usedUpTo = Atomic<UInt64>(0)
  }

  private let parent: RateNode?
  private let readOperations = Bucket()
  private let writeOperations = Bucket()
  private let readBytes = Bucket()
  private let writeBytes = Bucket()
  private let burst = Atomic<UInt64>(100_000_000)
  private let inFlightLimit = Atomic<UInt64>(0)
  private let inFlight = Atomic<UInt64>(0)
  private let hasLimits = Atomic<Bool>(false)

  package init(parent: RateNode? = nil) { self.parent = parent }

  /// Whether a request has to ask at all: read once a batch.
  package var isLimited: Bool { hasLimits.load(ordering: .relaxed) || parent?.isLimited == true }

  /// Takes new limits, for requests from now on.
  package func set(_ limits: RateLimits) {
    readOperations.rate.store(limits.readOperations ?? 0, ordering: .relaxed)
    writeOperations.rate.store(limits.writeOperations ?? 0, ordering: .relaxed)
    readBytes.rate.store(limits.readBytes ?? 0, ordering: .relaxed)
    writeBytes.rate.store(limits.writeBytes ?? 0, ordering: .relaxed)
    burst.store(max(1, limits.burstMilliseconds) &* 1_000_000, ordering: .relaxed)
    inFlightLimit.store(limits.inFlight ?? 0, ordering: .relaxed)
    hasLimits.store(!limits.isEmpty, ordering: .relaxed)
  }

  /// Asks for a request.
  ///
  /// - Returns: 0 when it may go (`release` gives its place back when it ends); else when to ask again, in monotonic nanoseconds.
  package func admit(isWrite: Bool, bytes: UInt64, at now: UInt64) -> UInt64 {
    var time: UInt64 = 0
    var node: RateNode? = self
    while let current = node {
      time = max(time, current.wait(isWrite, now))
      node = current.parent
    }
    guard time == 0 else { return time }
    node = self
    while let current = node {
      current.charge(isWrite, bytes, now)
      node = current.parent
    }
    return 0
  }

  /// When something that has no end of its own, a packet, may go: 0 for now, else when to ask again, in monotonic nanoseconds.
  package func delay(isWrite: Bool, at now: UInt64) -> UInt64 {
    var time: UInt64 = 0
    var node: RateNode? = self
    while let current = node {
      if current.hasLimits.load(ordering: .relaxed) { time = max(time, current.waitForRate(isWrite, now)) }
      node = current.parent
    }
    return time
  }

  /// It went, and this is what it was.
  package func pay(isWrite: Bool, bytes: UInt64, at now: UInt64) {
    var node: RateNode? = self
    while let current = node {
      if current.hasLimits.load(ordering: .relaxed) { current.chargeRate(isWrite, bytes, now) }
      node = current.parent
    }
  }

  /// A request that was admitted has ended.
  package func release() {
    inFlight.wrappingSubtract(1, ordering: .relaxed)
    parent?.release()
  }

  private func wait(_ isWrite: Bool, _ now: UInt64) -> UInt64 {
    guard hasLimits.load(ordering: .relaxed) else { return 0 }
    let most = inFlightLimit.load(ordering: .relaxed)
    // Whose request ends next is not known: look again in a millisecond, or at a completion of the same queue.
    if most > 0, inFlight.load(ordering: .relaxed) >= most { return now &+ 1_000_000 }
    return waitForRate(isWrite, now)
  }

  private func waitForRate(_ isWrite: Bool, _ now: UInt64) -> UInt64 {
    let first = isWrite ? Self.wait(writeOperations, now) : Self.wait(readOperations, now)
    let second = isWrite ? Self.wait(writeBytes, now) : Self.wait(readBytes, now)
    return max(first, second)
  }

  private static func wait(_ bucket: borrowing Bucket, _ now: UInt64) -> UInt64 {
    guard bucket.rate.load(ordering: .relaxed) > 0 else { return 0 }
    let time = bucket.usedUpTo.load(ordering: .relaxed)
    return time > now ? time : 0
  }

  private func charge(_ isWrite: Bool, _ bytes: UInt64, _ now: UInt64) {
    inFlight.wrappingAdd(1, ordering: .relaxed)
    guard hasLimits.load(ordering: .relaxed) else { return }
    chargeRate(isWrite, bytes, now)
  }

  private func chargeRate(_ isWrite: Bool, _ bytes: UInt64, _ now: UInt64) {
    let credit = burst.load(ordering: .relaxed)
    if isWrite {
      Self.charge(writeOperations, 1, now, credit)
      Self.charge(writeBytes, bytes, now, credit)
    } else {
      Self.charge(readOperations, 1, now, credit)
      Self.charge(readBytes, bytes, now, credit)
    }
  }

  private static func charge(_ bucket: borrowing Bucket, _ units: UInt64, _ now: UInt64, _ credit: UInt64) {
    let rate = bucket.rate.load(ordering: .relaxed)
    guard rate > 0 else { return }
    let product = units.multipliedFullWidth(by: 1_000_000_000)
    let cost = product.high < rate ? rate.dividingFullWidth(product).quotient : UInt64.max >> 1
    var old = bucket.usedUpTo.load(ordering: .relaxed)
    while true {
      let start = max(old, now > credit ? now &- credit : 0)
      let (exchanged, seen) = bucket.usedUpTo.weakCompareExchange(
        expected: old, desired: start &+ min(cost, 3_600_000_000_000), ordering: .relaxed)
      if exchanged { return }
      old = seen
    }
  }
}
