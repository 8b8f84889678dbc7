/// An address of the Internet protocol, version 4 or 6.
package struct InternetAddress: Equatable, Hashable, Sendable {
  package var isVersion6: Bool
  /// The address, or 0 and its 32 bits.
  package var high: UInt64
  package var low: UInt64

  package init(version4 value: UInt32) {
    isVersion6 = false
    high = 0
    low = UInt64(value)
  }

  package init(version6 high: UInt64, _ low: UInt64) {
    isVersion6 = true
    self.high = high
    self.low = low
  }
}

/// Which sources a guest may use (MAC lock, and optionally an IP, ARP and neighbour-discovery lock). Looks at a copy of a packet's first
/// bytes, which the guest cannot change any more.
package struct SourceLock: ~Copyable {
  /// Bytes of a packet that are looked at, its link header included: all that the checks below read.
  package static let headBytes = 128

  private let mac: UInt64?
  private let addresses: UnsafeMutablePointer<InternetAddress>
  private let addressCount: Int
  private let locksAddresses: Bool

  /// - Parameters:
  ///   - mac: the only hardware address; nil for any.
  ///   - addresses: the only IP addresses; nil for any.
  package init(mac: MACAddress?, addresses: [InternetAddress]?) {
    self.mac = mac?.value
    locksAddresses = addresses != nil
    var all = addresses ?? []
    if let mac, locksAddresses {
      // What the guest makes of its hardware address (RFC 4291, appendix A), without which IPv6 does not begin.
      let (upper, lower) = (mac.value >> 24 ^ 0x02_0000, mac.value & 0xff_ffff)
      all.append(InternetAddress(version6: 0xfe80 << 48, upper << 40 | 0xff_fe00_0000 | lower))
    }
    addressCount = all.count
    self.addresses = .allocate(capacity: max(1, all.count))
    self.addresses.initialize(from: all, count: all.count)
  }

  deinit { addresses.deallocate() }

  /// - Parameter count: bytes at `frame`, of which there may be fewer than `headBytes` when the packet is short.
  /// - Returns: why the packet may not go; nil when it may.
  package func refuses(_ frame: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard count >= 14 else { return .malformed }
    if let mac, Self.number(frame, 6, 6) != mac { return .foreignMAC }
    guard locksAddresses else { return nil }
    var offset = 12
    var type = Self.number(frame, offset, 2)
    // At most two tags.
    var tags = 0
    while type == 0x8100 || type == 0x88a8 {
      offset &+= 4
      tags &+= 1
      guard tags <= 2, count >= offset &+ 2 else { return .malformed }
      type = Self.number(frame, offset, 2)
    }
    offset &+= 2
    switch type {
    case 0x0800: return refusesVersion4(frame + offset, count &- offset)
    case 0x0806: return refusesARP(frame + offset, count &- offset)
    case 0x86dd: return refusesVersion6(frame + offset, count &- offset)
    default: return .foreignIP
    }
  }

  private func refusesVersion4(_ packet: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard count >= 20 else { return .malformed }
    let source = UInt32(truncatingIfNeeded: Self.number(packet, 12, 4))
    if contains(InternetAddress(version4: source)) { return nil }
    // A guest that asks for an address by DHCP has none yet: UDP to everybody's port 67.
    let header = Int(packet.load(as: UInt8.self) & 15) &* 4
    let isDHCP =
      source == 0 && Self.number(packet, 16, 4) == 0xffff_ffff && packet.load(fromByteOffset: 9, as: UInt8.self) == 17
      && header >= 20 && count >= header &+ 4 && Self.number(packet, header &+ 2, 2) == 67
    return isDHCP ? nil : .foreignIP
  }

  private func refusesARP(_ packet: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard count >= 28 else { return .malformed }
    // Ethernet and IPv4 (RFC 826).
    guard Self.number(packet, 0, 6) == 0x0001_0800_0604 else { return .foreignIP }
    if let mac, Self.number(packet, 8, 6) != mac { return .foreignMAC }
    let sender = UInt32(truncatingIfNeeded: Self.number(packet, 14, 4))
    // 0 is a probe for a conflict (RFC 5227).
    return sender == 0 || contains(InternetAddress(version4: sender)) ? nil : .foreignIP
  }

  private func refusesVersion6(_ packet: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard count >= 40 else { return .malformed }
    let source = InternetAddress(version6: Self.number(packet, 8, 8), Self.number(packet, 16, 8))
    // The unspecified address is for the detection of duplicates (RFC 4862).
    guard source.high == 0 && source.low == 0 || contains(source) else { return .foreignIP }
    // A neighbour advertisement speaks of its target (RFC 4861, 4.4).
    guard packet.load(fromByteOffset: 6, as: UInt8.self) == 58, count >= 41,
      packet.load(fromByteOffset: 40, as: UInt8.self) == 136
    else { return nil }
    guard count >= 64 else { return .malformed }
    let target = InternetAddress(version6: Self.number(packet, 48, 8), Self.number(packet, 56, 8))
    return contains(target) ? nil : .foreignIP
  }

  private func contains(_ address: InternetAddress) -> Bool {
    for index in 0..<addressCount where addresses[index] == address { return true }
    return false
  }

  /// A number of up to 8 bytes in network order.
  @inline(__always)
  static func number(_ memory: UnsafeRawPointer, _ offset: Int, _ bytes: Int) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<bytes {
      value = value << 8 | UInt64(memory.load(fromByteOffset: offset &+ index, as: UInt8.self))
    }
    return value
  }
}
