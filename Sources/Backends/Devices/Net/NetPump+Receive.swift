import Glibc
import Transport
import Virtqueue

/// From the tap to the guest.
extension NetPump {
  /// Receives what the tap has, into as many buffers as a packet needs where the driver merges them.
  mutating func receive(_ signals: any TransportSignals) throws(VirtqueueFault) -> Turn {
    guard receiveQueue.isActive else { return .empty }
    var held = HeldChains()
    var left = Self.batchLimit
    var turn = Turn.more
    var (packets, bytes): (UInt64, UInt64) = (0, 0)
    receiving: while left > 0 {
      let time = isLimited ? rate.delay(isWrite: false, at: now) : 0
      guard time == 0 else {
        wait(until: time)
        turn = .limited
        break
      }
      switch try gatherRoom(&held, &left) {
      case .ready: break
      case .badBuffers: break receiving
      case .short:
        turn = .noRoom
        insufficient = held.count
        break receiving
      }
      let result = readPacket(held)
      guard result > 0 else {
        turn = .empty
        break
      }
      left &-= 1
      expectedBytes = max(result, expectedBytes &- expectedBytes >> 3)
      if result > held.bytes {
        guard try unspill(result &- held.bytes, &held) else {
          receiveQueue.counters.drops(.badBuffer).add(1)
          continue
        }
      }
      guard isWanted(result, held) else { continue }
      deliver(result, &held)
      let frame = UInt64(result &- NetConfiguration.headerBytes)
      packets &+= 1
      bytes &+= frame
      if isLimited { rate.pay(isWrite: false, bytes: frame, at: now) }
      if left % Self.groupLimit == 0 { receiveQueue.publish(signals) }
    }
    while held.count > 0 {
      held.count &-= 1
      receiveQueue.putBack(window[held.first &+ held.count].ticket)
    }
    // Once for the batch: counters are objects.
    if packets > 0 {
      receiveQueue.counters.reads.add(packets)
      receiveQueue.counters.readBytes.add(bytes)
    }
    receiveQueue.publish(signals)
    return turn
  }

  // MARK: Room

  /// Where in the window and in the vectors the chains are that were taken and not given back.
  private struct HeldChains {
    var first = 0
    var count = 0
    var bytes = 0
    var firstVector = 0
    var vectorCount = 0
    /// Bytes that the next packet may have beyond them.
    var spill = 0
  }

  private enum Room {
    case ready
    /// The driver has to offer more first.
    case short
    /// The batch went by with buffers that were none.
    case badBuffers
  }

  /// Takes chains until there is room for the next packet.
  ///
  /// A packet may be as large as 64 KiB, and most are much smaller. Where the driver merges buffers, those are taken that the expected
  /// packet fits into; what is larger goes to memory of our own behind them and is copied, if the driver has offered enough for it.
  private mutating func gatherRoom(_ held: inout HeldChains, _ left: inout Int) throws(VirtqueueFault) -> Room {
    held.spill = 0
    guard merges else { return try hold(largestPacket, &held, &left) }
    let expected = min(largestPacket, expectedBytes)
    let room = try hold(expected, &held, &left)
    guard case .ready = room, held.bytes < largestPacket else { return room }
    if held.bytes >= expected, held.vectorCount < Self.vectorLimit {
      // How large the others are is guessed by the last one: drivers offer buffers of one size at a time.
      let size = window[held.first &+ held.count &- 1].bytes
      if receiveQueue.pendingCount &* size >= largestPacket &- held.bytes {
        held.spill = largestPacket &- held.bytes
        return .ready
      }
    }
    return try hold(largestPacket, &held, &left)
  }

  /// Takes chains until those that are held have so many bytes.
  private mutating func hold(
    _ target: Int, _ held: inout HeldChains, _ left: inout Int
  ) throws(VirtqueueFault) -> Room {
    // A ring that is smaller than the largest packet serves those that fit.
    let most = merges ? min(receiveQueue.size, Self.chainLimit) : 1
    while held.bytes < target, held.count < most {
      guard let chain = try receiveQueue.next(&memory) else { return .short }
      if take(chain, &held, merges ? NetConfiguration.headerBytes : largestPacket) { continue }
      // A buffer that nothing fits into, or that is not there, or in more pieces than there are vectors left: what is held before it has
      // to do. Alone it goes back to the driver.
      guard held.count == 0 else {
        receiveQueue.putBack(chain.ticket)
        return .ready
      }
      receiveQueue.counters.drops(.badBuffer).add(1)
      receiveQueue.use(chain.ticket, length: 0)
      left &-= 1
      guard left > 0 else { return .badBuffers }
    }
    return .ready
  }

  /// Copies what of a packet lies in the spill into further chains.
  ///
  /// - Returns: false when the driver's buffers turn out not to suffice.
  private mutating func unspill(_ bytes: Int, _ held: inout HeldChains) throws(VirtqueueFault) -> Bool {
    var done = 0
    while done < bytes {
      guard let chain = try receiveQueue.next(&memory) else { return false }
      let known = held.vectorCount
      guard take(chain, &held, NetConfiguration.headerBytes) else {
        receiveQueue.putBack(chain.ticket)
        return false
      }
      for index in held.firstVector &+ known..<held.firstVector &+ held.vectorCount where done < bytes {
        let count = min(vectors[index].iov_len, bytes &- done)
        vectors[index].iov_base?.copyMemory(from: spill + done, byteCount: count)
        done &+= count
      }
    }
    return true
  }

