/// Notices the device or guest that is behind repeated deaths of the daemon: a backend that was in a batch at each of the last deaths starts
/// quarantined, so that what it does to the daemon is not done again for all the others.
///
/// `Key` names a device for as long as its guest lives.
package struct CrashFuse<Key: Hashable & Sendable>: Hashable, Sendable {
  /// Deaths in a row that a backend has to be part of.
  package static var limit: Int { 3 }

  /// Who was in a batch at the last deaths, the latest last. At most `limit` of them.
  package private(set) var deaths: [Set<Key>]

  /// - Parameter deaths: as an earlier daemon left them.
  package init(deaths: [Set<Key>] = []) { self.deaths = Array(deaths.suffix(Self.limit)) }

  /// The daemon before this one died.
  package mutating func noteDeath(inBatch: Set<Key>) {
    deaths = Array((deaths + [inBatch]).suffix(Self.limit))
  }

  /// The daemon ended in good order, or has lived for long enough: nobody is under suspicion.
  package mutating func noteHealth() { deaths = [] }

  /// An operator starts the device all the same.
  package mutating func forgive(_ key: Key) { for index in deaths.indices { deaths[index].remove(key) } }

  /// Why the device is not started; nil for one that may be.
  package func reason(for key: Key) -> String? {
    guard deaths.count >= Self.limit, deaths.allSatisfy({ $0.contains(key) }) else { return nil }
    return "it was serving requests at each of the last \(Self.limit) crashes of vxd"
  }
}
