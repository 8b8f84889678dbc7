import Devices
package import Engines
package import EventLoop
package import Lifecycle
import Synchronization
package import Transport
package import Virtqueue

/// A running network device: a tap, and for each queue pair a thread with a pump and a queue of the tap.
package final class NetBackend: DeviceBackend, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: immutable, or made for sharing; see the superclass.

  package let settings: NetSettings
  private let tap: TapDevice
  private let pairs: [DeviceWorker<NetPump>]
  /// 1 while the link is up.
  private let link: Gauge

  /// - Parameter openTap: another way to a tap: a pair of sockets in tests.
  package static func start(
    _ settings: NetSettings, _ context: Context,
    openTap: @escaping @Sendable (NetSettings) throws(TapFault) -> TapDevice = NetBackend.openTap,
    completion: @escaping @Sendable (Result<NetBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    start(
      name: context.name, label: context.label, threads: settings.pairs,
      make: { threads throws(StartFault) in try NetBackend(settings, context, threads, openTap) },
      completion: completion)
  }

  package static func openTap(_ settings: NetSettings) throws(TapFault) -> TapDevice {
    try TapDevice(
      settings.attachment, name: settings.tapName, queues: settings.pairs, mtu: settings.mtu.map { Int($0) })
  }

  private init(
    _ settings: NetSettings, _ context: Context, _ threads: [LoopThread],
    _ openTap: (NetSettings) throws(TapFault) -> TapDevice
  ) throws(StartFault) {
    let tap: TapDevice
    do throws(TapFault) {
      tap = try openTap(settings)
    } catch {
      throw .resource(error.message)
    }
    let identity = DeviceIdentity(
      deviceID: NetConfiguration.deviceID,
      offeredFeatures: settings.offered ?? settings.features(segmentsUDP: tap.segmentsUDP),
      queueSizes: Array(repeating: settings.queueSize, count: 2 * settings.pairs) + [min(settings.queueSize, 64)])
    let state = try context.makeState?(DeviceState.Layout(unjournaled: identity))
    let counters = identity.queueSizes.indices.map { context.account.queue($0).counters }
    let mtu = tap.mtu
    let isLinkUp = state.flatMap { Self.savedLink($0.notes) } ?? settings.isLinkUp
    let configuration = ConfigurationSpace(
      NetConfiguration.bytes(
        mac: settings.mac, status: isLinkUp ? NetConfiguration.statusLinkUp : 0, pairs: settings.pairs,
        mtu: UInt16(clamping: mtu), speed: settings.speed ?? settings.linkName.flatMap(NetworkInterface.speed)))
    let group = PumpGroup()
    let onChoices: @Sendable (NetChoices) -> Bool = { choices in
      guard tap.setOffloads(FeatureBits(rawValue: choices.offloads)) else { return false }
      tap.use(pairs: choices.pairs)
      if let state { choices.save(to: state.notes) }
      Self.set(mac: choices.mac, in: configuration)
      group.tell(choices)
      return true
    }
    var pairs: [DeviceWorker<NetPump>] = []
    for index in 0..<settings.pairs {
      var own = [counters[2 * index], counters[2 * index + 1]]
      if index == 0 { own.append(counters[2 * settings.pairs]) }
      var options = NetPumpSettings(mac: settings.mac)
      options.source.mac = settings.locksMAC ? settings.mac : nil
      options.source.addresses = settings.addresses
      options.source.vlans = settings.vlans
      options.source.mayServe = settings.mayServe
      options.mtu = mtu
      options.pairs = settings.pairs
      let (sizes, final) = (identity.queueSizes, options)
      pairs.append(
        try Self.make { () throws in
          try DeviceWorker(
            NetPump(
              tap: tap.queues[index], source: context.source, counters: own, settings: final,
              rate: context.rate, choices: NetChoices(mac: settings.mac, offloads: 0),
              isLinkUp: isLinkUp,
              onChoices: onChoices,
              onAnnounced: {
                // Where the driver reads a copy of the space, that is to follow.
                if Self.setStatus(configuration, { $0 & ~NetConfiguration.statusAnnounce }) {
                  group.backend?.announceConfiguration()
                }
              }),
            index: index,
            queues: own.enumerated().map {
              // Without several pairs the driver has the control queue where it saw the size of a pair's.
              .init(maximumSize: max(sizes[0], sizes.last ?? 64), counters: $0.element)
            },
            thread: threads[index], source: context.source, report: context.report)
        })
    }
    group.set(others: Array(pairs.dropFirst()))
    var routes = (0..<2 * settings.pairs).map { Route(worker: $0 / 2, queue: $0 % 2) }
    routes.append(Self.controlRoute)
    self.settings = settings
    self.tap = tap
    self.pairs = pairs
    link = Gauge(isLinkUp ? 1 : 0)
    try super.init(
      Components(
        identity: identity, configuration: configuration, mode: "tap \(tap.name)", threads: threads, workers: pairs,
        routes: routes, rate: context.rate, state: state, counters: counters))
    group.set(backend: self)
  }

  private static let controlRoute = Route(worker: 0, queue: 2)

  /// The workers that the first one passes the driver's choices to, and the backend; they do not keep each other.
  private final class PumpGroup: Sendable {
    private struct Member: Sendable {
      weak let worker: DeviceWorker<NetPump>?
      let latest = Latest<NetChoices>()

      init(worker: DeviceWorker<NetPump>) { self.worker = worker }
    }
    private struct WeakBackend: Sendable { weak let backend: NetBackend? }
    private let members = Mutex<[Member]>([])
    private let owner = Mutex(WeakBackend(backend: nil))

    func set(backend: NetBackend) { owner.withLock { $0 = WeakBackend(backend: backend) } }
    var backend: NetBackend? { owner.withLock { $0.backend } }

    func set(others: [DeviceWorker<NetPump>]) { members.withLock { $0 = others.map { Member(worker: $0) } } }

    /// Passes the driver's choices on. A driver may change them faster than the others look: they get the last ones.
    func tell(_ choices: NetChoices) {
      for member in members.withLock({ $0 }) where member.latest.put(choices) {
        member.worker?.change { pump in if let choices = member.latest.take() { pump.set(choices) } }
      }
    }
  }

  // MARK: VirtioDevice, on the guest's thread

  package override func accepts(_ features: FeatureBits) -> Bool { NetConfiguration.accepts(features) }

  /// Without several pairs the control queue is the third (virtio 1.2, 5.1.2).
  package override func route(of queue: Int) -> Route? {
    if !negotiated.contains(.netQueues), queue >= 2 { return queue == 2 ? Self.controlRoute : nil }
    return super.route(of: queue)
  }

  package override func activate(
    features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool
  ) {
    let offloads = features.intersection(.netGuestOffloads)
    let saved = adopts ? state.flatMap { NetChoices(from: $0.notes, maximumPairs: settings.pairs) } : nil
    var allowed = saved ?? NetChoices(mac: settings.mac, offloads: offloads.rawValue)
    allowed.limit(to: features)
    let choices = allowed
    _ = tap.setOffloads(FeatureBits(rawValue: choices.offloads))
    tap.use(pairs: choices.pairs)
    Self.set(mac: choices.mac, in: configuration)
    for pair in pairs { pair.change { $0.set(choices) } }
    super.activate(features: features, layouts: layouts, signals: signals, adopts: adopts)
    // Switches may have forgotten the guest while nobody was there.
    if adopts, features.contains(.netGuestAnnounce) { announce() }
  }

  package override func forgetDriver() {
    _ = tap.setOffloads([])
    tap.use(pairs: 1)
    Self.set(mac: settings.mac, in: configuration)
    let plain = NetChoices(mac: settings.mac, offloads: 0)
    for pair in pairs { pair.change { $0.set(plain) } }
    Self.setStatus(configuration) { $0 & ~NetConfiguration.statusAnnounce }
  }

  package override func retire() {
    if case .created = settings.attachment { tap.retire() }
  }

  // MARK: For operators

  package var interface: String { tap.name }
  package var mtu: Int { tap.mtu }

  package override var isLinkUp: Bool? { link.value != 0 }

  package override var facts: [Reading.Member] {
    [
      .init("mac", .string(settings.mac.text)), .init("link", .choice(link, ["down", "up"])),
      .init("interface", .string(tap.name)), .init("mtu", .mtu(interface: tap.name)),
      .init("queuePairs", .value(.count(settings.pairs))),
    ]
  }

  package override func adjust(_ adjustment: Adjustment, completion: @escaping @Sendable (Adjustment.Outcome) -> Void) {
    guard case .link(let isUp) = adjustment else { return super.adjust(adjustment, completion: completion) }
    set(isLinkUp: isUp)
    completion(.done(isUp ? "up" : "down"))
  }

  /// Plugs the cable in, or pulls it; the driver is told.
  package func set(isLinkUp: Bool) {
    let state = state
    for (index, pair) in pairs.enumerated() {
      pair.change {
        $0.set(isLinkUp: isLinkUp)
        if index == 0, let state { Self.save(isLinkUp: isLinkUp, to: state.notes) }
      }
    }
    Self.setStatus(configuration) {
      isLinkUp ? $0 | NetConfiguration.statusLinkUp : $0 & ~NetConfiguration.statusLinkUp
    }
    link.set(isLinkUp ? 1 : 0)
    announceConfiguration()
  }

  /// Behind the driver's choices: what an operator said of the link outlives backends, daemons and drivers. 0 is nothing, 1 down, 2 up.
  private static func save(isLinkUp: Bool, to notes: UnsafeMutableRawBufferPointer) {
    notes.storeBytes(of: isLinkUp ? 2 : 1, toByteOffset: notes.count - 8, as: UInt64.self)
  }

  private static func savedLink(_ notes: UnsafeMutableRawBufferPointer) -> Bool? {
    let word = notes.load(fromByteOffset: notes.count - 8, as: UInt64.self)
    return word == 1 ? false : word == 2 ? true : nil
  }

  private func announce() { Self.setStatus(configuration) { $0 | NetConfiguration.statusAnnounce } }

  /// - Returns: whether it was another before.
  @discardableResult
  private static func setStatus(_ configuration: ConfigurationSpace, _ change: (UInt16) -> UInt16) -> Bool {
    let old = NetConfiguration.status(configuration.bytes)
    let new = change(old)
    if new != old { configuration.update { NetConfiguration.set(status: new, in: &$0) } }
    return new != old
  }

  /// What the driver made its address is what it reads (virtio 1.2, 5.1.6.5.2).
  private static func set(mac: MACAddress, in configuration: ConfigurationSpace) {
    let bytes = mac.bytes
    guard Array(configuration.bytes.prefix(bytes.count)) != bytes else { return }
    configuration.update { $0.replaceSubrange(0..<bytes.count, with: bytes) }
  }
}
