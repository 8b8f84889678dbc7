package import Transport
package import Virtqueue

/// A virtqueue whose chains are answered in the order in which they were made available, and of which nothing is kept between batches.
///
/// The used index in the ring alone then says where another backend or process goes on, so such a device needs no journal: what was
/// taken and not answered is taken again. For split rings, which is what devices built on it offer.
package struct OrderedQueue: ~Copyable {
  package let counters: QueueCounters
  /// The driver's queue while it is live.
  private var queue: Virtqueue?
  private let chainLimit: Int
  private let buffers: UnsafeMutablePointer<GuestBuffer>

  /// - Parameter chainLimit: buffers of a chain at most; a longer one is the driver's fault.
  package init(chainLimit: Int, counters: QueueCounters) {
    self.chainLimit = chainLimit
    self.counters = counters
    buffers = .allocate(capacity: chainLimit)
  }

  deinit { buffers.deallocate() }

  package var isActive: Bool { size > 0 }

  /// Entries of the driver's ring; 0 while it is not live.
  package private(set) var size = 0

  // MARK: Life

  package mutating func activate(_ activation: QueueActivation) throws(DeviceFault) {
    do throws(VirtqueueFault) {
      queue = try Virtqueue(
        layout: activation.layout, maximumSize: activation.maximumSize, chainLimit: chainLimit,
        features: activation.features, source: activation.source, continuesFromRing: activation.adopts)
    } catch {
      throw .virtqueue(error)
    }
    size = Int(activation.layout.size)
  }

  package mutating func deactivate() {
    queue = nil
    size = 0
  }

  // MARK: A batch

  /// Makes the rings usable for a batch, see `Virtqueue.prepare`; before every other call of it.
  package mutating func prepare(_ invalidations: UInt64) throws(VirtqueueFault) {
    try queue?.prepare(invalidations: invalidations)
    queue?.disableNotifications()
  }

  /// Takes the next chain; its buffers are good until the next call.
  package mutating func next(_ memory: inout GuestMemoryView) throws(VirtqueueFault) -> DescriptorChain? {
    var chain = DescriptorChain(buffers: buffers)
    return try queue?.next(memory: &memory, into: &chain) == true ? chain : nil
  }

  /// Puts the chain that was taken last back; several in the reverse of their order.
  package mutating func putBack(_ ticket: ChainTicket) { queue?.putBack(ticket) }

  /// Gives the oldest chain back to the driver, with the bytes that were written into it.
  package mutating func use(_ ticket: ChainTicket, length: UInt32) { queue?.pushUsed(ticket, length: length) }

  /// Publishes what was used, and interrupts the driver if it wants that.
  package mutating func publish(_ signals: any TransportSignals) {
    guard queue?.hasUnpublished == true else { return }
    if queue?.publish() == true {
      counters.interrupts.add(1)
      signals.interruptForUsedBuffers()
    } else {
      counters.interruptsSuppressed.add(1)
    }
  }

  /// Whether chains wait.
  package var hasPending: Bool { mutating get { queue?.hasPending() == true } }

  /// Ends a batch: asks for a notification of the next chain.
  ///
  /// - Returns: whether chains came meanwhile.
  package mutating func enableNotifications() -> Bool { queue?.enableNotifications() == true }

  /// The same for a batch that ended with chains that do not suffice: asks for a notification of one behind them.
  package mutating func enableNotifications(behind known: Int) -> Bool {
    queue?.enableNotifications(behind: known) == true
  }
}
