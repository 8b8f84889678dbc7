import Virtqueue

/// Who tells Xen which addresses a function claims.
package protocol PCIDecoder: AnyObject {
  /// The function decodes another range from now on. Called on the guest's thread, before the access is answered.
  ///
  /// - Parameter save: notes the change for a later process. To be called when no address is claimed any more that the new range does
  ///   not have, and before one is that the old range did not have: so whatever a process leaves that dies in between, the next one
  ///   finds no claim that it does not know.
  func decode(_ range: ClosedRange<UInt64>?, of transport: PCITransport, save: () -> Void)
}

/// Where a function's own registers are kept for a later process, beside those that every transport has.
package protocol PCITransportState: TransportState {
  func save(_ registers: PCIRegisters)
}

/// One virtio function on the guest's PCI bus (virtio 1.2, 4.1, without the transitional interface): turns accesses to its configuration
/// space and its memory BAR into calls on a device.
///
/// Accesses, `plug`, `unplug` and `remove` come from one thread, the guest's ioreq thread. The device signals from its own. Whatever the
/// guest writes, in whatever order and width, is answered; what makes no sense is ignored.
package final class PCITransport: DeviceTransport {
  package let interrupts: PCIInterrupts
  /// Told about each change of the status register, from the ioreq thread.
  let onStatus: @Sendable (DeviceStatus) -> Void
  let session: DriverSession
  /// The BAR's first address while it is decoded, or 0.
  package let base = Gauge()
  /// 1 where accesses to it come here, 0 where the addresses could not be claimed from Xen.
  package let claimed = Gauge()
  // Confined to the ioreq thread, see the type's comment.
  nonisolated(unsafe) package internal(set) var pci: PCIRegisters
  /// Set when the function is put in its place, on the ioreq thread.
  nonisolated(unsafe) package weak var decoder: (any PCIDecoder)?
  let state: (any PCITransportState)?

  /// - Parameters:
  ///   - state: keeps the registers for a later process.
  ///   - needsReset: the driver believes the device to be live, and nothing is known of it: it must reset it.
  package init(
    device: any VirtioDevice, line: any InterruptLine, sender: any MessageSender,
    state: (any PCITransportState)? = nil, needsReset: Bool = false,
    onStatus: @escaping @Sendable (DeviceStatus) -> Void
  ) {
    session = DriverSession(device, state)
    self.onStatus = onStatus
    self.state = state
    let identity = session.identity
    pci = PCIRegisters(identity)
    interrupts = PCIInterrupts(
      line: line, sender: sender, vectors: PCIRegisters.vectors(identity), queues: identity.queueSizes.count)
    if needsReset { session.add([.acknowledge, .driver, .featuresOK, .driverOK, .needsReset]) }
    interrupts.apply(pci)
    state?.save(pci)
    clearQueues()
  }

  /// A function as an earlier process left it, without a backend: registers are answered, queues wait.
  package init(
    restoring identity: DeviceIdentity, _ driver: DriverState, _ status: DeviceStatus, _ pci: PCIRegisters,
    configuration: [UInt8], line: any InterruptLine, sender: any MessageSender, state: any PCITransportState,
    onStatus: @escaping @Sendable (DeviceStatus) -> Void
  ) {
    session = DriverSession(restoring: identity, driver, status, configuration: configuration, state: state)
    self.onStatus = onStatus
    self.state = state
    self.pci = pci
    interrupts = PCIInterrupts(
      line: line, sender: sender, vectors: PCIRegisters.vectors(identity), queues: identity.queueSizes.count)
    // The earlier process may have left it high, which nothing here would know.
    line.set(false)
    interrupts.apply(pci)
    base.set(pci.function.memory?.lowerBound ?? 0)
  }

  package var interruptGauge: Gauge { interrupts.raised }
  package var identity: DeviceIdentity { session.identity }
  package var currentStatus: DeviceStatus { session.currentStatus }
  /// Whether the addresses that are decoded could be claimed from Xen. Set by the decoder.
  package var isClaimed: Bool {
    get { claimed.value != 0 }
    set { claimed.set(newValue ? 1 : 0) }
  }
  /// MSI-X vectors of the function.
  package var vectorCount: Int { PCIRegisters.vectors(identity) }

  // MARK: The configuration space

  package func readConfiguration(offset: Int, width: Int) -> UInt64 {
    if PCIFunction.touchesWindow(offset, width), let access = pci.function.window.access {
      pci.function.window.data = UInt32(truncatingIfNeeded: read(offset: UInt64(access.offset), width: access.width))
    }
    return pci.function.read(offset, width, isPending: interrupts.line.pending != 0)
  }

  package func writeConfiguration(offset: Int, width: Int, value: UInt64) {
    let old = pci.function
    pci.function.write(offset, width, value)
    if PCIFunction.touchesWindow(offset, width), let access = pci.function.window.access {
      write(offset: UInt64(access.offset), width: access.width, value: UInt64(pci.function.window.data))
    }
    guard pci.function != old else { return }
    if old.isMaster, !pci.function.isMaster { stopMastering(from: old) }
    let range = pci.function.memory
    if let decoder, range != old.memory {
      decoder.decode(range, of: self) { state?.save(pci) }
    } else {
      state?.save(pci)
    }
    base.set(range?.lowerBound ?? 0)
    interrupts.apply(pci)
  }

  /// The driver forbids the function to reach memory, as Linux does before it starts another kernel by kexec: its queues are gone when the
  /// access is answered, as after a reset. One that never had the right is served all the same: not all firmware gives it.
  private func stopMastering(from old: PCIFunction) {
    guard !currentStatus.isEmpty else { return }
    let new = pci.function
    // Until that is done it is not said to be: the next process finds the access not answered, and does it.
    pci.function = old
    reset()
    pci.function = new
  }

  // MARK: The BAR

  /// Reads from the BAR, whose first byte is 0.
  package func read(offset: UInt64, width: Int) -> UInt64 {
    guard let offset = Int(exactly: offset), offset < Int(PCILayout.bytes) else { return .max }
    switch offset {
    case PCILayout.common: return PCIWords.read(offset, width) { commonWord($0) }
    case PCILayout.isr: return UInt64(interrupts.takeISR())
    case PCILayout.device: return session.configuration.read(offset: offset - PCILayout.device.lowerBound, width: width)
    case PCILayout.table: return pci.table.read(offset - PCILayout.table.lowerBound, width)
    case PCILayout.pending:
      return PCIWords.read(offset - PCILayout.pending.lowerBound, width) { interrupts.pendingBits($0) }
    default: return 0
    }
  }

  package func write(offset: UInt64, width: Int, value: UInt64) {
    guard let offset = Int(exactly: offset), offset < Int(PCILayout.bytes) else { return }
    switch offset {
    case PCILayout.notify: notify((offset - PCILayout.notify.lowerBound) / Int(PCILayout.notifyMultiplier))
    case PCILayout.common: writeCommon(offset, width, value)
    case PCILayout.device:
      let bytes = (0..<min(max(width, 0), 8)).map { UInt8(truncatingIfNeeded: value >> (8 * UInt64($0))) }
      session.write(offset: offset - PCILayout.device.lowerBound, bytes: bytes)
    case PCILayout.table:
      guard let entry = pci.table.write(offset - PCILayout.table.lowerBound, width, value) else { return }
      state?.save(pci)
      interrupts.apply(pci, entry: entry)
    default: break
    }
  }

  private func notify(_ queue: Int) {
    guard currentStatus.contains(.driverOK), queue < session.driver.ready.count, session.driver.ready[queue] else {
      return
    }
    // Without a backend: the next one looks at the queue in any case.
    session.device?.notify(queue: queue)
  }

  // MARK: Backends

  @discardableResult
  package func plug(_ device: any VirtioDevice) -> Bool {
    switch session.plug(device, self) {
    case .idle: return true
    case .resumed:
      for queue in session.driver.ready.indices where session.driver.ready[queue] { interrupts.raise(queue: queue) }
      interrupts.raiseConfiguration()
      return true
    case .unfit:
      needReset()
      return false
    }
  }

  package func unplug() { session.unplug() }

  /// The function loses its device: as a reset, without the guest's asking.
  package func remove() {
    session.remove()
    interrupts.clear()
    base.set(0)
  }

  // MARK: TransportSignals

  package func signals(of queue: Int) -> any TransportSignals { QueueSignals(self, queue) }

  /// Queues interrupt by vectors of their own.
  package func interruptForUsedBuffers() {
    for queue in identity.queueSizes.indices { interrupts.raise(queue: queue) }
  }

  package func interruptForConfiguration() { interrupts.raiseConfiguration() }

  package func needReset() {
    if session.needReset() { interrupts.raiseConfiguration() }
  }

  /// One queue's signals: its vector for used buffers, the transport for the rest.
  private final class QueueSignals: TransportSignals {
    private let transport: PCITransport
    private let queue: Int

    init(_ transport: PCITransport, _ queue: Int) {
      self.transport = transport
      self.queue = queue
    }

    func interruptForUsedBuffers() { transport.interrupts.raise(queue: queue) }
    func interruptForConfiguration() { transport.interruptForConfiguration() }
    func needReset() { transport.needReset() }
  }
}
