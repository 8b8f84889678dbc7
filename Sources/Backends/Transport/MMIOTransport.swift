import Synchronization
import Virtqueue

/// One virtio-mmio window (virtio 1.2, 4.2): turns register accesses into calls on a device.
///
/// `read`, `write` and `remove` are called by one thread, the guest's ioreq thread. The device signals from its own.
/// Whatever the guest writes, in whatever order and width, is answered; what makes no sense is ignored.
package final class MMIOTransport: DeviceTransport {
  /// Bytes of a window that are decoded.
  package static let windowSize: UInt64 = 0x200

  package let interrupts: InterruptState
  /// Told about each change of the status register, from the ioreq thread.
  private let onStatus: @Sendable (DeviceStatus) -> Void
  private let session: DriverSession

  /// - Parameters:
  ///   - state: keeps the registers for a later process.
  ///   - needsReset: the driver believes the device to be live, and nothing is known of it: it must reset it.
  package init(
    device: any VirtioDevice, line: any InterruptLine, state: (any TransportState)? = nil, needsReset: Bool = false,
    onStatus: @escaping @Sendable (DeviceStatus) -> Void
  ) {
    session = DriverSession(device, state)
    self.onStatus = onStatus
    interrupts = InterruptState(line: line)
    if needsReset { session.add([.acknowledge, .driver, .featuresOK, .driverOK, .needsReset]) }
    session.save()
  }

  /// A transport as an earlier process left it, without a backend: registers are answered, queues wait.
  package init(
    restoring identity: DeviceIdentity, _ driver: DriverState, _ status: DeviceStatus, configuration: [UInt8],
    line: any InterruptLine, state: any TransportState, onStatus: @escaping @Sendable (DeviceStatus) -> Void
  ) {
    session = DriverSession(restoring: identity, driver, status, configuration: configuration, state: state)
    self.onStatus = onStatus
    interrupts = InterruptState(line: line)
    // The earlier process may have left it high, which nothing here would know.
    line.set(false)
  }

  package var identity: DeviceIdentity { session.identity }
  package var interruptGauge: Gauge { interrupts.raised }
  package var currentStatus: DeviceStatus { session.currentStatus }

  // MARK: Backends

  /// Puts a backend behind the registers, in the ioreq thread. The driver of a device that is resumed is interrupted: what it was told by
  /// the backend before may not have reached it.
  @discardableResult
  package func plug(_ device: any VirtioDevice) -> Bool {
    switch session.plug(device, self) {
    case .idle: return true
    case .resumed:
      interrupts.raise([.usedBuffer, .configuration])
      return true
    case .unfit:
      needReset()
      return false
    }
  }

  /// Takes the backend away, in the ioreq thread.
  package func unplug() { session.unplug() }

  // MARK: Reads

  /// The value of a register. Registers have 32 bits; other widths and unaligned offsets read the part they name.
  package func read(offset: UInt64, width: Int) -> UInt64 {
    if offset >= MMIORegister.configuration {
      return session.configuration.read(
        offset: Int(truncatingIfNeeded: min(offset &- MMIORegister.configuration, 1 << 20)), width: width)
    }
    let value = register(offset & ~3) >> (8 &* (offset & 3))
    return width >= 8 ? value : value & ((1 << (8 &* UInt64(max(width, 1)))) &- 1)
  }

  private func register(_ offset: UInt64) -> UInt64 {
    switch offset {
    case MMIORegister.magicValue: return MMIORegister.magic
    case MMIORegister.version: return 2
    case MMIORegister.deviceID: return UInt64(identity.deviceID)
    case MMIORegister.vendorID: return MMIORegister.vendor
    case MMIORegister.deviceFeatures:
      let features = identity.offeredFeatures.rawValue
      switch session.driver.deviceFeaturesSelect {
      case 0: return features & 0xffff_ffff
      case 1: return features >> 32
      default: return 0
      }
    case MMIORegister.queueSizeMaximum: return UInt64(selected.map { identity.queueSizes[$0] } ?? 0)
    case MMIORegister.queueReady: return selected.map { session.driver.ready[$0] ? 1 : 0 } ?? 0
    case MMIORegister.interruptStatus: return UInt64(interrupts.pending)
    case MMIORegister.status: return UInt64(currentStatus.rawValue)
    case MMIORegister.sharedMemoryFirst...MMIORegister.sharedMemoryLast: return 0xffff_ffff
    case MMIORegister.configurationGeneration: return UInt64(session.configuration.generation)
    default: return 0
    }
  }

  /// The index of the selected queue, if there is one.
  private var selected: Int? {
    let index = Int(session.driver.queueSelect)
    return index < session.driver.queues.count ? index : nil
  }

  // MARK: Writes

  /// Writes a register. Only aligned 32-bit writes reach one; others are dropped, the configuration space excepted.
  package func write(offset: UInt64, width: Int, value: UInt64) {
    if offset >= MMIORegister.configuration {
      let bytes = (0..<min(max(width, 0), 8)).map { UInt8(truncatingIfNeeded: value >> (8 * UInt64($0))) }
      return session.write(
        offset: Int(truncatingIfNeeded: min(offset &- MMIORegister.configuration, 1 << 20)), bytes: bytes)
    }
    guard width == 4, offset & 3 == 0 else { return }
    let word = UInt32(truncatingIfNeeded: value)
    switch offset {
    case MMIORegister.queueNotify:
      let queue = Int(word & 0xffff)
      guard currentStatus.contains(.driverOK), queue < session.driver.ready.count, session.driver.ready[queue] else {
        return
      }
      // Without a backend: the next one looks at the queue in any case.
      session.device?.notify(queue: queue)
      return
    case MMIORegister.interruptAcknowledge: return interrupts.acknowledge(word)
    case MMIORegister.status: return writeStatus(word)
    case MMIORegister.deviceFeaturesSelect: session.driver.deviceFeaturesSelect = word
    case MMIORegister.driverFeaturesSelect: session.driver.driverFeaturesSelect = word
    case MMIORegister.driverFeatures: writeDriverFeatures(word)
    case MMIORegister.queueSelect: session.driver.queueSelect = word
    case MMIORegister.queueReady: writeQueueReady(word)
    case MMIORegister.queueReset:
      guard word & 1 == 1, negotiated.contains(.ringReset), let queue = selected else { return }
      session.takeDown(queue)
      session.driver.queues[queue] = QueueLayout()
    default: writeQueue(offset, word)
    }
    session.save()
  }

  private func writeDriverFeatures(_ word: UInt32) {
    // After FEATURES_OK the set is fixed (virtio 1.2, 2.2.1).
    guard !currentStatus.contains(.featuresOK) else { return }
    switch session.driver.driverFeaturesSelect {
    case 0: session.driver.driverFeatures = session.driver.driverFeatures & ~0xffff_ffff | UInt64(word)
    case 1: session.driver.driverFeatures = session.driver.driverFeatures & 0xffff_ffff | UInt64(word) << 32
    default: break
    }
  }

  private func writeQueue(_ offset: UInt64, _ word: UInt32) {
    // A queue that is ready belongs to the device (virtio 1.2, 4.2.2.2).
    guard let queue = selected, !session.driver.ready[queue] else { return }
    func low(_ value: inout UInt64) { value = value & ~0xffff_ffff | UInt64(word) }
    func high(_ value: inout UInt64) { value = value & 0xffff_ffff | UInt64(word) << 32 }
    switch offset {
    case MMIORegister.queueSize: session.driver.queues[queue].size = UInt16(exactly: word) ?? 0
    case MMIORegister.descriptorLow: low(&session.driver.queues[queue].descriptorArea)
    case MMIORegister.descriptorHigh: high(&session.driver.queues[queue].descriptorArea)
    case MMIORegister.driverLow: low(&session.driver.queues[queue].driverArea)
    case MMIORegister.driverHigh: high(&session.driver.queues[queue].driverArea)
    case MMIORegister.deviceLow: low(&session.driver.queues[queue].deviceArea)
    case MMIORegister.deviceHigh: high(&session.driver.queues[queue].deviceArea)
    default: break
    }
  }

  /// A queue that is taken down, here or by QueueReset, is so when the access is answered: both registers read 0 then (virtio 1.2, 2.6.1.1).
  private func writeQueueReady(_ word: UInt32) {
    guard let queue = selected else { return }
    guard word & 1 == 1 else { return session.takeDown(queue) }
    let isLive = currentStatus.contains(.driverOK)
    guard currentStatus.contains(.featuresOK), !session.driver.ready[queue] else { return }
    // While the device is live, only a queue that was reset may come (virtio 1.2, 2.6.1.2).
    guard !isLive || negotiated.contains(.ringReset) else { return }
    guard session.isValid(queue: queue) else { return }
    session.driver.ready[queue] = true
    guard isLive else { return }
    session.save()
    session.device?.enableQueue(queue, layout: session.driver.queues[queue])
  }

  private var negotiated: FeatureBits { session.driver.negotiated }

  // MARK: Status

  private func writeStatus(_ word: UInt32) {
    guard word != 0 else { return reset() }
    let old = currentStatus
    var new = DeviceStatus(rawValue: word & 0xff).intersection(.driversBits).union(old)
    if new.contains(.featuresOK), !old.contains(.featuresOK), !session.accepts(negotiated) { new.remove(.featuresOK) }
    if new.contains(.driverOK), !new.contains(.featuresOK) { new.remove(.driverOK) }
    let added = new.subtracting(old)
    session.add(added)
    session.save()
    if added.contains(.driverOK) { session.activate(self, adopts: false) }
    if !added.isEmpty { onStatus(currentStatus) }
  }

  private func reset() {
    let old = session.reset()
    interrupts.clear()
    if !old.isEmpty { onStatus([]) }
  }

  /// The slot loses its device.
  package func remove() {
    session.remove()
    interrupts.clear()
  }

  // MARK: TransportSignals

  package func interruptForUsedBuffers() { interrupts.raise(.usedBuffer) }

  package func interruptForConfiguration() { interrupts.raise(.configuration) }

  package func needReset() {
    if session.needReset() { interrupts.raise(.configuration) }
  }
}
