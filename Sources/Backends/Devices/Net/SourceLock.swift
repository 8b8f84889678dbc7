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

/// What a guest may send.
package struct SourceRules: Equatable, Sendable {
  /// The only hardware address; nil for any.
  package var mac: MACAddress?
  /// The only Internet addresses; nil for any.
  package var addresses: [InternetAddress]?
  /// VLANs whose tags it may use.
  package var vlans: Set<UInt16> = []
  /// It may answer others' questions for addresses and routes: router advertisements, redirects, DHCP.
  package var mayServe = false

  package init() {}
}

/// Which sources a guest may use, and what it may pretend to be. Looks at a copy of a packet's first bytes, which the guest cannot change any
/// more.
///
/// In every case: the hardware address; no VLAN but those that are allowed; nothing to the link's own protocols (spanning tree, LLDP, LACP,
/// flow control: 01:80:c2:00:00:00 to 0f), which no host's business is, let alone a guest's; no router advertisements, redirects and answers of
/// DHCP servers. With addresses also those of IP, ARP and neighbour discovery (`SourceLock+IP.swift`).
package struct SourceLock: ~Copyable {
  /// Bytes of a packet that are looked at, its link header included. What a check needs and cannot find in them is refused.
  package static let headBytes = 256

  let mac: UInt64?
  private let addresses: UnsafeMutablePointer<InternetAddress>
  private let addressCount: Int
  let locksAddresses: Bool
  let mayServe: Bool
  /// A bit for each VLAN.
  private let vlans: UnsafeMutablePointer<UInt64>
  private let vlanBytes = 64

  package init(_ rules: SourceRules) {
    mac = rules.mac?.value
    mayServe = rules.mayServe
    locksAddresses = rules.addresses != nil
    let all = rules.addresses ?? []
    addressCount = all.count
    addresses = .allocate(capacity: max(1, all.count))
    addresses.initialize(from: all, count: all.count)
    vlans = .allocate(capacity: vlanBytes)
    vlans.initialize(repeating: 0, count: vlanBytes)
    for vlan in rules.vlans where vlan < 4096 { vlans[Int(vlan >> 6)] |= 1 << UInt64(vlan & 63) }
  }

  deinit {
    addresses.deallocate()
    vlans.deallocate()
  }

  /// - Parameter count: bytes at `frame`, of which there may be fewer than `headBytes` when the packet is short.
  /// - Returns: why the packet may not go; nil when it may.
  package func refuses(_ frame: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard count >= 14 else { return .malformed }
    if let mac, Self.number(frame, 6, 6) != mac { return .foreignMAC }
    guard Self.number(frame, 0, 6) & 0xffff_ffff_fff0 != 0x0180_c200_0000 else { return .foreignProtocol }
    var offset = 12
    var type = Self.number(frame, offset, 2)
    // At most two tags.
    var tags = 0
    while type == 0x8100 || type == 0x88a8 || type == 0x9100 {
      tags &+= 1
      guard tags <= 2, count >= offset &+ 6 else { return .malformed }
      let vlan = Int(Self.number(frame, offset &+ 2, 2) & 4095)
      // VLAN 0 has a priority and nothing else.
      guard vlan == 0 || vlans[vlan >> 6] & 1 << UInt64(vlan & 63) != 0 else { return .foreignProtocol }
      offset &+= 4
      type = Self.number(frame, offset, 2)
    }
    offset &+= 2
    switch type {
    case 0x0800: return refusesVersion4(frame + offset, count &- offset)
    case 0x0806: return refusesARP(frame + offset, count &- offset)
    case 0x86dd: return refusesVersion6(frame + offset, count &- offset)
    // Encapsulations that a router on the way unwraps (PPPoE, MPLS), and what nobody knows: allowed where addresses are not locked.
    default: return locksAddresses ? .foreignIP : nil
    }
  }

  func contains(_ address: InternetAddress) -> Bool {
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
