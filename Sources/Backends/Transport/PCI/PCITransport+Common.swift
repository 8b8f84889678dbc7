import Virtqueue

/// The common configuration structure (virtio 1.2, 4.1.4.3): features, status, queues. On the ioreq thread.
extension PCITransport {
  /// A word of the structure, by its number.
  func commonWord(_ index: Int) -> UInt32 {
    let queue = selected
    let layout = queue.map { session.driver.queues[$0] }
    func low(_ address: UInt64?) -> UInt32 { UInt32(truncatingIfNeeded: address ?? 0) }
    func high(_ address: UInt64?) -> UInt32 { UInt32(truncatingIfNeeded: (address ?? 0) >> 32) }
    switch index * 4 {
    case PCICommon.deviceFeatureSelect: return session.driver.deviceFeaturesSelect
    case PCICommon.deviceFeature: return half(identity.offeredFeatures.rawValue, session.driver.deviceFeaturesSelect)
    case PCICommon.driverFeatureSelect: return session.driver.driverFeaturesSelect
    case PCICommon.driverFeature: return half(session.driver.driverFeatures, session.driver.driverFeaturesSelect)
    case PCICommon.configurationVector:
      return UInt32(pci.configurationVector) | UInt32(identity.queueSizes.count) << 16
    case PCICommon.status:
      return currentStatus.rawValue & 0xff | (session.configuration.generation & 0xff) << 8 | session.driver.queueSelect
        << 16
    case PCICommon.queueSize:
      return UInt32(layout?.size ?? 0) | UInt32(queue.map { pci.queueVectors[$0] } ?? PCILayout.noVector) << 16
    case PCICommon.queueEnable:
      return (queue.map { session.driver.ready[$0] } == true ? 1 : 0) | UInt32(queue ?? 0) << 16
    case PCICommon.queueDescriptors: return low(layout?.descriptorArea)
    case PCICommon.queueDescriptors + 4: return high(layout?.descriptorArea)
    case PCICommon.queueDriver: return low(layout?.driverArea)
    case PCICommon.queueDriver + 4: return high(layout?.driverArea)
    case PCICommon.queueDevice: return low(layout?.deviceArea)
    case PCICommon.queueDevice + 4: return high(layout?.deviceArea)
    // The doorbell takes the queue's number; a queue is reset when its access is answered, so queue_reset reads 0.
    case PCICommon.queueNotifyData: return UInt32(queue ?? 0)
    default: return 0
    }
  }

  private func half(_ features: UInt64, _ select: UInt32) -> UInt32 {
    select > 1 ? 0 : UInt32(truncatingIfNeeded: features >> UInt64(32 * select))
  }

  /// The index of the selected queue, if there is one.
  private var selected: Int? {
    let index = Int(session.driver.queueSelect)
    return index < session.driver.queues.count ? index : nil
  }

  private var negotiated: FeatureBits { session.driver.negotiated }

  /// Writes a field. Only accesses of a field's own width reach it (4.1.3.1); 64-bit fields are written whole or by halves.
  func writeCommon(_ offset: Int, _ width: Int, _ value: UInt64) {
    if width == 8, (PCICommon.queueDescriptors..<PCICommon.queueNotifyData).contains(offset), offset & 7 == 0 {
      writeAddress(offset, UInt32(truncatingIfNeeded: value))
      writeAddress(offset + 4, UInt32(truncatingIfNeeded: value >> 32))
      return session.save()
    }
    let word = UInt32(truncatingIfNeeded: value)
    let small = UInt16(truncatingIfNeeded: value)
    switch (offset, width) {
    case (PCICommon.status, 1): return writeStatus(word & 0xff)
    case (PCICommon.deviceFeatureSelect, 4): session.driver.deviceFeaturesSelect = word
    case (PCICommon.driverFeatureSelect, 4): session.driver.driverFeaturesSelect = word
    case (PCICommon.driverFeature, 4): writeDriverFeatures(word)
    case (PCICommon.configurationVector, 2): assign { $0.configurationVector = $0.assignable(small) }
    case (PCICommon.queueSelect, 2): session.driver.queueSelect = UInt32(small)
    case (PCICommon.queueSize, 2):
      if let queue = selected, !session.driver.ready[queue] { session.driver.queues[queue].size = small }
    case (PCICommon.queueVector, 2):
      if let queue = selected { assign { $0.queueVectors[queue] = $0.assignable(small) } }
    case (PCICommon.queueEnable, 2):
      // A driver cannot take a queue back this way (4.1.4.3.2).
      if small == 1 { enableQueue() }
    case (PCICommon.queueReset, 2): if small == 1 { resetQueue() }
    case (PCICommon.queueDescriptors..<PCICommon.queueNotifyData, 4): writeAddress(offset, word)
    default: return
    }
    session.save()
  }

