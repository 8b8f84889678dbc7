import Glibc
import Virtqueue

/// Packets that are copied to the guest from memory of our own: one that its buffers did not suffice for, and all of them where its memory
/// cannot be mapped.
extension NetPump {
  /// How long a packet waits for buffers. Not for ever: a driver may refill its queue only when more of it has been used, and then only
  /// smaller packets can bring that about.
  static var parkingTime: UInt64 { 10_000_000 }

  /// Keeps a packet that lies in the first vectors of what is held, and behind them in the spill.
  mutating func park(_ bytes: Int, _ held: HeldChains, vectorCount: Int, inPlace: Int) {
    var done = 0
    for index in held.firstVector..<held.firstVector &+ vectorCount where done < bytes {
      let count = min(vectors[index].iov_len, bytes &- done)
      if let base = vectors[index].iov_base { (parking + done).copyMemory(from: base, byteCount: count) }
      done &+= count
    }
    if bytes > inPlace { (parking + inPlace).copyMemory(from: spill, byteCount: bytes &- inPlace) }
    parkedBytes = bytes
    parkedUntil = now &+ Self.parkingTime
  }

  /// Delivers the packet that waits, or the tap's next one.
  ///
  /// - Returns: the packet's bytes; 0 when it was dropped; nil when the turn is over, with the reason in `turn`.
  mutating func receiveByCopy(_ left: inout Int, _ turn: inout Turn) throws(VirtqueueFault) -> Int? {
    if parkedBytes == 0 {
      guard receiveQueue.hasPending else {
        turn = .noRoom
        insufficient = 0
        return nil
      }
      vectors[0] = iovec(iov_base: parking, iov_len: spillBytes)
      let result = readTap(vectors, 1)
      guard result != 0 else {
        turn = .empty
        return nil
      }
      left &-= 1
      guard result > 0, isWanted(result, parking) else { return 0 }
      parkedBytes = result
      parkedUntil = now &+ Self.parkingTime
    }
    let bytes = parkedBytes
    switch try copyOut(bytes, &left) {
    case .done:
      parkedBytes = 0
      return bytes
    case .spent: return nil
    case .short where now < parkedUntil:
      turn = .noRoom
      wait(until: parkedUntil)
      return nil
    case .short, .never:
      parkedBytes = 0
      receiveQueue.counters.drops(.badBuffer).add(1)
      return 0
    }
  }

  private enum Copied {
    case done
    /// The driver has not offered enough.
    case short
    /// It never will: its whole ring does not suffice, or a buffer makes no sense.
    case never
    case spent
  }

  /// Copies the parked packet into as many chains as it needs, and gives them to the driver.
  private mutating func copyOut(_ bytes: Int, _ left: inout Int) throws(VirtqueueFault) -> Copied {
    var (taken, done) = (0, 0)
    var outcome = Copied.done
    // Where the count of buffers goes, which is known at the end.
    var places: (UInt64, UInt64) = (0, 0)
    while done < bytes {
      guard merges || taken == 0, taken < Self.chainLimit else {
        outcome = .never
        break
      }
      guard let chain = try receiveQueue.next(&memory, &budget) else {
        outcome = budget.isSpent ? .spent : taken >= receiveQueue.size ? .never : .short
        if case .short = outcome { insufficient = taken }
        break
      }
      let room = Int(clamping: min(chain.writableBytes, 1 << 20))
      window[taken] = ReceiveChain(ticket: chain.ticket, bytes: room)
      taken &+= 1
      var cursor = ChainCursor(chain.writable, count: chain.writableCount)
      if done == 0, room >= Self.leastBytes {
        var probe = cursor
        probe.skip(UInt64(NetConfiguration.bufferCountOffset))
        places = (probe.take(1)?.address ?? 0, probe.take(1)?.address ?? 0)
      }
      let part = min(room, bytes &- done)
      guard chain.readableCount == 0, done > 0 || room >= Self.leastBytes, part > 0,
        (try? cursor.write(&memory, from: parking + done, count: part)) == part
      else {
        // Alone it goes back to the driver, and the packet waits for the next one.
        if taken == 1 {
          receiveQueue.counters.drops(.badBuffer).add(1)
          receiveQueue.use(chain.ticket, length: 0)
          left &-= 1
          taken = 0
          if left > 0 { continue }
          return .spent
        }
        outcome = .never
        break
      }
      done &+= part
    }
    if case .done = outcome {
      var low = UInt8(truncatingIfNeeded: taken)
      var high = UInt8(truncatingIfNeeded: taken >> 8)
      do throws(GuestMemoryFault) {
        try memory.copyOut(from: &low, to: places.0, count: 1)
        try memory.copyOut(from: &high, to: places.1, count: 1)
      } catch {
        outcome = .never
      }
    }
    guard case .done = outcome else {
      while taken > 0 {
        taken &-= 1
        receiveQueue.putBack(window[taken].ticket)
      }
      return outcome
    }
    var rest = bytes
    for index in 0..<taken {
      let part = min(rest, window[index].bytes)
      receiveQueue.use(window[index].ticket, length: UInt32(truncatingIfNeeded: part))
      rest &-= part
    }
    return .done
  }

  /// What came for the driver before this one.
  mutating func emptyTap() {
    parkedBytes = 0
    vectors[0] = iovec(iov_base: spill, iov_len: spillBytes)
    // A tap keeps 500 packets by default (its transmit queue's length).
    for _ in 0..<4096 where readTap(vectors, 1) == 0 { return }
  }
}
