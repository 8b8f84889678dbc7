package import Transport
package import Virtqueue

/// A virtqueue whose chains are answered in the order in which they were made available, and of which nothing is kept between batches.
///
/// The used index in the ring alone then says where another backend or process goes on, so such a device needs no journal: what was
/// taken and not answered is taken again. For split rings, which is what devices built on it offer.
package struct SerialQueue: ~Copyable {
  package let counters: QueueCounters
  /// The driver's queue while it is live. In a place of its own: what is in an optional is copied out and back for each call.
  private let queue: UnsafeMutablePointer<Virtqueue>
  private let chainLimit: Int
  private let buffers: UnsafeMutablePointer<GuestBuffer>

  /// - Parameter chainLimit: buffers of a chain at most; a longer one is the driver's fault.
  package init(chainLimit: Int, counters: QueueCounters) {
    self.chainLimit = chainLimit
    self.counters = counters
    buffers = .allocate(capacity: chainLimit)
    queue = .allocate(capacity: 1)
  }

  deinit {
    if size > 0 { queue.deinitialize(count: 1) }
    queue.deallocate()
    buffers.deallocate()
  }

  package var isActive: Bool { size > 0 }

  /// Entries of the driver's ring; 0 while it is not live.
  package private(set) var size = 0

  // MARK: Life

  package mutating func activate(_ activation: QueueActivation) throws(DeviceFault) {
    deactivate()
    do throws(VirtqueueFault) {
      queue.initialize(
        to: try Virtqueue(
          layout: activation.layout, maximumSize: activation.maximumSize, chainLimit: chainLimit,
          features: activation.features, source: activation.source, continuesFromRing: activation.adopts))
    } catch {
      throw .virtqueue(error)
    }
    size = Int(activation.layout.size)
  }

  package mutating func deactivate() {
    guard size > 0 else { return }
    queue.deinitialize(count: 1)
    size = 0
  }

  // MARK: A batch

  /// Makes the rings usable for a batch, see `Virtqueue.prepare`; before every other call of it.
  package mutating func prepare(_ invalidations: UInt64) throws(VirtqueueFault) {
    guard size > 0 else { return }
    try queue.pointee.prepare(invalidations: invalidations)
    queue.pointee.disableNotifications()
  }

  /// Takes the next chain; its buffers are good until the next call.
  ///
  /// - Returns: nil when none waits, or the budget is spent, which it then says.
  package mutating func next(
    _ memory: inout GuestMemoryView, _ budget: inout RunBudget
  ) throws(VirtqueueFault) -> DescriptorChain? {
    guard size > 0, queue.pointee.hasPending(), memory.missesInBatch < RunBudget.misses else {
      if size > 0, memory.missesInBatch >= RunBudget.misses { budget.spend() }
      return nil
    }
    guard budget.takeChain() else { return nil }
    var chain = DescriptorChain(buffers: buffers)
    return try queue.pointee.next(memory: &memory, into: &chain) ? chain : nil
  }

  /// Puts the chain that was taken last back; several in the reverse of their order.
  package mutating func putBack(_ ticket: ChainTicket) {
    guard size > 0 else { return }
    queue.pointee.putBack(ticket)
  }

  /// Gives the oldest chain back to the driver, with the bytes that were written into it.
  package mutating func use(_ ticket: ChainTicket, length: UInt32) {
    guard size > 0 else { return }
    queue.pointee.pushUsed(ticket, length: length)
  }

  /// Publishes what was used, and interrupts the driver if it wants that.
  package mutating func publish(_ signals: any TransportSignals) {
    guard size > 0, queue.pointee.hasUnpublished else { return }
    if queue.pointee.publish() {
      counters.interrupts.add(1)
      signals.interruptForUsedBuffers()
    } else {
      counters.interruptsSuppressed.add(1)
    }
  }

  /// Publishes what was used, and tells nobody.
  ///
  /// - Returns: whether the driver wants to be interrupted for it, which is then the caller's to do (`interrupt`).
  package mutating func publishQuietly() -> Bool {
    guard size > 0, queue.pointee.hasUnpublished else { return false }
    let isWanted = queue.pointee.publish()
    if !isWanted { counters.interruptsSuppressed.add(1) }
    return isWanted
  }

  /// Interrupts the driver for what `publishQuietly` published.
  package mutating func interrupt(_ signals: any TransportSignals) {
    counters.interrupts.add(1)
    signals.interruptForUsedBuffers()
  }

  /// Whether chains wait.
  package var hasPending: Bool { mutating get { size > 0 && queue.pointee.hasPending() } }

  /// Chains that the driver says wait: up to 65535, whatever the size of its ring.
  package var pendingCount: Int { mutating get { size > 0 ? queue.pointee.pendingCount() : 0 } }

  /// Ends a batch: asks for a notification of the next chain.
  ///
  /// - Returns: whether chains came meanwhile.
  package mutating func enableNotifications() -> Bool { size > 0 && queue.pointee.enableNotifications() }

  /// The same for a batch that ended with chains that do not suffice: asks for a notification of one behind them.
  package mutating func enableNotifications(behind known: Int) -> Bool {
    size > 0 && queue.pointee.enableNotifications(behind: known)
  }
}
