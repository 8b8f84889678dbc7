import Glibc
import Transport
import Virtqueue

/// From the tap to the guest.
///
/// A packet may be as large as 64 KiB, and most are much smaller. Buffers are taken for what is expected, and memory of our own lies behind
/// them, so a packet is never cut and no count of buffers is too small to begin with. What does not fit the driver's buffers is copied into
/// more of them, or waits for those (`NetPump+Parking.swift`).
extension NetPump {
  /// Receives what the tap has, into as many buffers as a packet needs where the driver merges them.
  mutating func receive(_ signals: any TransportSignals) throws(VirtqueueFault) -> Turn {
    guard receiveQueue.isActive else { return .empty }
    var held = HeldChains()
    var left = Self.batchLimit
    var turn = Turn.more
    var (packets, bytes, told): (UInt64, UInt64, UInt64) = (0, 0, 0)
    receiving: while left > 0 {
      let time = isLimited ? rate.delay(isWrite: false, at: now) : 0
      guard time == 0 else {
        wait(until: time)
        turn = .limited
        break
      }
      var result = 0
      if parkedBytes > 0 || copies {
        guard let delivered = try receiveByCopy(&left, &turn) else { break }
        result = delivered
        if result == 0 { continue }
      } else {
        switch try gatherRoom(&held, &left) {
        case .ready: break
        case .copies: continue receiving
        case .spent: break receiving
        case .short:
          turn = .noRoom
          insufficient = 0
          break receiving
        }
        result = readPacket(held)
        guard result != 0 else {
          turn = .empty
          break
        }
        left &-= 1
        guard result > 0, isWanted(result, held) else { continue }
        expectedBytes = max(result, expectedBytes &- expectedBytes >> 3)
        if result > held.bytes {
          guard try fit(result, &held) else { continue }
        }
        deliver(result, &held)
      }
      let frame = UInt64(result &- NetConfiguration.headerBytes)
      packets &+= 1
      bytes &+= frame
      budget.pay(bytes: frame)
      if isLimited { rate.pay(isWrite: false, bytes: frame, at: now) }
      if left % Self.groupLimit == 0 {
        publishReceived(packets &- told, signals)
        told = packets
      }
    }
    putBack(&held)
    // Once for the batch: counters are objects.
    if packets > 0 {
      idle.works()
      receiveQueue.counters.reads.add(packets)
      receiveQueue.counters.readBytes.add(bytes)
    }
    publishReceived(packets &- told, signals)
    return turn
  }

  // MARK: Room

  /// Where in the window and in the vectors the chains are that were taken and not given back.
  struct HeldChains {
    var first = 0
    var count = 0
    var bytes = 0
    var firstVector = 0
    var vectorCount = 0
  }

  private enum Room {
    case ready
    /// The driver has to offer something first.
    case short
    /// The run is over.
    case spent
    /// The driver's memory cannot be mapped now.
    case copies
  }

  mutating func putBack(_ held: inout HeldChains) {
    while held.count > 0 {
      held.count &-= 1
      receiveQueue.putBack(window[held.first &+ held.count].ticket)
    }
    held = HeldChains()
  }

  /// Takes chains for the packet that is expected: one at least.
  private mutating func gatherRoom(_ held: inout HeldChains, _ left: inout Int) throws(VirtqueueFault) -> Room {
    let most = merges ? min(receiveQueue.size, Self.chainLimit) : 1
    while held.bytes < expectedBytes, held.count < most {
      guard let chain = try receiveQueue.next(&memory, &budget) else {
        if held.count > 0 { break }
        return budget.isSpent ? .spent : .short
      }
      if take(chain, &held, least: held.count == 0 ? Self.leastBytes : 1) { continue }
      // A buffer that nothing fits into, or that is not there, or in more pieces than there are vectors left: what is held before it has
      // to do. Alone it goes back to the driver.
      guard held.count == 0, !copies else {
        receiveQueue.putBack(chain.ticket)
        return held.count > 0 ? .ready : .copies
      }
      receiveQueue.counters.drops(.badBuffer).add(1)
      receiveQueue.use(chain.ticket, length: 0)
      left &-= 1
      guard left > 0 else { return .spent }
    }
    return .ready
  }

