import Glibc
import Transport
import Virtqueue

/// From the guest to the tap.
extension NetPump {
  /// Sends what the driver made available.
  mutating func transmit(_ signals: any TransportSignals) throws(VirtqueueFault) -> Turn {
    guard transmitQueue.isActive else { return .empty }
    var left = Self.batchLimit
    var (packets, bytes): (UInt64, UInt64) = (0, 0)
    // Once for the batch: counters are objects.
    defer {
      if packets > 0 {
        idle.works()
        transmitQueue.counters.writes.add(packets)
        transmitQueue.counters.writtenBytes.add(bytes)
      }
    }
    while left > 0 {
      let first = left
      for _ in 0..<min(left, Self.groupLimit) {
        guard let chain = try transmitQueue.next(&memory, &budget) else {
          publishSent(first &- left, signals)
          return .empty
        }
        let time = isLimited ? rate.delay(isWrite: true, at: now) : 0
        guard time == 0 else {
          // The guest's own queue is where packets wait.
          transmitQueue.putBack(chain.ticket)
          publishSent(first &- left, signals)
          wait(until: time)
          return .limited
        }
        if let reason = send(chain) {
          transmitQueue.counters.drops(reason).add(1)
          // It cost as much of the thread: who sends what is dropped is held to the rate too.
          if isLimited { rate.pay(isWrite: true, bytes: 0, at: now) }
        } else {
          guard goneResult == 0 else {
            transmitQueue.putBack(chain.ticket)
            return .empty
          }
          let frame = chain.readableBytes &- UInt64(NetConfiguration.headerBytes)
          packets &+= 1
          bytes &+= frame
          budget.pay(bytes: frame)
          if isLimited { rate.pay(isWrite: true, bytes: frame, at: now) }
        }
        transmitQueue.use(chain.ticket, length: 0)
        left &-= 1
      }
      publishSent(first &- left, signals)
    }
    return transmitQueue.hasPending ? .more : .empty
  }

  /// - Returns: why the packet was dropped; nil when it was sent.
  private mutating func send(_ chain: DescriptorChain) -> DropReason? {
    let header = NetConfiguration.headerBytes
    guard chain.writableCount == 0, chain.readableBytes >= UInt64(header + 14),
      chain.readableBytes <= UInt64(header + NetConfiguration.largeBytes)
    else { return .malformed }
    guard isLinkUp else { return .linkDown }
    let total = Int(chain.readableBytes)
    // Headers are checked and sent from a copy: in the guest's memory they could change in between.
    let copied = min(total, header + SourceLock.headBytes)
    var cursor = ChainCursor(chain.buffers, count: chain.readableCount)
    guard (try? cursor.read(&memory, to: head, count: copied)) == copied else { return .badBuffer }
    guard rules.allows(head, frameBytes: total &- header) else { return .malformed }
    if let reason = lock.refuses(head + header, copied &- header) { return reason }
    vectors[0] = iovec(iov_base: head, iov_len: copied)
    var count = gather(&cursor, total &- copied, from: 1) ?? 0
    if count == 0 {
      // Where the guest's memory cannot be mapped, and only there, by way of ours.
      guard copies, total &- copied <= spillBytes else { return .badBuffer }
      cursor = ChainCursor(chain.buffers, count: chain.readableCount)
      cursor.skip(UInt64(copied))
      guard (try? cursor.read(&memory, to: spill, count: total &- copied)) == total &- copied else { return .badBuffer }
      vectors[1] = iovec(iov_base: spill, iov_len: total &- copied)
      count = 2
    }
    while true {
      if writev(tap, vectors, Int32(truncatingIfNeeded: count)) >= 0 { break }
      switch errno {
      case EINTR: continue
      case EIO, ENETDOWN: return .linkDown
      case EINVAL, EMSGSIZE: return .malformed
      case EBADFD, ENODEV, ENXIO:
        goneResult = -Int(ENODEV)
        return nil
      default: return .host
      }
    }
    return nil
  }

  /// Puts what the cursor is on into the vectors from an index on.
  ///
  /// - Returns: how many vectors there are then; nil when a part is not in the guest's memory, or in too many pieces.
  mutating func gather(_ cursor: inout ChainCursor, _ bytes: Int, from first: Int) -> Int? {
    var count = first
    var done = 0
    while done < bytes, let run = cursor.take(bytes &- done) {
      var offset = 0
      while offset < Int(run.length) {
        guard count < Self.vectorLimit else { return nil }
        let piece: (pointer: UnsafeMutableRawPointer, length: Int)
        do throws(GuestMemoryFault) {
          piece = try memory.translate(run.address &+ UInt64(offset), Int(run.length) &- offset)
        } catch {
          if error == .mappingFailed { copies = true }
          return nil
        }
        vectors[count] = iovec(iov_base: piece.pointer, iov_len: piece.length)
        count &+= 1
        offset &+= piece.length
      }
      done &+= Int(run.length)
    }
    return done == bytes ? count : nil
  }
}
