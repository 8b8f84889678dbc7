import Glibc
import Transport
import Virtqueue

/// From the tap to the guest.
extension NetPump {
  /// Receives what the tap has, into as many buffers as a packet needs where the driver merges them.
  mutating func receive(_ signals: any TransportSignals) throws(VirtqueueFault) -> Turn {
    guard receiveQueue.isActive else { return .empty }
    let merges = features.contains(.netMergeable)
    let needed = NetConfiguration.receiveBytes(
      mtu: settings.mtu, isLarge: !FeatureBits(rawValue: choices.offloads).isDisjoint(with: .netGuestLarge))
    var count = 0
    var vectorCount = 0
    var bytes = 0
    var left = Self.batchLimit
    var turn = Turn.more
    // The next chain has more pieces than there are vectors left: what is gathered has to do.
    var isFull = false
    receiving: while left > 0 {
      let time = rate.delay(isWrite: false, at: now)
      guard time == 0 else {
        wait(until: time)
        turn = .limited
        break
      }
      while bytes < needed, count < (merges ? Self.chainLimit : 1) {
        guard let chain = try receiveQueue.next(&memory) else { break }
        guard take(chain, count, &vectorCount, merges ? NetConfiguration.headerBytes : needed) else {
          // A buffer that nothing fits into, or that is not there: back to the driver, behind those before it.
          guard count == 0 else {
            receiveQueue.putBack(chain.ticket)
            isFull = true
            break
          }
          receiveQueue.counters.drops(.badBuffer).add(1)
          receiveQueue.use(chain.ticket, length: 0)
          left &-= 1
          continue receiving
        }
        bytes &+= window[count].bytes
        count &+= 1
      }
      // A ring that is smaller than the largest packet serves those that fit.
      guard count > 0, bytes >= needed || isFull || count == min(receiveQueue.size, Self.chainLimit) else {
        turn = .noRoom
        insufficient = count
        break
      }
      let result = readPacket(vectorCount)
      guard result > 0 else {
        turn = .empty
        break
      }
      left &-= 1
      guard isWanted(result, vectorCount) else { continue }
      let used = deliver(result, merges ? count : 1, vectorCount)
      receiveQueue.counters.reads.add(1)
      let frame = UInt64(result &- NetConfiguration.headerBytes)
      receiveQueue.counters.readBytes.add(frame)
      rate.pay(isWrite: false, bytes: frame, at: now)
      // The chains that are left move to the front.
      var gone = 0
      for index in 0..<used {
        gone &+= window[index].vectorCount
        bytes &-= window[index].bytes
      }
      for index in used..<count { window[index &- used] = window[index] }
      for index in gone..<vectorCount { vectors[index &- gone] = vectors[index] }
      count &-= used
      vectorCount &-= gone
      isFull = false
      if left % Self.groupLimit == 0 { receiveQueue.publish(signals) }
    }
    while count > 0 {
      count &-= 1
      receiveQueue.putBack(window[count].ticket)
    }
    receiveQueue.publish(signals)
    return turn
  }

  /// Makes a chain the next of the window.
  ///
  /// - Returns: whether it can take at least `least` bytes.
  private mutating func take(_ chain: DescriptorChain, _ index: Int, _ vectorCount: inout Int, _ least: Int) -> Bool {
    let bytes = Int(clamping: min(chain.writableBytes, 1 << 20))
    guard chain.readableCount == 0, bytes >= least else { return false }
    var cursor = ChainCursor(chain.writable, count: chain.writableCount)
    guard let end = gather(&cursor, bytes, from: vectorCount) else { return false }
    window[index] = ReceiveChain(ticket: chain.ticket, bytes: bytes, vectorCount: end &- vectorCount)
    vectorCount = end
    return true
  }

  /// - Returns: bytes of the next packet with its header; 0 when there is none.
  private mutating func readPacket(_ vectorCount: Int) -> Int {
    while true {
      let result = readv(tap, vectors, Int32(truncatingIfNeeded: vectorCount))
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
  private func isWanted(_ bytes: Int, _ vectorCount: Int) -> Bool {
    guard bytes >= NetConfiguration.headerBytes + 14 else {
      receiveQueue.counters.drops(.malformed).add(1)
      return false
    }
    guard isLinkUp else {
      receiveQueue.counters.drops(.linkDown).add(1)
      return false
    }
    let start = NetConfiguration.headerBytes
    let type = number(start + 12, 2, vectorCount)
    let vlan = type == 0x8100 && bytes >= start + 18 ? Int(number(start + 14, 2, vectorCount) & 4095) : -1
    guard filter.passes(number(start, 6, vectorCount), vlan: vlan) else {
      receiveQueue.counters.drops(.filtered).add(1)
      return false
    }
    return true
  }

  /// A number in network order at a place of the packet, wherever its buffers begin and end.
  private func number(_ offset: Int, _ bytes: Int, _ vectorCount: Int) -> UInt64 {
    if vectors[0].iov_len >= offset &+ bytes, let base = vectors[0].iov_base {
      return SourceLock.number(UnsafeRawPointer(base), offset, bytes)
    }
    var value: UInt64 = 0
    for index in 0..<bytes { value = value << 8 | UInt64(byte(offset &+ index, vectorCount)?.pointee ?? 0) }
    return value
  }

  private func byte(_ offset: Int, _ vectorCount: Int) -> UnsafeMutablePointer<UInt8>? {
    var rest = offset
    for index in 0..<vectorCount {
      if rest < vectors[index].iov_len {
        return vectors[index].iov_base.map { ($0 + rest).assumingMemoryBound(to: UInt8.self) }
      }
      rest &-= vectors[index].iov_len
    }
    return nil
  }

  /// Gives the packet's chains to the driver.
  ///
  /// - Returns: how many it takes.
  private mutating func deliver(_ bytes: Int, _ count: Int, _ vectorCount: Int) -> Int {
    var used = 0
    var reach = 0
    while used < count, reach < bytes {
      reach &+= window[used].bytes
      used &+= 1
    }
    // The tap leaves the count of buffers alone.
    byte(NetConfiguration.bufferCountOffset, vectorCount)?.pointee = UInt8(truncatingIfNeeded: used)
    byte(NetConfiguration.bufferCountOffset + 1, vectorCount)?.pointee = UInt8(truncatingIfNeeded: used >> 8)
    var rest = bytes
    for index in 0..<used {
      let part = min(rest, window[index].bytes)
      receiveQueue.use(window[index].ticket, length: UInt32(truncatingIfNeeded: part))
      rest &-= part
    }
    return used
  }
}
