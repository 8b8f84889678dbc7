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
  private static var batchLimit: Int { 16 }
  /// Bytes of a chain that are filled at most: a driver that offers more gets less, as the length in the used ring says.
  private static var bytesLimit: Int { 65536 }
  /// Bytes of one call of the kernel (getentropy(3)).
  private static var pieceBytes: Int { 256 }

  private var memory: GuestMemoryView
  private var queue: SerialQueue
  private let rate: RateNode
  package private(set) var nextTime: UInt64 = 0
  private let piece: UnsafeMutableRawPointer

  package init(source: any GuestMemorySource, counters: QueueCounters, rate: RateNode) {
    memory = GuestMemoryView(source: source)
    queue = SerialQueue(chainLimit: Self.chainLimit, counters: counters)
    self.rate = rate
    piece = .allocate(byteCount: Self.pieceBytes, alignment: 16)
  }

  deinit { piece.deallocate() }

  package mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault) {
    try self.queue.activate(activation)
  }

  package mutating func deactivate(_ queue: Int) {
    self.queue.deactivate()
    nextTime = 0
  }

  package mutating func run(
    _ signals: borrowing [any TransportSignals], _ budget: inout RunBudget
  ) throws(DeviceFault) -> PumpOutcome {
    guard queue.isActive else { return .idle }
    nextTime = 0
    queue.counters.batchSince.store(MonotonicClock.now, ordering: .relaxed)
    let invalidations = memory.enter()
    defer {
      queue.counters.settle(&memory)
      memory.leave()
      queue.counters.batchSince.store(0, ordering: .relaxed)
    }
    do throws(VirtqueueFault) {
      try queue.prepare(invalidations)
      repeat {
        for _ in 0..<Self.batchLimit {
          guard let chain = try queue.next(&memory, &budget) else { break }
          let wanted = min(Int(clamping: chain.writableBytes), Self.bytesLimit)
          nextTime = rate.admit(isWrite: false, bytes: UInt64(wanted), at: MonotonicClock.now)
          guard nextTime == 0 else {
            queue.putBack(chain.ticket)
            queue.publish(signals[0])
            return .idle
          }
          rate.release()
          budget.pay(bytes: UInt64(wanted))
          let done = fill(chain, wanted)
          queue.counters.reads.add(1)
          queue.counters.readBytes.add(UInt64(done))
          queue.use(chain.ticket, length: UInt32(done))
        }
        queue.publish(signals[0])
        if budget.isSpent || queue.hasPending { return .more }
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
    while done < wanted, let run = cursor.take(min(wanted &- done, Self.pieceBytes)) {
      let count = Int(run.length)
      // A page that is not there ends the answer: the driver is told how far it is good.
      guard getentropy(piece, count) == 0, (try? memory.copyOut(from: piece, to: run.address, count: count)) != nil
      else { return done }
      done &+= count
    }
    return done
  }
}
