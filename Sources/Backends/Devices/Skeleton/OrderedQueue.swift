package import Transport
package import Virtqueue

/// A virtqueue whose chains are answered in the order in which they were made available, and of which nothing is kept between batches.
///
/// The used index in the ring alone then says where another backend or process goes on, so such a device needs no journal: what was
/// taken and not answered is taken again. For split rings, which is what devices built on it offer.
package struct OrderedQueue: ~Copyable {
  package let counters: QueueCounters
  /// Whether the driver's queue is live.
  package private(set) var isActive = false
  private var queue: Virtqueue
  private let chainLimit: Int
  private let buffers: UnsafeMutablePointer<GuestBuffer>

  /// - Parameter chainLimit: buffers of a chain at most; a longer one is the driver's fault.
  package init(chainLimit: Int, source: any GuestMemorySource, counters: QueueCounters) throws(VirtqueueFault) {
    self.chainLimit = chainLimit
    self.counters = counters
    var unused = QueueLayout()
    unused.size = 1
    queue = try Virtqueue(layout: unused, maximumSize: 1, chainLimit: 1, features: [], source: source)
    buffers = .allocate(capacity: chainLimit)
  }

  deinit { buffers.deallocate() }

  /// Entries of the driver's ring.
  package var size: Int { isActive ? Int(queue.layout.size) : 0 }

  // MARK: Life

  package mutating func activate(_ activation: QueueActivation) throws(DeviceFault) {
    do throws(VirtqueueFault) {
      queue = try Virtqueue(
        layout: activation.layout, maximumSize: activation.maximumSize, chainLimit: chainLimit,
        features: activation.features, source: activation.source, continuesFromRing: activation.adopts)
    } catch {
      throw .virtqueue(error)
    }
    isActive = true
  }

  package mutating func deactivate() {
    isActive = false
    queue.forgetRings()
  }

  // MARK: A batch

  /// Makes the rings usable for a batch, see `Virtqueue.prepare`; before every other call of it.
  package mutating func prepare(_ invalidations: UInt64) throws(VirtqueueFault) {
    guard isActive else { return }
    try queue.prepare(invalidations: invalidations)
    queue.disableNotifications()
  }

  /// Takes the next chain; its buffers are good until the next call.
  package mutating func next(_ memory: inout GuestMemoryView) throws(VirtqueueFault) -> DescriptorChain? {
    guard isActive else { return nil }
    var chain = DescriptorChain(buffers: buffers)
    return try queue.next(memory: &memory, into: &chain) ? chain : nil
  }

  /// Puts the chain that was taken last back; several in the reverse of their order.
  package mutating func putBack(_ ticket: ChainTicket) { queue.putBack(ticket) }

  /// Gives the oldest chain back to the driver, with the bytes that were written into it.
  package mutating func use(_ ticket: ChainTicket, length: UInt32) { queue.pushUsed(ticket, length: length) }

  /// Publishes what was used, and interrupts the driver if it wants that.
  package mutating func publish(_ signals: any TransportSignals) {
    guard isActive, queue.hasUnpublished else { return }
    if queue.publish() {
      counters.interrupts.add(1)
      signals.interruptForUsedBuffers()
    } else {
      counters.interruptsSuppressed.add(1)
    }
  }

  /// Whether chains wait.
  package var hasPending: Bool { isActive && queue.hasPending() }

  /// Ends a batch: asks for a notification of the next chain.
  ///
  /// - Returns: whether chains came meanwhile.
  package mutating func enableNotifications() -> Bool { isActive && queue.enableNotifications() }
}
