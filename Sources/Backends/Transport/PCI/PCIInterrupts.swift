import Synchronization

/// Sends interrupts as messages. From any thread.
package protocol MessageSender: AnyObject, Sendable {
  func send(_ message: MSIMessage)
}

/// How a virtio function interrupts its driver (virtio 1.2, 4.1.4.5 and 4.1.5.1.2): by MSI-X, a vector for each queue and one for the
/// configuration, or by the pin INTA with the ISR register while MSI-X is off.
///
/// `raise` may be called by any thread; the rest belongs to the guest's thread.
package final class PCIInterrupts: Sendable {
  /// The ISR register and the pin.
  let line: InterruptState
  private let sender: any MessageSender
  private let vectors: [MSIXVector]
  /// The vector of the configuration, then that of each queue.
  private let assignments: [Assignment]
  private let isEnabled = Atomic<Bool>(false)
  /// How often the guest was interrupted, and how often by a message.
  package let raised = Gauge()
  package let sent = Gauge()

  private final class Assignment: Sendable {
    let vector = Atomic<UInt16>(PCILayout.noVector)
  }

  init(line: any InterruptLine, sender: any MessageSender, vectors: Int, queues: Int) {
    self.line = InterruptState(line: line)
    self.sender = sender
    self.vectors = (0..<vectors).map { _ in MSIXVector() }
    assignments = (0...queues).map { _ in Assignment() }
  }

  // MARK: Raising

  func raiseConfiguration() { raise(0, .configuration) }

  /// - Parameter queue: below the number of queues.
  func raise(queue: Int) { raise(queue + 1, .usedBuffer) }

  private func raise(_ source: Int, _ cause: InterruptCause) {
    raised.add(1)
    guard isEnabled.load(ordering: .acquiring) else { return line.raise(cause) }
    let number = Int(assignments[source].vector.load(ordering: .acquiring))
    // A source without a vector interrupts nobody: its driver polls.
    guard number < vectors.count else { return }
    switch vectors[number].raise() {
    case .send(let message): send(message)
    case .pending: break
    // Turned off between the two looks.
    case .off: line.raise(cause)
    }
  }

  private func send(_ message: MSIMessage) {
    sent.add(1)
    sender.send(message)
  }

  // MARK: Changes

  /// Makes everything what the registers say.
  func apply(_ registers: PCIRegisters) {
    let function = registers.function
    line.set(enabled: !function.isMSIXEnabled && !function.isINTxDisabled)
    isEnabled.store(function.isMSIXEnabled, ordering: .releasing)
    for (assignment, vector) in zip(assignments, [registers.configurationVector] + registers.queueVectors) {
      assignment.vector.store(vector, ordering: .releasing)
    }
    for index in vectors.indices { apply(registers, entry: index) }
  }

  /// Makes one vector what the registers say.
  func apply(_ registers: PCIRegisters, entry index: Int) {
    let function = registers.function
    let due = vectors[index].set(
      registers.table.entries[index], isMasked: function.isMSIXMasked, isOff: !function.isMSIXEnabled)
    if let due { send(due) }
    // What waits for a vector that is turned off goes by the pin.
    if !function.isMSIXEnabled, vectors[index].clear() { line.raise([.usedBuffer, .configuration]) }
  }

  /// The device is reset or gone: nothing is pending any more.
  func clear() {
    for vector in vectors { vector.clear() }
    line.clear()
  }

  /// The ISR register: reading takes the causes and lowers the pin.
  func takeISR() -> UInt32 {
    let causes = line.pending
    line.acknowledge(causes)
    return causes
  }

  /// 32 of the pending bits.
  func pendingBits(_ word: Int) -> UInt32 {
    var bits: UInt32 = 0
    for bit in 0..<32 where vectors.indices.contains(32 * word + bit) && vectors[32 * word + bit].isPending {
      bits |= 1 << UInt32(bit)
    }
    return bits
  }
}
