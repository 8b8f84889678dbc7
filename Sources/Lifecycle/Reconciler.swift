/// Compares what Xenstore and profiles want with what is there. Pure: what it is to know is given to it.
package enum Reconciler {
  /// One device's entry in Xenstore as of one moment.
  package struct Entry: Hashable, Sendable {
    package var state: XenbusState?
    /// The `online` node: false where the toolstack has given the device up.
    package var isOnline: Bool
    /// The frontend's directory is there and names this backend.
    package var hasFrontend: Bool
    /// What describes the device.
    package var description: [String: String]

    /// - Parameter nodes: all nodes of the entry.
    package init(nodes: [String: String], hasFrontend: Bool) {
      state = nodes["state"].flatMap(XenbusState.init(rawValue:))
      isOnline = nodes["online"] != "0"
      self.hasFrontend = hasFrontend
      description = Self.description(nodes)
    }

    /// Without the nodes that tell the device's progress: those are this daemon's own, or change without a change of the device.
    package static func description(_ nodes: [String: String]) -> [String: String] {
      let progress: Set = ["state", "error", "online", "hotplug-status", "vx-offer", "vx-config", "vx-ack"]
      return nodes.filter { !progress.contains($0.key) }
    }
  }

  /// What is there of a device.
  package struct Known: Hashable, Sendable {
    package var isEnding: Bool
    /// The entry as it was when it was looked at last.
    package var description: [String: String]

    package init(isEnding: Bool, description: [String: String]) {
      self.isEnding = isEnding
      self.description = description
    }
  }

  package enum Action: Hashable, Sendable {
    case nothing
    /// A device that nobody knows yet.
    case open
    /// Something for the device that is known.
    case tell(DeviceEvent.EntryChange)
    /// The toolstack waits for the end of a device that is not there: says so.
    case sayClosed
  }

  /// What follows from one entry.
  ///
  /// - Parameters:
  ///   - entry: nil when there is none.
  ///   - known: nil when there is no such device.
  ///   - style: how drivers of the guest take devices.
  package static func action(_ entry: Entry?, _ known: Known?, _ style: BusStyle) -> Action {
    guard let entry else { return known == nil ? .nothing : .tell(.gone) }
    if entry.state == .closing || !entry.isOnline && entry.state != .closed {
      return known == nil ? .sayClosed : .tell(.closing)
    }
    guard let known else {
      // Between two incarnations of a Xenbus device the state is `closed` too.
      let isOver = entry.state == .closed && !(entry.isOnline && style == .handshake)
      return entry.hasFrontend && !isOver ? .open : .nothing
    }
    guard entry.hasFrontend else { return .tell(.abandoned) }
    if entry.state == .closed, !(entry.isOnline && style == .handshake) {
      return known.isEnding ? .nothing : .tell(.gone)
    }
    return entry.description != known.description && !known.isEnding ? .tell(.corrected) : .nothing
  }

  /// What follows from a guest's profile.
  ///
  /// - Parameters:
  ///   - wanted: what the profile declares, in its order.
  ///   - kept: what an earlier daemon served and the guest still uses.
  ///   - known: what is there.
  /// - Returns: devices to be opened. None is closed: a guest keeps what it was created with.
  package static func additions<Key: Hashable>(wanted: [Key], kept: [Key], known: Set<Key>) -> [Key] {
    var seen = known
    return (wanted + kept).filter { seen.insert($0).inserted }
  }

  /// Guests whose devices no entry announces.
  ///
  /// - Parameters:
  ///   - domains: every domain that has a name, with whether its profile declares devices.
  ///   - known: guests that are there, with whether they end already.
  package static func guests<Domain: Hashable>(
    domains: [(domain: Domain, declares: Bool)], known: [(domain: Domain, isEnding: Bool)]
  ) -> (appear: [Domain], vanish: [Domain]) {
    let there = Set(domains.map(\.domain))
    let served = Set(known.map(\.domain))
    return (
      domains.filter { $0.declares && !served.contains($0.domain) }.map(\.domain),
      known.filter { !$0.isEnding && !there.contains($0.domain) }.map(\.domain)
    )
  }
}
