import Synchronization
package import Virtqueue

/// The Xenbus transport of one device (deploy/guest-module/PROTOCOL.md): between what the supervisor reads from Xenstore and a
/// `VirtioDevice`. Nothing here traps, waits for the guest, or is called per request.
///
/// `connect`, `disconnect`, `plug`, `unplug` and `write` are called by one thread, the guest's. The device signals from its own.
package final class XenbusTransport: DeviceTransport {
  private let onStatus: @Sendable (DeviceStatus) -> Void
  /// Told that the configuration space or the status is to be published anew, from any thread.
  private let onConfiguration: @Sendable () -> Void
  /// Told, and not come to read yet: telling it again would only make it read the same twice.
  private let isTold = Atomic<Bool>(false)
  package let interruptGauge = Gauge()
  private let session: DriverSession
  /// Confined to the guest's thread, see the type's comment.
  nonisolated(unsafe) private var channels: [QueueSignals?] = [] {
    didSet { boundChannels.set(UInt64(channels.count { $0 != nil })) }
  }
  /// Event channels that are bound.
  package let boundChannels = Gauge()

  /// - Parameters:
  ///   - state: keeps what a later process must know.
  ///   - onStatus: told about the driver's start and reset, from the guest's thread.
  package init(
    device: any VirtioDevice, state: (any TransportState)?, onStatus: @escaping @Sendable (DeviceStatus) -> Void,
    onConfiguration: @escaping @Sendable () -> Void
  ) {
    session = DriverSession(device, state)
    self.onStatus = onStatus
    self.onConfiguration = onConfiguration
  }

  package var identity: DeviceIdentity { session.identity }
  package var currentStatus: DeviceStatus { session.currentStatus }

  /// The `vx-config` node: generation, status and configuration space of one moment.
  package var configurationText: String {
    isTold.store(false, ordering: .sequentiallyConsistent)
    let space = session.configuration
    // The generation first: a change that comes in between makes another text behind this one.
    let generation = space.generation
    let digits = Array("0123456789abcdef")
    var hex = ""
    for byte in space.bytes {
      hex.append(digits[Int(byte >> 4)])
      hex.append(digits[Int(byte & 15)])
    }
    // Of the status, what the driver cannot know.
    let status = currentStatus.intersection(.needsReset)
    return "\(generation) \(String(status.rawValue, radix: 16)) \(hex)"
  }

  // MARK: The driver

  /// Whether a driver may begin with these features; asked before `connect`.
  package func accepts(_ features: FeatureBits) -> Bool { session.accepts(features) }

  /// The driver is ready: its queues are live from now on.
  ///
  /// - Parameters:
  ///   - doorbells: the channel of each queue that is set up.
  ///   - adopts: this life of the device began with an earlier backend or process, and is resumed.
  package func connect(_ setup: XenbusSetup, epoch: UInt32, doorbells: [(any QueueDoorbell)?], adopts: Bool) {
    session.driver.driverFeatures = setup.features.rawValue
    session.driver.epoch = epoch
    session.driver.queues = setup.queues.map { $0?.layout ?? QueueLayout() }
    session.driver.ready = setup.queues.map { $0 != nil }
    channels = doorbells.map { bell in bell.map { QueueSignals($0, self) } }
    session.begin(adopts: adopts)
    let live: DeviceStatus = [.acknowledge, .driver, .featuresOK, .driverOK]
    session.set(live)
    session.save()
    session.activate(self, adopts: adopts)
    onStatus(live)
  }

  /// The driver resets the device, or is gone: when this returns, nothing touches its memory.
  package func disconnect() {
    let old = session.reset()
    channels = []
    if !old.isEmpty { onStatus([]) }
  }

  /// The driver writes to the configuration space.
  package func write(offset: Int, bytes: [UInt8]) {
    session.write(offset: offset, bytes: bytes)
    tell()
  }

  // MARK: Backends

  @discardableResult
  package func plug(_ device: any VirtioDevice) -> Bool {
    let plugged = session.plug(device, self)
    if plugged == .unfit { _ = session.needReset() }
    tell()
    return plugged != .unfit
  }

  package func unplug() { session.unplug() }

  /// Lets go of the channels without telling the driver: a later process binds them again. No backend is plugged in any more.
  package func leave() { channels = [] }

  // MARK: TransportSignals

  package func signals(of queue: Int) -> any TransportSignals {
    guard channels.indices.contains(queue), let channel = channels[queue] else { return self }
    return channel
  }

  /// Queues interrupt by channels of their own.
  package func interruptForUsedBuffers() {}

  package func interruptForConfiguration() { tell() }

  /// A driver can bring changes about faster than they are published.
  private func tell() {
    if !isTold.exchange(true, ordering: .sequentiallyConsistent) { onConfiguration() }
  }

  package func needReset() {
    _ = session.needReset()
    tell()
  }

  /// One queue's signals: a notification of its channel for used buffers, the transport for the rest.
  private final class QueueSignals: TransportSignals {
    private let bell: any QueueDoorbell
    private let transport: XenbusTransport

    init(_ bell: any QueueDoorbell, _ transport: XenbusTransport) {
      self.bell = bell
      self.transport = transport
    }

    var doorbell: (any QueueDoorbell)? { bell }

    func interruptForUsedBuffers() {
      transport.interruptGauge.add(1)
      bell.ring()
    }

    func interruptForConfiguration() { transport.interruptForConfiguration() }
    func needReset() { transport.needReset() }
  }
}