  /// Makes a chain the last of those that are held.
  ///
  /// - Returns: whether there is room for it, and it can take at least `least` bytes.
  private mutating func take(_ chain: DescriptorChain, _ held: inout HeldChains, _ least: Int) -> Bool {
    let bytes = Int(clamping: min(chain.writableBytes, 1 << 20))
    guard held.count < Self.chainLimit, chain.readableCount == 0, bytes >= least else { return false }
    // Now and then, rather than for each packet. A driver whose chains are in very many pieces has them moved more often.
    if held.first &+ held.count == Self.chainLimit { moveToFront(&held) }
    var end = gather(chain, bytes, from: held.firstVector &+ held.vectorCount)
    if end == nil, held.firstVector > 0 {
      moveToFront(&held)
      end = gather(chain, bytes, from: held.vectorCount)
    }
    guard let end else { return false }
    let pieces = end &- held.firstVector &- held.vectorCount
    window[held.first &+ held.count] = ReceiveChain(ticket: chain.ticket, bytes: bytes, vectorCount: pieces)
    held.count &+= 1
    held.bytes &+= bytes
    held.vectorCount &+= pieces
    return true
  }

  private mutating func gather(_ chain: DescriptorChain, _ bytes: Int, from first: Int) -> Int? {
    var cursor = ChainCursor(chain.writable, count: chain.writableCount)
    return gather(&cursor, bytes, from: first)
  }

  private func moveToFront(_ held: inout HeldChains) {
    window.update(from: window + held.first, count: held.count)
    vectors.update(from: vectors + held.firstVector, count: held.vectorCount)
    held.first = 0
    held.firstVector = 0
  }

  /// - Returns: bytes of the next packet with its header; 0 when there is none.
  private mutating func readPacket(_ held: HeldChains) -> Int {
    var count = held.vectorCount
    if held.spill > 0 {
      vectors[held.firstVector &+ count] = iovec(iov_base: spill, iov_len: held.spill)
      count &+= 1
    }
    while true {
      let result = readv(tap, vectors + held.firstVector, Int32(truncatingIfNeeded: count))
      if result >= 0 { return result }
      switch errno {
      case EINTR: continue
      case EBADFD, ENODEV, ENXIO, EIO:
        // A tap whose interface was deleted says so for ever.
        if errno != EIO { goneResult = -Int(ENODEV) }
        return 0
      default: return 0
      }
    }
  }

  /// Whether a packet that has been read is for the guest.
  private func isWanted(_ bytes: Int, _ held: HeldChains) -> Bool {
    guard bytes >= NetConfiguration.headerBytes + 14 else {
      receiveQueue.counters.drops(.malformed).add(1)
      return false
    }
    guard isLinkUp else {
      receiveQueue.counters.drops(.linkDown).add(1)
      return false
    }
    let start = NetConfiguration.headerBytes
    let type = number(start + 12, 2, held)
    let vlan = type == 0x8100 && bytes >= start + 18 ? Int(number(start + 14, 2, held) & 4095) : -1
    guard filter.passes(number(start, 6, held), vlan: vlan) else {
      receiveQueue.counters.drops(.filtered).add(1)
      return false
    }
    return true
  }

  /// A number in network order at a place of the packet, wherever its buffers begin and end.
  private func number(_ offset: Int, _ bytes: Int, _ held: HeldChains) -> UInt64 {
    let first = vectors[held.firstVector]
    if first.iov_len >= offset &+ bytes, let base = first.iov_base {
      return SourceLock.number(UnsafeRawPointer(base), offset, bytes)
    }
    var value: UInt64 = 0
    for index in 0..<bytes { value = value << 8 | UInt64(byte(offset &+ index, held)?.pointee ?? 0) }
    return value
  }

  private func byte(_ offset: Int, _ held: HeldChains) -> UnsafeMutablePointer<UInt8>? {
    var rest = offset
    for index in held.firstVector..<held.firstVector &+ held.vectorCount {
      if rest < vectors[index].iov_len {
        return vectors[index].iov_base.map { ($0 + rest).assumingMemoryBound(to: UInt8.self) }
      }
      rest &-= vectors[index].iov_len
    }
    return nil
  }

  /// Gives a packet's chains to the driver: as many of those that are held as it needs.
  private mutating func deliver(_ bytes: Int, _ held: inout HeldChains) {
    var used = 0
    var reach = 0
    while used < held.count, reach < bytes {
      reach &+= window[held.first &+ used].bytes
      used &+= 1
    }
    // The tap leaves the count of buffers alone.
    byte(NetConfiguration.bufferCountOffset, held)?.pointee = UInt8(truncatingIfNeeded: used)
    byte(NetConfiguration.bufferCountOffset + 1, held)?.pointee = UInt8(truncatingIfNeeded: used >> 8)
    var rest = bytes
    for _ in 0..<used {
      let chain = window[held.first]
      let part = min(rest, chain.bytes)
      receiveQueue.use(chain.ticket, length: UInt32(truncatingIfNeeded: part))
      rest &-= part
      held.first &+= 1
      held.count &-= 1
      held.bytes &-= chain.bytes
      held.firstVector &+= chain.vectorCount
      held.vectorCount &-= chain.vectorCount
    }
  }
}