  private func assign(_ change: (inout PCIRegisters) -> Void) {
    change(&pci)
    state?.save(pci)
    interrupts.apply(pci)
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

  private func writeAddress(_ offset: Int, _ word: UInt32) {
    // A queue that is enabled belongs to the device (4.1.4.3.2).
    guard let queue = selected, !session.driver.ready[queue], offset & 3 == 0 else { return }
    func set(_ address: inout UInt64) {
      address =
        offset & 4 == 0 ? address & ~0xffff_ffff | UInt64(word) : address & 0xffff_ffff | UInt64(word) << 32
    }
    switch offset & ~7 {
    case PCICommon.queueDescriptors: set(&session.driver.queues[queue].descriptorArea)
    case PCICommon.queueDriver: set(&session.driver.queues[queue].driverArea)
    case PCICommon.queueDevice: set(&session.driver.queues[queue].deviceArea)
    default: break
    }
  }

  private func enableQueue() {
    guard let queue = selected, currentStatus.contains(.featuresOK), !session.driver.ready[queue] else { return }
    let isLive = currentStatus.contains(.driverOK)
    // While the device is live, only a queue that was reset may come (virtio 1.2, 2.6.1.2).
    guard !isLive || negotiated.contains(.ringReset) else { return }
    guard session.isValid(queue: queue) else { return }
    session.driver.ready[queue] = true
    guard isLive else { return }
    session.save()
    session.device?.enableQueue(queue, layout: session.driver.queues[queue])
  }

  /// Done when the access is answered: queue_reset and queue_enable read 0 then, as after the end of the reset (virtio 1.2, 2.6.1.1).
  private func resetQueue() {
    guard negotiated.contains(.ringReset), let queue = selected else { return }
    session.takeDown(queue)
    session.driver.queues[queue] = Self.unusedQueue(identity.queueSizes[queue])
  }

  /// The size of a queue reads as the largest one until the driver has written another (4.1.4.3.1).
  private static func unusedQueue(_ size: UInt16) -> QueueLayout {
    var layout = QueueLayout()
    layout.size = size
    return layout
  }

  func clearQueues() {
    session.driver.queues = identity.queueSizes.map { Self.unusedQueue($0) }
    session.save()
  }

  // MARK: Status

  private func writeStatus(_ word: UInt32) {
    guard word != 0 else { return reset() }
    let old = currentStatus
    var new = DeviceStatus(rawValue: word).intersection(.driversBits).union(old)
    if new.contains(.featuresOK), !old.contains(.featuresOK), !session.accepts(negotiated) { new.remove(.featuresOK) }
    if new.contains(.driverOK), !new.contains(.featuresOK) { new.remove(.driverOK) }
    let added = new.subtracting(old)
    session.add(added)
    session.save()
    if added.contains(.driverOK) { session.activate(self, adopts: false) }
    if !added.isEmpty { onStatus(currentStatus) }
  }

  /// Everything but the configuration space and the MSI-X table, which are the bus driver's.
  func reset() {
    let old = session.reset()
    interrupts.clear()
    pci.clearVectors()
    interrupts.apply(pci)
    state?.save(pci)
    clearQueues()
    if !old.isEmpty { onStatus([]) }
  }
}
