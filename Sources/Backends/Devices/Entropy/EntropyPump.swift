import Glibc
package import Transport
package import Virtqueue

/// An entropy device (virtio 1.2, 5.4): fills whatever buffers the driver offers with random bytes of the host's kernel.
package struct EntropyPump: DevicePump, ~Copyable {
  package static let deviceID: UInt32 = 4
  package static let features: FeatureBits = [.version1, .indirectDescriptors, .eventIndex, .ringReset]
  /// Buffers of a chain at most.
  private static var chainLimit: Int { 64 }
  /// Chains that are filled before other sources of the thread have their turn.
  private static var batchLimit: Int { 32 }
  /// Bytes of a chain that are filled at most: a driver that offers more gets less, as the length in the used ring says.
  private static var bytesLimit: Int { 65536 }

  private var memory: GuestMemoryView
  private var queue: OrderedQueue
  private let rate: RateNode
  package private(set) var nextTime: UInt64 = 0

  package init(source: any GuestMemorySource, counters: QueueCounters, rate: RateNode) {
    memory = GuestMemoryView(source: source)
    queue = OrderedQueue(chainLimit: Self.chainLimit, counters: counters)
    self.rate = rate
  }

  package mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault) {
    try self.queue.activate(activation)
  }

  package mutating func deactivate(_ queue: Int) {
    self.queue.deactivate()
    nextTime = 0
  }

  package mutating func run(_ signals: borrowing [any TransportSignals]) throws(DeviceFault) -> PumpOutcome {
    guard queue.isActive else { return .idle }
    nextTime = 0
    queue.counters.batchSince.store(MonotonicClock.now, ordering: .relaxed)
    let invalidations = memory.enter()
    defer {
      queue.counters.settle(memory)
      memory.leave()
      queue.counters.batchSince.store(0, ordering: .relaxed)
    }
    do throws(VirtqueueFault) {
      try queue.prepare(invalidations)
      repeat {
        for _ in 0..<Self.batchLimit {
          guard let chain = try queue.next(&memory) else { break }
          let wanted = min(Int(clamping: chain.writableBytes), Self.bytesLimit)
          nextTime = rate.admit(isWrite: false, bytes: UInt64(wanted), at: MonotonicClock.now)
          guard nextTime == 0 else {
            queue.putBack(chain.ticket)
            queue.publish(signals[0])
            return .idle
          }
          rate.release()
          let done = fill(chain, wanted)
          queue.counters.reads.add(1)
          queue.counters.readBytes.add(UInt64(done))
          queue.use(chain.ticket, length: UInt32(done))
        }
        queue.publish(signals[0])
        if queue.hasPending { return .more }
      } while queue.enableNotifications()
    } catch {
      throw .virtqueue(error)
    }
    return .idle
  }

  /// - Returns: bytes from the chain's start on that are random now.
  private mutating func fill(_ chain: DescriptorChain, _ wanted: Int) -> Int {
    var cursor = ChainCursor(chain.writable, count: chain.writableCount)
    var done = 0
    while done < wanted, let run = cursor.take(wanted &- done) {
      var filled = 0
      while filled < Int(run.length) {
        let address = run.address &+ UInt64(filled)
        // A page that is not there ends the answer: the driver is told how far it is good.
        guard let piece = try? memory.translate(address, Int(run.length) &- filled) else { return done }
        // The call's own limit (getentropy(3)).
        let count = min(piece.length, 256)
        guard getentropy(piece.pointer, count) == 0 else { return done }
        filled &+= count
        done &+= count
      }
    }
    return done
  }
}
