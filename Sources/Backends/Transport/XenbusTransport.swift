import Synchronization
import Virtqueue

/// The Xenbus transport of one device (deploy/guest-module/PROTOCOL.md): between what the supervisor reads from Xenstore and a
/// `VirtioDevice`. Nothing here traps, waits for the guest, or is called per request.
///
/// `connect`, `disconnect`, `plug`, `unplug` and `write` are called by one thread, the guest's. The device signals from its own.
package final class XenbusTransport: DeviceTransport {
  package let profile: DeviceProfile
  private let onStatus: @Sendable (DeviceStatus) -> Void
  /// Told that the configuration space or the status is to be published anew, from any thread.
  private let onConfiguration: @Sendable () -> Void
  /// Told, and not come to read yet: telling it again would only make it read the same twice.
  private let isTold = Atomic<Bool>(false)
  private let status = Atomic<UInt32>(0)
  private let interrupts = Atomic<UInt64>(0)
  private let state: (any TransportState)?
  /// Confined to the guest's thread, see the type's comment.
  nonisolated(unsafe) private var registers = MMIOTransport.Registers()
  nonisolated(unsafe) private var channels: [QueueSignals?] = [] {
    didSet { bound.store(channels.count { $0 != nil }, ordering: .relaxed) }
  }
  private let bound = Atomic<Int>(0)
  nonisolated(unsafe) private var device: (any VirtioDevice)?
  private let space: Mutex<ConfigurationSpace>

  /// - Parameters:
  ///   - state: keeps what a later process must know.
  ///   - onStatus: told about the driver's start and reset, from the guest's thread.
  package init(
    device: any VirtioDevice, state: (any TransportState)?, onStatus: @escaping @Sendable (DeviceStatus) -> Void,
    onConfiguration: @escaping @Sendable () -> Void
  ) {
    self.device = device
    self.state = state
    self.onStatus = onStatus
    self.onConfiguration = onConfiguration
    profile = DeviceProfile(device)
    space = Mutex(device.configuration)
  }

  package var currentStatus: DeviceStatus { DeviceStatus(rawValue: status.load(ordering: .acquiring)) }
  /// Event channels that are bound.
  package var channelCount: Int { bound.load(ordering: .relaxed) }
  package var interruptCount: UInt64 { interrupts.load(ordering: .relaxed) }
  private var configuration: ConfigurationSpace { space.withLock { $0 } }

  /// The `vx-config` node: generation, status and configuration space of one moment.
  package var configurationText: String {
    isTold.store(false, ordering: .sequentiallyConsistent)
    let space = configuration
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

  /// The driver is ready: its queues are live from now on.
  ///
  /// - Parameters:
  ///   - doorbells: the channel of each queue that is set up.
  ///   - adopts: this life of the device began with an earlier backend or process, and goes on.
  package func connect(_ setup: XenbusSetup, epoch: UInt32, doorbells: [(any QueueDoorbell)?], adopts: Bool) {
    registers.driverFeatures = setup.features.rawValue
    registers.epoch = epoch
    registers.queues = setup.queues.map { $0?.layout ?? QueueLayout() }
    registers.ready = setup.queues.map { $0 != nil }
    channels = doorbells.map { bell in bell.map { QueueSignals($0, self) } }
    if adopts {
      // As an earlier process left it; the driver does not write it again.
      if let state { device?.configurationWritten(offset: 0, bytes: state.savedConfiguration) }
    } else {
      endJournals()
      state?.forgetDriver()
    }
    let live: DeviceStatus = [.acknowledge, .driver, .featuresOK, .driverOK]
    status.store(live.rawValue, ordering: .releasing)
    save()
    device?.activate(features: setup.features, layouts: registers.layouts, signals: self, adopts: adopts)
    onStatus(live)
  }

  /// The driver resets the device, or is gone: when this returns, nothing touches its memory.
  package func disconnect() {
    device?.reset()
    endJournals()
    state?.forgetDriver()
    channels = []
    registers = MMIOTransport.Registers()
    let old = DeviceStatus(rawValue: status.exchange(0, ordering: .acquiringAndReleasing))
    save()
    if !old.isEmpty { onStatus([]) }
  }

  /// The driver writes to the configuration space.
  package func write(offset: Int, bytes: [UInt8]) {
    device?.configurationWritten(offset: offset, bytes: bytes)
    save()
    tell()
  }

  private func endJournals() { for queue in registers.queues.indices { state?.endQueue(queue) } }

  private func save() { state?.save(registers, currentStatus, configuration: configuration.bytes) }

  // MARK: Backends

  @discardableResult
  package func plug(_ device: any VirtioDevice) -> Bool {
    let earlier = configuration
    let old = earlier.bytes
    if device.configuration !== earlier { device.configuration.follow(earlier) }
    space.withLock { $0 = device.configuration }
    self.device = device
    defer { tell() }
    guard currentStatus.contains(.driverOK), !currentStatus.contains(.needsReset) else { return true }
    let features = FeatureBits(rawValue: registers.driverFeatures)
    let layouts = registers.layouts
    guard profile.goesOn(with: device, features: features, layouts: layouts) else {
      needReset()
      return false
    }
    // Before it begins: what the driver chose holds from the first request on.
    device.configurationWritten(offset: 0, bytes: old)
    device.activate(features: features, layouts: layouts, signals: self, adopts: true)
    return true
  }

  package func unplug() { device = nil }

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
    status.bitwiseOr(DeviceStatus.needsReset.rawValue, ordering: .acquiringAndReleasing)
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
      transport.interrupts.wrappingAdd(1, ordering: .relaxed)
      bell.ring()
    }

    func interruptForConfiguration() { transport.interruptForConfiguration() }
    func needReset() { transport.needReset() }
  }
}
