import Synchronization
import Virtqueue

/// A device between its driver and its backends, whatever the driver reaches it by: what was negotiated, the status, which backend is
/// there, and what a later process must know of it. A transport has one and adds how all that is said to the guest.
///
/// Called by one thread, the guest's, but for the status and the configuration space, which any thread may read.
final class DriverSession: Sendable {
  /// What became of a backend that was plugged in.
  enum Plugged {
    /// No driver is at work.
    case idle
    /// The driver's requests are served again.
    case resumed
    /// The backend cannot serve what was negotiated: the driver must reset the device.
    case unfit
  }

  let identity: DeviceIdentity
  private let status = Atomic<UInt32>(0)
  private let space: Mutex<ConfigurationSpace>
  private let state: (any TransportState)?
  /// Confined to the guest's thread, see the type's comment.
  nonisolated(unsafe) var driver: DriverState
  /// The backend; nil while none is there. Confined to the guest's thread once the transport is in its place.
  nonisolated(unsafe) private(set) var device: (any VirtioDevice)?
  /// Waits for a backend that was taken away and may still be in a batch. Confined as above.
  nonisolated(unsafe) private var untilStopped: (@Sendable () -> Void)?

  /// A device that no driver has touched.
  ///
  /// - Parameter state: keeps what a later process must know.
  init(_ device: any VirtioDevice, _ state: (any TransportState)?) {
    self.device = device
    self.state = state
    identity = DeviceIdentity(device)
    space = Mutex(device.configuration)
    driver = DriverState(queueCount: identity.queueSizes.count)
  }

  /// As an earlier process left it, without a backend.
  init(
    restoring identity: DeviceIdentity, _ driver: DriverState, _ status: DeviceStatus, configuration: [UInt8],
    state: any TransportState
  ) {
    self.identity = identity
    self.driver = driver
    self.state = state
    space = Mutex(ConfigurationSpace(configuration, behind: driver.generation))
    self.status.store(status.rawValue, ordering: .releasing)
  }

  // MARK: What is known

  var currentStatus: DeviceStatus { DeviceStatus(rawValue: status.load(ordering: .acquiring)) }
  var configuration: ConfigurationSpace { space.withLock { $0 } }
  private var isServed: Bool { currentStatus.contains(.driverOK) && !currentStatus.contains(.needsReset) }

  /// Writes down what a later process must know.
  func save() {
    let space = configuration
    // The number first: a change that comes in between has another.
    driver.generation = space.generation
    state?.save(driver, currentStatus, configuration: space.bytes)
  }

  // MARK: The driver

  /// Whether a driver may begin with these features (virtio 1.2, 3.1.1): a part of what is offered, without the legacy interface, and a set
  /// that makes sense to the device.
  func accepts(_ features: FeatureBits) -> Bool {
    features.isSubset(of: identity.offeredFeatures) && features.contains(.version1)
      && device?.accepts(features) != false
  }

  /// Whether the queue may go live with the layout that it has.
  func isValid(queue: Int) -> Bool {
    do throws(VirtqueueFault) {
      try driver.queues[queue].validate(
        maximum: identity.queueSizes[queue], packed: driver.negotiated.contains(.ringPacked))
      return true
    } catch {
      return false
    }
  }

  /// Another life begins.
  func set(_ new: DeviceStatus) { status.store(new.rawValue, ordering: .releasing) }

  func add(_ bits: DeviceStatus) { status.bitwiseOr(bits.rawValue, ordering: .acquiringAndReleasing) }

  /// DRIVER_OK: the queues that are ready are live from now on.
  func activate(_ signals: any TransportSignals, adopts: Bool) {
    guard let device else { return }
    // It may have come behind FEATURES_OK, in another's place.
    guard identity.goesOn(with: device, features: driver.negotiated, layouts: driver.layouts) else {
      return signals.needReset()
    }
    device.activate(features: driver.negotiated, layouts: driver.layouts, signals: signals, adopts: adopts)
  }

  /// A driver comes with all that it chose at once: a new one, or one that an earlier process served.
  func begin(adopts: Bool) {
    if adopts {
      // As an earlier process left it; the driver does not write it again.
      if let state { device?.configurationWritten(offset: 0, bytes: state.savedConfiguration) }
    } else {
      endJournals()
      state?.forgetDriver()
    }
  }

  /// The driver writes to the configuration space.
  func write(offset: Int, bytes: [UInt8]) {
    device?.configurationWritten(offset: offset, bytes: bytes)
    save()
  }

  /// The driver takes one queue down; when this returns, its memory is not touched any more.
  func takeDown(_ queue: Int) {
    if driver.ready[queue], currentStatus.contains(.driverOK) {
      device?.resetQueue(queue)
      untilStopped?()
      state?.endQueue(queue)
    }
    driver.ready[queue] = false
  }

  /// What queues have in their journals is of another life.
  func endJournals() { for queue in identity.queueSizes.indices { state?.endQueue(queue) } }

  /// The driver resets the device, or is gone: when this returns, nothing touches its memory.
  ///
  /// - Returns: the status before.
  func reset() -> DeviceStatus {
    device?.reset()
    untilStopped?()
    endJournals()
    state?.forgetDriver()
    driver = DriverState(queueCount: identity.queueSizes.count)
    let old = status.exchange(0, ordering: .acquiringAndReleasing)
    save()
    return DeviceStatus(rawValue: old)
  }

  /// Sets DEVICE_NEEDS_RESET, on any thread.
  ///
  /// - Returns: whether a driver is at work, which is to be told.
  func needReset() -> Bool {
    let (old, _) = status.bitwiseOr(DeviceStatus.needsReset.rawValue, ordering: .acquiringAndReleasing)
    return DeviceStatus(rawValue: old).contains(.driverOK)
  }

  // MARK: Backends

  /// Puts a backend behind the transport; a device that the driver has started is resumed at once.
  func plug(_ device: any VirtioDevice, _ signals: any TransportSignals) -> Plugged {
    let earlier = configuration
    let old = earlier.bytes
    if device.configuration !== earlier { device.configuration.follow(earlier) }
    space.withLock { $0 = device.configuration }
    self.device = device
    untilStopped = nil
    guard isServed else {
      // A driver that has not begun may have made its choice already.
      if currentStatus.contains(.featuresOK), !currentStatus.contains(.driverOK) {
        device.configurationWritten(offset: 0, bytes: old)
      }
      return .idle
    }
    guard identity.goesOn(with: device, features: driver.negotiated, layouts: driver.layouts) else { return .unfit }
    // Before it begins: what the driver chose holds from the first request on.
    device.configurationWritten(offset: 0, bytes: old)
    activate(signals, adopts: true)
    return .resumed
  }

  /// Takes the backend away: it is not called any more, and the driver's requests wait for the next. Who calls stops it: a driver that
  /// resets meanwhile waits for that.
  func unplug() {
    if let device { untilStopped = device.untilStopped }
    device = nil
  }

  /// The place loses its device: as a reset, without the guest's asking.
  func remove() {
    device?.reset()
    device = nil
  }
}
