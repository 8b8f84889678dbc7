/// Slows guests that close and open their devices without end, and says less of it. It outlives devices and guests: each round makes new ones.
///
/// `Key` names a device with its domain. Bounded: the key that was quiet for longest gives way to a new one.
package struct ChurnBudget<Key: Hashable & Sendable>: Sendable {
  package enum Verdict: Equatable, Sendable {
    case say
    /// Say it, and that what follows is left out.
    case sayLast
    case silent
  }

  private struct Account {
    var opened: [UInt64] = []
    var newsStart: UInt64 = 0
    var news = 0
    var last: UInt64 = 0
  }

  /// Starts within the window that cost nothing.
  package static var freeStarts: Int { 5 }
  package static var window: UInt64 { 600_000_000_000 }
  /// News of one device within a minute.
  package static var newsLimit: Int { 20 }
  package static var newsWindow: UInt64 { 60_000_000_000 }
  package static var capacity: Int { 4096 }

  private var accounts: [Key: Account] = [:]
  private let policy: RestartPolicy

  /// - Parameter policy: the first and the longest pause.
  package init(_ policy: RestartPolicy = DeviceRules().startRetry) { self.policy = policy }

  package var count: Int { accounts.count }

  /// A device is opened.
  ///
  /// - Returns: the pause before its backend may be started.
  package mutating func pause(for key: Key, at now: Moment) -> Milliseconds {
    var account = account(of: key, now)
    account.opened.removeAll { now.nanoseconds &- $0 > Self.window }
    let surplus = account.opened.count - Self.freeStarts
    // Beyond that the pause is the longest in any case.
    if surplus < 20 { account.opened.append(now.nanoseconds) }
    accounts[key] = account
    return surplus < 0 ? 0 : RestartBudget.pause(policy, tries: surplus, at: now)
  }

  /// Whether news that a guest can bring about at will is said.
  package mutating func verdict(for key: Key, at now: Moment) -> Verdict {
    var account = account(of: key, now)
    if now.nanoseconds &- account.newsStart > Self.newsWindow {
      account.newsStart = now.nanoseconds
      account.news = 0
    }
    account.news = min(account.news + 1, Self.newsLimit + 1)
    accounts[key] = account
    return account.news < Self.newsLimit ? .say : account.news == Self.newsLimit ? .sayLast : .silent
  }

  /// A domain is gone for good: another one may get its number.
  package mutating func forget(where isMeant: (Key) -> Bool) { accounts = accounts.filter { !isMeant($0.key) } }

  private mutating func account(of key: Key, _ now: Moment) -> Account {
    if accounts[key] == nil, accounts.count >= Self.capacity,
      let quietest = accounts.min(by: { $0.value.last < $1.value.last })
    {
      accounts[quietest.key] = nil
    }
    var account = accounts[key] ?? Account(newsStart: now.nanoseconds)
    account.last = now.nanoseconds
    return account
  }
}
