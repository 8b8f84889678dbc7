/// What a packet of the Internet protocol, or about it, says of its sender.
extension SourceLock {
  private enum Port {
    static let dhcpServer: UInt64 = 67
    static let dhcpClient: UInt64 = 68
    static let dhcp6Server: UInt64 = 547
  }

  // MARK: Version 4

  func refusesVersion4(_ packet: UnsafeRawPointer, _ count: Int) -> DropReason? {
    // What is no packet of the protocol harms nobody, but where addresses are locked nothing goes that has none.
    guard count >= 20 else { return locksAddresses ? .malformed : nil }
    let header = Int(packet.load(as: UInt8.self) & 15) &* 4
    guard header >= 20 else { return locksAddresses ? .malformed : nil }
    let source = UInt32(truncatingIfNeeded: Self.number(packet, 12, 4))
    let isUDP = packet.load(fromByteOffset: 9, as: UInt8.self) == 17
    let isFirst = Self.number(packet, 6, 2) & 0x1fff == 0
    // Ports are in the first fragment. One that is too short for them is made to deceive.
    guard !isUDP || !isFirst || count >= header &+ 4 else { return .malformed }
    if !mayServe, isUDP, isFirst, Self.number(packet, header, 2) == Port.dhcpServer { return .foreignProtocol }
    // A fragment that goes on within the UDP header could overwrite its ports (RFC 1858).
    guard !isUDP || isFirst || Self.number(packet, 6, 2) & 0x1fff > 1 else { return .malformed }
    guard locksAddresses, !contains(InternetAddress(version4: source)) else { return nil }
    // A guest that asks for an address by DHCP has none yet: UDP to everybody's port 67.
    let isDHCP =
      source == 0 && Self.number(packet, 16, 4) == 0xffff_ffff && isUDP && isFirst
      && Self.number(packet, header &+ 2, 2) == Port.dhcpServer
    // And it tells routers which groups it is in (IGMP).
    let isGroupReport = source == 0 && packet.load(fromByteOffset: 9, as: UInt8.self) == 2
    return isDHCP || isGroupReport ? nil : .foreignIP
  }

  func refusesARP(_ packet: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard locksAddresses || mac != nil else { return nil }
    guard count >= 28 else { return locksAddresses ? .malformed : nil }
    // Ethernet and IPv4 (RFC 826).
    guard Self.number(packet, 0, 6) == 0x0001_0800_0604 else { return locksAddresses ? .foreignIP : nil }
    if let mac, Self.number(packet, 8, 6) != mac { return .foreignMAC }
    guard locksAddresses else { return nil }
    let sender = UInt32(truncatingIfNeeded: Self.number(packet, 14, 4))
    // 0 is a probe for a conflict (RFC 5227).
    return sender == 0 || contains(InternetAddress(version4: sender)) ? nil : .foreignIP
  }

  // MARK: Version 6

  func refusesVersion6(_ packet: UnsafeRawPointer, _ count: Int) -> DropReason? {
    guard count >= 40 else { return locksAddresses ? .malformed : nil }
    let source = InternetAddress(version6: Self.number(packet, 8, 8), Self.number(packet, 16, 8))
    // The unspecified address is for the detection of duplicates (RFC 4862).
    guard !locksAddresses || source.high == 0 && source.low == 0 || isOwn(source) else { return .foreignIP }
    // Behind extension headers, whichever and in whatever order (RFC 8200, 4).
    var next = packet.load(fromByteOffset: 6, as: UInt8.self)
    var offset = 40
    var isExtended = false
    while true {
      switch next {
      case 0, 43, 60, 135, 139, 140:  // hop by hop, routing, destination; mobility, HIP, Shim6
        guard count >= offset &+ 8 else { return .malformed }
        next = packet.load(fromByteOffset: offset, as: UInt8.self)
        offset &+= 8 &+ 8 &* Int(packet.load(fromByteOffset: offset &+ 1, as: UInt8.self))
      case 51:  // authentication: its length counts words, less two (RFC 4302)
        guard count >= offset &+ 8 else { return .malformed }
        next = packet.load(fromByteOffset: offset, as: UInt8.self)
        offset &+= 8 &+ 4 &* Int(packet.load(fromByteOffset: offset &+ 1, as: UInt8.self))
      case 44:
        guard count >= offset &+ 8 else { return .malformed }
        let isFirst = Self.number(packet, offset &+ 2, 2) & 0xfff8 == 0
        next = packet.load(fromByteOffset: offset, as: UInt8.self)
        // All headers have to be in the first piece (RFC 7112), where neighbour discovery is not allowed (RFC 6980).
        guard isFirst else { return nil }
        offset &+= 8
      default: return refusesPayload(next, packet, offset, count, isExtended)
      }
      isExtended = true
    }
  }

  private func refusesPayload(
    _ protocol: UInt8, _ packet: UnsafeRawPointer, _ offset: Int, _ count: Int, _ isExtended: Bool
  ) -> DropReason? {
    switch `protocol` {
    case 17:
      // Headers that push the ports out of sight hide what they are for.
      guard count >= offset &+ 4 else { return .malformed }
      let port = Self.number(packet, offset, 2)
      return !mayServe && port == Port.dhcp6Server ? .foreignProtocol : nil
    case 58:
      guard count >= offset &+ 4 else { return .malformed }
      let type = packet.load(fromByteOffset: offset, as: UInt8.self)
      guard (133...137).contains(type) else { return nil }
      // Nobody needs extension headers before neighbour discovery; who uses them wants to get past checks.
      guard !isExtended else { return .foreignProtocol }
      return refusesDiscovery(type, packet, offset, count)
    default: return nil
    }
  }

  /// Neighbour discovery (RFC 4861, 4): whom it is said of, and by which hardware address.
  private func refusesDiscovery(
    _ type: UInt8, _ packet: UnsafeRawPointer, _ offset: Int, _ count: Int
  ) -> DropReason? {
    if type == 134 || type == 137 { return mayServe ? nil : .foreignProtocol }
    if type == 136, locksAddresses {
      guard count >= offset &+ 24 else { return .malformed }
      let target = InternetAddress(version6: Self.number(packet, offset &+ 8, 8), Self.number(packet, offset &+ 16, 8))
      guard isOwn(target) else { return .foreignIP }
    }
    guard let mac else { return nil }
    // Options behind the message: a hardware address in them is the guest's own.
    var option = offset &+ (type == 133 ? 8 : 24)
    let end = min(count, 40 &+ Int(Self.number(packet, 4, 2)))
    while option &+ 2 <= end {
      let length = 8 &* Int(packet.load(fromByteOffset: option &+ 1, as: UInt8.self))
      guard length > 0, option &+ length <= end else { return .malformed }
      let kind = packet.load(fromByteOffset: option, as: UInt8.self)
      if kind == 1 || kind == 2, Self.number(packet, option &+ 2, 6) != mac { return .foreignMAC }
      option &+= length
    }
    return nil
  }

  /// An address that is allowed, or a link's own (fe80::/64): guests make those of their hardware address, of secrets (RFC 7217), or by
  /// chance, and they lead nowhere beyond the link.
  private func isOwn(_ address: InternetAddress) -> Bool {
    address.isVersion6 && address.high == 0xfe80 << 48 || contains(address)
  }
}
