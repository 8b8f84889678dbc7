import Transport
import Virtqueue

/// The control queue (virtio 1.2, 5.1.6.5).
extension NetPump {
  private enum Class {
    static let receive: UInt8 = 0
    static let mac: UInt8 = 1
    static let vlan: UInt8 = 2
    static let announce: UInt8 = 3
    static let queues: UInt8 = 4
    static let offloads: UInt8 = 5
    static let coalescing: UInt8 = 6
  }

  /// Commands before other sources of the thread have their turn.
  private static var commandLimit: Int { 16 }
  /// Nanoseconds for each command, and how much of that may be caught up on: many of them are work for the whole host (RTNL).
  private static var commandTime: UInt64 { 2_000_000 }
  private static var commandCredit: UInt64 { 256 * commandTime }
  /// Bytes of a command: two full tables, and an overlong one is refused.
  private static var commandBytes: Int { 2 + 2 * (4 + 6 * 4096) }

  mutating func serveControl(_ signals: any TransportSignals) throws(VirtqueueFault) -> Turn {
    var turn = Turn.empty
    for _ in 0..<Self.commandLimit {
      guard commandsPaid <= now else {
        // Without a command that waits there is nothing to come back for but the driver's notification, which has to be enabled then.
        if controlQueue.hasPending {
          wait(until: commandsPaid)
          turn = .limited
        }
        break
      }
      guard let chain = try controlQueue.next(&memory, &budget) else { break }
      commandsPaid = max(commandsPaid, now &- min(now, Self.commandCredit)) &+ Self.commandTime
      var cursor = ChainCursor(chain.buffers, count: chain.readableCount)
      let count = Int(clamping: min(chain.readableBytes, UInt64(Self.commandBytes)))
      // Rare enough for memory of its own.
      var command = [UInt8](repeating: 0, count: count)
      let read = command.withUnsafeMutableBytes { bytes -> Int in
        guard let start = bytes.baseAddress else { return 0 }
        return (try? cursor.read(&memory, to: start, count: count)) ?? 0
      }
      var new = choices
      budget.pay(bytes: UInt64(count))
      var isDone = read == count && chain.readableBytes == UInt64(count) && perform(command, &new)
      // Before the driver is told: what it reads afterwards is as it wanted it.
      if isDone, new != choices {
        isDone = onChoices(new)
        if isDone { set(new) }
      }
      var answer: UInt8 = isDone ? 0 : 1
      var status = ChainCursor(chain.writable, count: chain.writableCount)
      let written = (try? status.write(&memory, from: &answer, count: 1)) ?? 0
      controlQueue.counters.others.add(1)
      if !isDone { controlQueue.counters.unsupported.add(1) }
      controlQueue.use(chain.ticket, length: UInt32(written))
    }
    controlQueue.publish(signals)
    return turn
  }

  /// - Returns: whether the command makes sense and is done.
  private mutating func perform(_ command: [UInt8], _ new: inout NetChoices) -> Bool {
    guard command.count >= 2 else { return false }
    let data = command[2...]
    func word(_ bytes: Int) -> UInt64? {
      guard data.count == bytes else { return nil }
      return data.reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
    switch command[0] {
    case Class.receive: return setReceiveMode(command[1], word(1), &new)
    case Class.mac where command[1] == 0 && features.contains(.netControlReceive): return setTables(data, &new)
    case Class.mac where command[1] == 1 && features.contains(.netControlMAC):
      guard data.count == 6 else { return false }
      new.mac = MACAddress(value: data.reduce(0) { $0 << 8 | UInt64($1) })
      return !new.mac.isGroup
    case Class.vlan where command[1] <= 1 && features.contains(.netControlVLAN):
      guard let vlan = word(2), vlan < 4096 else { return false }
      let bit: UInt64 = 1 << (vlan & 63)
      if command[1] == 0 { new.vlans[Int(vlan >> 6)] |= bit } else { new.vlans[Int(vlan >> 6)] &= ~bit }
      return true
    case Class.announce where command[1] == 0 && features.contains(.netGuestAnnounce):
      onAnnounced()
      return true
    case Class.queues where command[1] == 0 && features.contains(.netQueues):
      guard let pairs = word(2), pairs >= 1, pairs <= UInt64(settings.pairs) else { return false }
      new.pairs = Int(pairs)
      return true
    case Class.offloads where command[1] == 0 && features.contains(.netControlOffloads):
      guard let offloads = word(8),
        FeatureBits(rawValue: offloads).isSubset(of: features.intersection(.netGuestOffloads))
      else { return false }
      new.offloads = offloads
      return true
    case Class.coalescing where command[1] <= 1 && features.contains(.netNotificationCoalescing):
      guard let both = word(8) else { return false }
      let limits = NotificationLimits(packets: UInt32(truncatingIfNeeded: both), microseconds: UInt32(both >> 32))
      if command[1] == 0 { new.transmitLimits = limits } else { new.receiveLimits = limits }
      return true
    default: return false
    }
  }

  private func setReceiveMode(_ mode: UInt8, _ value: UInt64?, _ new: inout NetChoices) -> Bool {
    guard let value, value <= 1, features.contains(mode < 2 ? .netControlReceive : .netControlReceiveExtra) else {
      return false
    }
    let isOn = value == 1
    switch mode {
    case 0: new.promiscuous = isOn
    case 1: new.allMulticast = isOn
    case 2: new.allUnicast = isOn
    case 3: new.noMulticast = isOn
    case 4: new.noUnicast = isOn
    case 5: new.noBroadcast = isOn
    default: return false
    }
    return true
  }

  /// Two tables, each a count of 32 bits and as many addresses: unicast, then multicast. What does not fit opens the filter.
  private func setTables(_ data: ArraySlice<UInt8>, _ new: inout NetChoices) -> Bool {
    var rest = data
    func table() -> (addresses: [MACAddress], overflows: Bool)? {
      guard rest.count >= 4 else { return nil }
      let count = Int(rest.prefix(4).reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) })
      rest = rest.dropFirst(4)
      guard count <= rest.count / 6 else { return nil }
      var addresses: [MACAddress] = []
      for index in 0..<min(count, NetChoices.tableLimit) {
        let bytes = rest.dropFirst(6 * index).prefix(6)
        addresses.append(MACAddress(value: bytes.reduce(0) { $0 << 8 | UInt64($1) }))
      }
      rest = rest.dropFirst(6 * count)
      return (addresses, count > NetChoices.tableLimit)
    }
    guard let unicast = table(), let multicast = table() else { return false }
    (new.unicast, new.unicastOverflows) = unicast
    (new.multicast, new.multicastOverflows) = multicast
    return true
  }
}
