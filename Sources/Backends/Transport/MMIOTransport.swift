import Synchronization
package import Virtqueue

/// One virtio-mmio window (virtio 1.2, 4.2): turns register accesses into calls on a device.
///
/// `read`, `write` and `remove` are called by one thread, the guest's ioreq thread. The device signals from its own.
/// Whatever the guest writes, in whatever order and width, is answered; what makes no sense is ignored.
package final class MMIOTransport: DeviceTransport {
  /// Bytes of a window that are decoded.
  package static let windowSize: UInt64 = 0x200

  /// What the device's life as the guest sees it consists of; enough to go on with it after a restart of the daemon.
  package struct Registers: Equatable, Sendable {
    package var deviceFeaturesSelect: UInt32 = 0
    package var driverFeaturesSelect: UInt32 = 0
    package var driverFeatures: UInt64 = 0
    package var queueSelect: UInt32 = 0
    /// Which life of the device this is, where the transport has numbers for them; 0 elsewhere.
    package var epoch: UInt32 = 0
    package var queues: [QueueLayout] = []
    package var ready: [Bool] = []

    /// The queues as a device wants them: nil where one is not ready.
    var layouts: [QueueLayout?] { zip(queues, ready).map { $1 ? $0 : nil } }

    package init() {}
  }

  package let profile: DeviceProfile
  package let interrupts: InterruptState
  /// Told about each change of the status register, from the ioreq thread.
  private let onStatus: @Sendable (DeviceStatus) -> Void
  private let status = Atomic<UInt32>(0)
  /// Confined to the ioreq thread, see the type's comment.
  nonisolated(unsafe) private var registers = Registers()
  /// The backend; nil while none is there. Confined to the ioreq thread once the transport is in its slot.
  nonisolated(unsafe) private var device: (any VirtioDevice)?
  nonisolated(unsafe) private var configuration: ConfigurationSpace
  private let state: (any TransportState)?

  /// - Parameters:
  ///   - state: keeps the registers for a later process.
  ///   - needsReset: the driver believes the device to be live, and nothing is known of it: it must reset it.
  package init(
    device: any VirtioDevice, line: any InterruptLine, state: (any TransportState)? = nil, needsReset: Bool = false,
    onStatus: @escaping @Sendable (DeviceStatus) -> Void
  ) {
    self.device = device
    self.onStatus = onStatus
    self.state = state
    profile = DeviceProfile(device)
    configuration = device.configuration
    interrupts = InterruptState(line: line)
    clearQueues()
    if needsReset {
      let live: DeviceStatus = [.acknowledge, .driver, .featuresOK, .driverOK, .needsReset]
      status.store(live.rawValue, ordering: .releasing)
    }
    save()
  }

  /// A transport as an earlier process left it, without a backend: registers are answered, queues wait.
  package init(
    restoring profile: DeviceProfile, _ registers: Registers, _ status: DeviceStatus, configuration: [UInt8],
    line: any InterruptLine, state: any TransportState, onStatus: @escaping @Sendable (DeviceStatus) -> Void
  ) {
    self.profile = profile
    self.onStatus = onStatus
    self.state = state
    self.registers = registers
    self.configuration = ConfigurationSpace(configuration)
    interrupts = InterruptState(line: line)
    // The earlier process may have left it high, which nothing here would know.
    line.set(false)
    self.status.store(status.rawValue, ordering: .releasing)
  }

  package var interruptCount: UInt64 { interrupts.raised.load(ordering: .relaxed) }

  package var currentStatus: DeviceStatus { DeviceStatus(rawValue: status.load(ordering: .acquiring)) }

  // MARK: Backends

  /// Puts a backend behind the registers, in the ioreq thread. A device that the driver has started goes on at once, and the driver
  /// is interrupted: what it was told by the backend before may not have reached it.
  ///
  /// - Returns: false when the backend cannot serve what was negotiated; the driver must reset then.
  @discardableResult
  package func plug(_ device: any VirtioDevice) -> Bool {
    let old = configuration.bytes
    if device.configuration !== configuration { device.configuration.follow(configuration) }
    configuration = device.configuration
    self.device = device
    guard currentStatus.contains(.driverOK), !currentStatus.contains(.needsReset) else {
      // A driver that has not begun may have made its choice already.
      if currentStatus.contains(.featuresOK), !currentStatus.contains(.driverOK) {
        device.configurationWritten(offset: 0, bytes: old)
      }
      return true
    }
    let layouts = registers.layouts
    guard profile.goesOn(with: device, features: negotiated, layouts: layouts) else {
      needReset()
      return false
    }
    // What the driver wrote into the space is the driver's choice, which the new backend has to know before it begins.
    device.configurationWritten(offset: 0, bytes: old)
    device.activate(features: negotiated, layouts: layouts, signals: self, adopts: true)
    interrupts.raise([.usedBuffer, .configuration])
    return true
  }

  /// Takes the backend away, in the ioreq thread: it is not called any more, and the driver's requests wait for the next.
  package func unplug() { device = nil }

  private func save() { state?.save(registers, currentStatus, configuration: configuration.bytes) }

  // MARK: Reads

  /// The value of a register. Registers have 32 bits; other widths and unaligned offsets read the part they name.
  package func read(offset: UInt64, width: Int) -> UInt64 {
    if offset >= MMIORegister.configuration {
      return configuration.read(
        offset: Int(truncatingIfNeeded: min(offset &- MMIORegister.configuration, 1 << 20)), width: width)
    }
    let value = register(offset & ~3) >> (8 &* (offset & 3))
    return width >= 8 ? value : value & ((1 << (8 &* UInt64(max(width, 1)))) &- 1)
  }

  private func register(_ offset: UInt64) -> UInt64 {
    switch offset {
    case MMIORegister.magicValue: return MMIORegister.magic
    case MMIORegister.version: return 2
    case MMIORegister.deviceID: return UInt64(profile.deviceID)
    case MMIORegister.vendorID: return MMIORegister.vendor
    case MMIORegister.deviceFeatures:
      let features = profile.offeredFeatures.rawValue
      switch registers.deviceFeaturesSelect {
      case 0: return features & 0xffff_ffff
      case 1: return features >> 32
      default: return 0
      }
    case MMIORegister.queueSizeMaximum: return UInt64(selected.map { profile.queueSizes[$0] } ?? 0)
    case MMIORegister.queueReady: return selected.map { registers.ready[$0] ? 1 : 0 } ?? 0
    case MMIORegister.interruptStatus: return UInt64(interrupts.pending)
    case MMIORegister.status: return UInt64(status.load(ordering: .acquiring))
    case MMIORegister.sharedMemoryFirst...MMIORegister.sharedMemoryLast: return 0xffff_ffff
    case MMIORegister.configurationGeneration: return UInt64(configuration.generation)
    default: return 0
    }
  }

  /// The index of the selected queue, if there is one.
  private var selected: Int? {
    let index = Int(registers.queueSelect)
    return index < registers.queues.count ? index : nil
  }

  // MARK: Writes

  /// Writes a register. Only aligned 32-bit writes reach one; others are dropped, the configuration space excepted.
  package func write(offset: UInt64, width: Int, value: UInt64) {
    if offset >= MMIORegister.configuration {
      let bytes = (0..<min(max(width, 0), 8)).map { UInt8(truncatingIfNeeded: value >> (8 * UInt64($0))) }
      device?.configurationWritten(
        offset: Int(truncatingIfNeeded: min(offset &- MMIORegister.configuration, 1 << 20)), bytes: bytes)
      return save()
    }
    guard width == 4, offset & 3 == 0 else { return }
    let word = UInt32(truncatingIfNeeded: value)
    switch offset {
    case MMIORegister.queueNotify:
      let queue = Int(word & 0xffff)
      guard currentStatus.contains(.driverOK), queue < registers.ready.count, registers.ready[queue] else { return }
      // Without a backend: the next one looks at the queue in any case.
      device?.notify(queue: queue)
      return
    case MMIORegister.interruptAcknowledge: return interrupts.acknowledge(word)
    case MMIORegister.status: return writeStatus(word)
    case MMIORegister.deviceFeaturesSelect: registers.deviceFeaturesSelect = word
    case MMIORegister.driverFeaturesSelect: registers.driverFeaturesSelect = word
    case MMIORegister.driverFeatures: writeDriverFeatures(word)
    case MMIORegister.queueSelect: registers.queueSelect = word
    case MMIORegister.queueReady: writeQueueReady(word)
    case MMIORegister.queueReset:
      guard word & 1 == 1, negotiated.contains(.ringReset), let queue = selected else { return }
      takeDown(queue)
      registers.queues[queue] = QueueLayout()
    default: writeQueue(offset, word)
    }
    save()
  }

  private func writeDriverFeatures(_ word: UInt32) {
    // After FEATURES_OK the set is fixed (virtio 1.2, 2.2.1).
    guard !currentStatus.contains(.featuresOK) else { return }
    switch registers.driverFeaturesSelect {
    case 0: registers.driverFeatures = registers.driverFeatures & ~0xffff_ffff | UInt64(word)
    case 1: registers.driverFeatures = registers.driverFeatures & 0xffff_ffff | UInt64(word) << 32
    default: break
    }
  }

  private func writeQueue(_ offset: UInt64, _ word: UInt32) {
    // A queue that is ready belongs to the device (virtio 1.2, 4.2.2.2).
    guard let queue = selected, !registers.ready[queue] else { return }
    func low(_ value: inout UInt64) { value = value & ~0xffff_ffff | UInt64(word) }
    func high(_ value: inout UInt64) { value = value & 0xffff_ffff | UInt64(word) << 32 }
    switch offset {
    case MMIORegister.queueSize: registers.queues[queue].size = UInt16(exactly: word) ?? 0
    case MMIORegister.descriptorLow: low(&registers.queues[queue].descriptorArea)
    case MMIORegister.descriptorHigh: high(&registers.queues[queue].descriptorArea)
    case MMIORegister.driverLow: low(&registers.queues[queue].driverArea)
    case MMIORegister.driverHigh: high(&registers.queues[queue].driverArea)
    case MMIORegister.deviceLow: low(&registers.queues[queue].deviceArea)
    case MMIORegister.deviceHigh: high(&registers.queues[queue].deviceArea)
    default: break
    }
  }

  private func writeQueueReady(_ word: UInt32) {
    guard let queue = selected else { return }
    guard word & 1 == 1 else { return takeDown(queue) }
    let isLive = currentStatus.contains(.driverOK)
    guard currentStatus.contains(.featuresOK), !registers.ready[queue] else { return }
    // While the device is live, only a queue that was reset may come (virtio 1.2, 2.6.1.2).
    guard !isLive || negotiated.contains(.ringReset) else { return }
    do throws(VirtqueueFault) {
      try registers.queues[queue].validate(
        maximum: profile.queueSizes[queue], packed: negotiated.contains(.ringPacked))
    } catch {
      return
    }
    registers.ready[queue] = true
    guard isLive else { return }
    save()
    device?.enableQueue(queue, layout: registers.queues[queue])
  }

  /// QueueReset, or 0 to QueueReady. Done when the access is answered, so both registers read 0 then (virtio 1.2, 2.6.1.1).
  private func takeDown(_ queue: Int) {
    if registers.ready[queue] && currentStatus.contains(.driverOK) {
      device?.resetQueue(queue)
      state?.endQueue(queue)
    }
    registers.ready[queue] = false
  }

  private var negotiated: FeatureBits { FeatureBits(rawValue: registers.driverFeatures) }

  // MARK: Status

  private func writeStatus(_ word: UInt32) {
    guard word != 0 else { return reset() }
    let old = currentStatus
    var new = DeviceStatus(rawValue: word & 0xff).intersection(.driversBits).union(old)
    if new.contains(.featuresOK), !old.contains(.featuresOK), !featuresAcceptable { new.remove(.featuresOK) }
    if new.contains(.driverOK), !new.contains(.featuresOK) { new.remove(.driverOK) }
    let added = new.subtracting(old)
    status.bitwiseOr(added.rawValue, ordering: .acquiringAndReleasing)
    save()
    if added.contains(.driverOK) { activate() }
    if !added.isEmpty { onStatus(currentStatus) }
  }

  private var featuresAcceptable: Bool {
    let features = negotiated
    // Version 2 of virtio-mmio has no legacy interface: without VERSION_1 there is nothing to agree on.
    return features.isSubset(of: profile.offeredFeatures) && features.contains(.version1)
      && device?.accepts(features) != false
  }

  private func activate() {
    guard let device else { return }
    // It may have come behind FEATURES_OK, in another's place.
    guard profile.goesOn(with: device, features: negotiated, layouts: registers.layouts) else { return needReset() }
    device.activate(features: negotiated, layouts: registers.layouts, signals: self, adopts: false)
  }

  private func reset() {
    let old = currentStatus
    device?.reset()
    for queue in profile.queueSizes.indices { state?.endQueue(queue) }
    state?.forgetDriver()
    interrupts.clear()
    registers = Registers()
    clearQueues()
    status.store(0, ordering: .releasing)
    save()
    if !old.isEmpty { onStatus([]) }
  }

  private func clearQueues() {
    registers.queues = Array(repeating: QueueLayout(), count: profile.queueSizes.count)
    registers.ready = Array(repeating: false, count: profile.queueSizes.count)
  }

  /// The slot loses its device: as a reset, without the guest's asking.
  package func remove() {
    device?.reset()
    device = nil
    interrupts.clear()
  }

  // MARK: TransportSignals

  package func interruptForUsedBuffers() { interrupts.raise(.usedBuffer) }

  package func interruptForConfiguration() { interrupts.raise(.configuration) }

  package func needReset() {
    let (old, _) = status.bitwiseOr(DeviceStatus.needsReset.rawValue, ordering: .acquiringAndReleasing)
    guard DeviceStatus(rawValue: old).contains(.driverOK) else { return }
    interrupts.raise(.configuration)
  }
}
