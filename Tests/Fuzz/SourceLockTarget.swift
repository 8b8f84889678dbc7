import Devices

/// The source lock under any frame: what it lets through is looked at again, by a second reading of the same rules.
enum SourceLockTarget {
  private static let mac = MACAddress(value: 0x0216_3e01_0203)
  private static let addresses = [
    InternetAddress(version4: 0x0a00_0001), InternetAddress(version4: 0xc0a8_0105),
    InternetAddress(version6: 0x2001_0db8_0000_0000, 5),
  ]
  /// fe80::16:3eff:fe01:203, of the hardware address.
  private static let linkLocal = InternetAddress(version6: 0xfe80_0000_0000_0000, 0x0016_3eff_fe01_0203)

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let choice = input.byte()
    let locksMAC = choice & 1 == 0
    let locksAddresses = choice & 2 == 0
    let lock = SourceLock(mac: locksMAC ? mac : nil, addresses: locksAddresses ? addresses : nil)
    // A place of its own and not a byte more: what is read behind it is found by AddressSanitizer.
    let rest = input.rest()
    let count = min(rest.count, SourceLock.headBytes)
    let frame = UnsafeMutableRawPointer.allocate(byteCount: max(count, 1), alignment: 1)
    defer { frame.deallocate() }
    if let start = rest.baseAddress { frame.copyMemory(from: start, byteCount: count) }
    let reason = lock.refuses(frame, count)
    let reading = Reading(bytes: Array(rest.prefix(count)), locksMAC: locksMAC, locksAddresses: locksAddresses)
    precondition((reason == nil) == reading.isAllowed, "the lock and its second reading do not agree")
  }

  /// The rules once more, said differently: which frames are allowed.
  private struct Reading {
    let bytes: [UInt8]
    let locksMAC: Bool
    let locksAddresses: Bool

    private func number(_ place: Int, _ count: Int) -> UInt64? {
      guard place >= 0, place + count <= bytes.count else { return nil }
      return bytes[place..<place + count].reduce(0) { $0 << 8 | UInt64($1) }
    }

    private func isOwn(version4 place: Int) -> Bool {
      number(place, 4).map { address in addresses.contains(InternetAddress(version4: UInt32(address))) } ?? false
    }

    private func isOwn(version6 place: Int) -> Bool {
      guard let high = number(place, 8), let low = number(place + 8, 8) else { return false }
      let address = InternetAddress(version6: high, low)
      return addresses.contains(address) || locksMAC && address == linkLocal
    }

    var isAllowed: Bool {
      guard bytes.count >= 14, !locksMAC || number(6, 6) == mac.value else { return false }
      guard locksAddresses else { return true }
      var place = 12
      for _ in 0..<2 where number(place, 2) == 0x8100 || number(place, 2) == 0x88a8 { place += 4 }
      let packet = place + 2
      switch number(place, 2) {
      case 0x0800: return number(packet, 20) != nil && (isOwn(version4: packet + 12) || isDHCP(packet))
      case 0x0806:
        return number(packet, 28) != nil && number(packet, 6) == 0x0001_0800_0604
          && (!locksMAC || number(packet + 8, 6) == mac.value)
          && (number(packet + 14, 4) == 0 || isOwn(version4: packet + 14))
      case 0x86dd:
        let isUnspecified = number(packet + 8, 8) == 0 && number(packet + 16, 8) == 0
        guard number(packet, 40) != nil, isUnspecified || isOwn(version6: packet + 8) else { return false }
        let isAdvertisement = number(packet + 6, 1) == 58 && number(packet + 40, 1) == 136
        return !isAdvertisement || isOwn(version6: packet + 48)
      default: return false
      }
    }

    private func isDHCP(_ packet: Int) -> Bool {
      guard let first = number(packet, 1) else { return false }
      let header = Int(first & 15) * 4
      return header >= 20 && number(packet + 9, 1) == 17 && number(packet + 12, 4) == 0
        && number(packet + 16, 4) == 0xffff_ffff && number(packet + header + 2, 2) == 67
    }
  }
}
