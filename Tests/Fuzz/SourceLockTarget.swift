import Devices

/// The source lock under any frame: what it lets through is looked at again, by a second reading of the same rules.
enum SourceLockTarget {
  private static let mac = MACAddress(value: 0x0216_3e01_0203)
  private static let addresses = [
    InternetAddress(version4: 0x0a00_0001), InternetAddress(version4: 0xc0a8_0105),
    InternetAddress(version6: 0x2001_0db8_0000_0000, 5),
  ]
  private static let vlans: Set<UInt16> = [7, 4094]

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let choice = input.byte()
    var rules = SourceRules()
    if choice & 1 == 0 { rules.mac = mac }
    if choice & 2 == 0 { rules.addresses = addresses }
    if choice & 4 == 0 { rules.vlans = vlans }
    rules.mayServe = choice & 8 != 0
    let lock = SourceLock(rules)
    // A place of its own and not a byte more: what is read behind it is found by AddressSanitizer.
    let rest = input.rest()
    let count = min(rest.count, SourceLock.headBytes)
    let frame = UnsafeMutableRawPointer.allocate(byteCount: max(count, 1), alignment: 1)
    defer { frame.deallocate() }
    if let start = rest.baseAddress { frame.copyMemory(from: start, byteCount: count) }
    guard lock.refuses(frame, count) == nil else { return }
    Reading(bytes: Array(rest.prefix(count)), rules: rules).check()
  }

  /// The rules once more, said differently: what must hold of a frame that is let through.
  private struct Reading {
    let bytes: [UInt8]
    let rules: SourceRules

    private func number(_ place: Int, _ count: Int) -> UInt64 {
      precondition(place >= 0 && place + count <= bytes.count, "what has to be looked at was not there")
      return bytes[place..<place + count].reduce(0) { $0 << 8 | UInt64($1) }
    }

    func check() {
      precondition(rules.mac == nil || number(6, 6) == mac.value, "another hardware address")
      precondition(number(0, 6) >> 4 != 0x0180_c200_0000 >> 4, "a protocol of the link")
      var place = 12
      while [0x8100, 0x88a8, 0x9100].contains(number(place, 2)) {
        let vlan = UInt16(number(place + 2, 2) & 4095)
        precondition(vlan == 0 || rules.vlans.contains(vlan), "another VLAN")
        place += 4
      }
      let packet = place + 2
      switch number(place, 2) {
      case 0x0800: checkVersion4(packet)
      case 0x0806:
        guard rules.addresses != nil else { return }
        let sender = UInt32(number(packet + 14, 4))
        precondition(sender == 0 || isOwn(InternetAddress(version4: sender)), "ARP for another address")
      case 0x86dd: checkVersion6(packet)
      default: precondition(rules.addresses == nil, "a protocol that nobody knows")
      }
    }

    private func isOwn(_ address: InternetAddress) -> Bool { rules.addresses?.contains(address) ?? true }

    private func checkVersion4(_ packet: Int) {
      guard rules.addresses != nil || bytes.count >= packet + 20 && number(packet, 1) & 15 >= 5 else { return }
      let isFirst = number(packet + 6, 2) & 0x1fff == 0
      let header = Int(number(packet, 1) & 15) * 4
      let isUDP = number(packet + 9, 1) == 17
      if isUDP, isFirst, !rules.mayServe {
        precondition(number(packet + header, 2) != 67, "an answer of a DHCP server")
      }
      let source = UInt32(number(packet + 12, 4))
      precondition(source == 0 || isOwn(InternetAddress(version4: source)), "another address")
    }

    private func checkVersion6(_ packet: Int) {
      guard rules.addresses != nil || bytes.count >= packet + 40 else { return }
      let source = InternetAddress(version6: number(packet + 8, 8), number(packet + 16, 8))
      let isUnspecified = source.high == 0 && source.low == 0
      precondition(isUnspecified || source.high == 0xfe80 << 48 || isOwn(source), "another address")
      guard number(packet + 6, 1) == 58 else { return }
      let type = number(packet + 40, 1)
      precondition(rules.mayServe || type != 134 && type != 137, "a router's word")
      if type == 136, rules.addresses != nil {
        let target = InternetAddress(version6: number(packet + 48, 8), number(packet + 56, 8))
        precondition(target.high == 0xfe80 << 48 || isOwn(target), "an advertisement for another")
      }
    }
  }
}