  /// Makes a chain the last of those that are held.
  ///
  /// - Returns: whether there is room for it, and it can take at least `least` bytes.
  private mutating func take(_ chain: DescriptorChain, _ held: inout HeldChains, least: Int) -> Bool {
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

  private mutating func moveToFront(_ held: inout HeldChains) {
    window.update(from: window + held.first, count: held.count)
    vectors.update(from: vectors + held.firstVector, count: held.vectorCount)
    held.first = 0
    held.firstVector = 0
  }

  /// Makes a packet fit that is larger than what is held: what lies in the spill is copied into further chains. Where there are none,
  /// the packet waits for them or is dropped.
  private mutating func fit(_ bytes: Int, _ held: inout HeldChains) throws(VirtqueueFault) -> Bool {
    let (known, inPlace) = (held.vectorCount, held.bytes)
    var done = inPlace
    var isSame = merges
    while isSame, done < bytes {
      guard let chain = try receiveQueue.next(&memory, &budget) else { break }
      let from = held.vectorCount
      isSame = take(chain, &held, least: 1)
      guard isSame else {
        receiveQueue.putBack(chain.ticket)
        break
      }
      for index in held.firstVector &+ from..<held.firstVector &+ held.vectorCount where done < bytes {
        let count = min(vectors[index].iov_len, bytes &- done)
        vectors[index].iov_base?.copyMemory(from: spill + (done &- inPlace), byteCount: count)
        done &+= count
      }
    }
    if done == bytes { return true }
    guard merges else {
      // The chain is good for another packet.
      receiveQueue.counters.drops(.badBuffer).add(1)
      return false
    }
    park(bytes, held, vectorCount: known, inPlace: inPlace)
    putBack(&held)
    return false
  }

  /// - Returns: bytes of the next packet with its header; 0 when there is none, -1 when it is lost.
  private mutating func readPacket(_ held: HeldChains) -> Int {
    vectors[held.firstVector &+ held.vectorCount] = iovec(iov_base: spill, iov_len: spillBytes)
    return readTap(vectors + held.firstVector, held.vectorCount &+ 1)
  }

  mutating func readTap(_ first: UnsafeMutablePointer<iovec>, _ count: Int) -> Int {
    while true {
      let result = readv(tap, first, Int32(truncatingIfNeeded: count))
      if result >= 0 { return result }
      switch errno {
      case EINTR: continue
      case EFAULT:
        // The kernel has taken the packet from its queue, and others may be behind it.
        receiveQueue.counters.drops(.badBuffer).add(1)
        return -1
      case EBADFD, ENODEV, ENXIO, EIO:
        // A tap whose interface was deleted says so for ever.
        if errno != EIO { goneResult = -Int(ENODEV) }
        return 0
      default: return 0
      }
    }
  }

  // MARK: The packet

  /// Whether a packet that has been read is for the guest; its header is made what the guest has agreed to.
  private mutating func isWanted(_ bytes: Int, _ held: HeldChains) -> Bool {
    // What is looked at lies in one piece as a rule.
    let first = vectors[held.firstVector]
    if first.iov_len >= Self.lookedAtBytes, let base = first.iov_base { return isWanted(bytes, base) }
    let count = min(bytes, Self.lookedAtBytes)
    for index in 0..<count { head.storeBytes(of: byte(index, held)?.pointee ?? 0, toByteOffset: index, as: UInt8.self) }
    guard isWanted(bytes, head) else { return false }
    for index in 0..<min(count, NetConfiguration.bufferCountOffset) {
      byte(index, held)?.pointee = head.load(fromByteOffset: index, as: UInt8.self)
    }
    return true
  }

  /// - Parameter start: the packet's first bytes, `lookedAtBytes` of them as far as it is that long.
  mutating func isWanted(_ bytes: Int, _ start: UnsafeMutableRawPointer) -> Bool {
    guard bytes >= Self.leastBytes else {
      receiveQueue.counters.drops(.malformed).add(1)
      return false
    }
    guard isLinkUp else {
      receiveQueue.counters.drops(.linkDown).add(1)
      return false
    }
    let link = NetConfiguration.headerBytes
    let type = SourceLock.number(start, link + 12, 2)
    let vlan = type == 0x8100 && bytes >= link + 18 ? Int(SourceLock.number(start, link + 14, 2) & 4095) : -1
    guard filter.passes(SourceLock.number(start, link, 6), vlan: vlan) else {
      receiveQueue.counters.drops(.filtered).add(1)
      return false
    }
    guard guestRules.adapt(start) else {
      receiveQueue.counters.drops(.malformed).add(1)
      return false
    }
    return true
  }

  private mutating func byte(_ offset: Int, _ held: HeldChains) -> UnsafeMutablePointer<UInt8>? {
    var rest = offset
    for index in held.firstVector..<held.firstVector &+ held.vectorCount {
      if rest < vectors[index].iov_len {
        return vectors[index].iov_base.map { ($0 + rest).assumingMemoryBound(to: UInt8.self) }
      }
      rest &-= vectors[index].iov_len
    }
    return rest < spillBytes ? (spill + rest).assumingMemoryBound(to: UInt8.self) : nil
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
