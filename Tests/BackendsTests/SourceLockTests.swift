import Devices
import Testing

/// Frames in, verdicts out.
@Suite struct SourceLockTests {
  private static let mac = MACAddress(value: 0x0216_3e00_0001)
  private static let own: [UInt8] = mac.bytes
  private static let other: [UInt8] = [2, 0, 0, 0, 0, 9]
  private static let own6: [UInt8] = [0xfd] + zeros(14) + [2]
  private static let other6: [UInt8] = [0xfd] + zeros(14) + [3]
  /// Of the link, made of a secret.
  private static let link6: [UInt8] = [0xfe, 0x80] + zeros(6) + [0x5a, 1, 2, 3, 4, 5, 6, 7]
  private static func zeros(_ count: Int) -> [UInt8] { [UInt8](repeating: 0, count: count) }

  private static func rules(_ change: (inout SourceRules) -> Void = { _ in }) -> SourceRules {
    var rules = SourceRules()
    rules.mac = mac
    rules.addresses = [InternetAddress(version4: 0x0a00_0002), InternetAddress(version6: 0xfd00 << 48, 2)]
    change(&rules)
    return rules
  }

  /// - Parameter length: bytes of the frame that are looked at; all of it by default.
  private func verdict(_ rules: SourceRules, _ frame: [UInt8]) -> DropReason? {
    let lock = SourceLock(rules)
    return frame.withUnsafeBytes { bytes in
      guard let start = bytes.baseAddress else { return .malformed }
      return lock.refuses(start, min(bytes.count, SourceLock.headBytes))
    }
  }

  private static func frame(
    _ type: [UInt8], _ payload: [UInt8], to: [UInt8] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff], from: [UInt8] = own
  ) -> [UInt8] { to + from + type + payload }

  /// - Parameter fragment: the two bytes of flags and offset.
  private static func four(
    _ source: [UInt8] = [10, 0, 0, 2], to target: [UInt8] = [10, 0, 0, 1], protocol number: UInt8 = 17,
    ports: [UInt8] = [0x30, 0x39, 0, 80], options: Int = 0, fragment: [UInt8] = [0, 0]
  ) -> [UInt8] {
    [0x45 + UInt8(options), 0, 0, 40, 0, 0] + fragment + [64, number, 0, 0] + source + target + zeros(options * 4)
      + ports + zeros(16)
  }

  private static func six(_ payload: [UInt8], next: UInt8, from source: [UInt8] = own6) -> [UInt8] {
    [0x60, 0, 0, 0, UInt8(payload.count >> 8), UInt8(payload.count & 255), next, 255] + source + zeros(16) + payload
  }

  private static func icmp(_ type: UInt8, _ target: [UInt8] = [], options: [UInt8] = []) -> [UInt8] {
    [type, 0, 0, 0, 0, 0, 0, 0] + target + options
  }

  private static func address(_ kind: UInt8, _ mac: [UInt8]) -> [UInt8] { [kind, 1] + mac }
  /// An extension header of eight bytes.
  private static func header(_ next: UInt8) -> [UInt8] { [next, 0, 1, 4, 0, 0, 0, 0] }
  private static func fragment(_ next: UInt8, offset: UInt8 = 0) -> [UInt8] {
    [next, 0, 0, offset << 3 | 1, 0, 0, 0, 7]
  }
  private static let udp6: [UInt8] = [0x30, 0x39, 0, 80, 0, 8, 0, 0]

  private static let v4: [UInt8] = [8, 0]
  private static let v6: [UInt8] = [0x86, 0xdd]
  private static let arp: [UInt8] = [8, 6]

  private static func ask(_ hardware: [UInt8], _ sender: [UInt8]) -> [UInt8] {
    [0, 1, 8, 0, 6, 4, 0, 1] + hardware + sender + zeros(6) + [10, 0, 0, 1]
  }

  struct Case: CustomStringConvertible, Sendable {
    var description: String
    var frame: [UInt8]
    var verdict: DropReason?
    init(_ description: String, _ frame: [UInt8], _ verdict: DropReason? = nil) {
      self.description = description
      self.frame = frame
      self.verdict = verdict
    }
  }

  static let locked: [Case] = [
    Case("IPv4 of its own", frame(v4, four())),
    Case("IPv4 with options", frame(v4, four(options: 3))),
    Case("IPv4 of another", frame(v4, four([10, 0, 0, 3])), .foreignIP),
    Case("another station", frame(v4, four(), from: other), .foreignMAC),
    Case("IPv4 too short", frame(v4, [0x45, 0, 0]), .malformed),
    Case("IPv4 with a header of four bytes", frame(v4, [0x41] + four().dropFirst()), .malformed),
    Case("DHCP request", frame(v4, four([0, 0, 0, 0], to: [255, 255, 255, 255], ports: [0, 68, 0, 67]))),
    Case("DHCP request to one", frame(v4, four([0, 0, 0, 0], ports: [0, 68, 0, 67])), .foreignIP),
    Case("DHCP answer", frame(v4, four(ports: [0, 67, 0, 68])), .foreignProtocol),
    Case("DHCP answer behind options", frame(v4, four(ports: [0, 67, 0, 68], options: 10)), .foreignProtocol),
    Case(
      "first fragment of a DHCP answer", frame(v4, four(ports: [0, 67, 0, 68], fragment: [0x20, 0])), .foreignProtocol),
    Case("fragment over the ports", frame(v4, four(fragment: [0, 1])), .malformed),
    Case("later fragment", frame(v4, four(ports: [0, 67, 0, 68], fragment: [0, 9]))),
    Case("UDP without ports", frame(v4, Array(four().prefix(22))), .malformed),
    Case("group report without an address", frame(v4, four([0, 0, 0, 0], protocol: 2))),
    Case("ARP of its own", frame(arp, ask(own, [10, 0, 0, 2]))),
    Case("ARP probe", frame(arp, ask(own, [0, 0, 0, 0]))),
    Case("ARP for another", frame(arp, ask(own, [10, 0, 0, 3])), .foreignIP),
    Case("ARP with another station", frame(arp, ask(other, [10, 0, 0, 2])), .foreignMAC),
    Case("ARP too short", frame(arp, [0, 1]), .malformed),
    Case("IPv6 of its own", frame(v6, six(udp6, next: 17))),
    Case("IPv6 of another", frame(v6, six(udp6, next: 17, from: other6)), .foreignIP),
    Case("IPv6 of the link, of any form", frame(v6, six(udp6, next: 17, from: link6))),
    Case("IPv6 without an address yet", frame(v6, six(icmp(135, own6), next: 58, from: zeros(16)))),
    Case("IPv6 too short", frame(v6, [0x60]), .malformed),
    Case("echo", frame(v6, six(icmp(128), next: 58))),
    Case("echo in fragments", frame(v6, six(fragment(58) + icmp(128), next: 44))),
    Case("group report", frame(v6, six(header(58) + icmp(143), next: 0, from: link6))),
    Case("advertisement of its own", frame(v6, six(icmp(136, own6, options: address(2, own)), next: 58))),
    Case("advertisement of the link's", frame(v6, six(icmp(136, link6), next: 58, from: link6))),
    Case("advertisement for another", frame(v6, six(icmp(136, other6), next: 58)), .foreignIP),
    Case(
      "advertisement with another station", frame(v6, six(icmp(136, own6, options: address(2, other)), next: 58)),
      .foreignMAC),
    Case(
      "advertisement with an option of no length", frame(v6, six(icmp(136, own6, options: [2, 0]), next: 58)),
      .malformed),
    Case(
      "solicitation with another station", frame(v6, six(icmp(135, other6, options: address(1, other)), next: 58)),
      .foreignMAC),
    Case("router solicitation", frame(v6, six(icmp(133, options: address(1, own)), next: 58, from: link6))),
    Case(
      "router solicitation with another station",
      frame(v6, six(icmp(133, options: address(1, other)), next: 58, from: link6)), .foreignMAC),
    Case("advertisement behind hop-by-hop", frame(v6, six(header(58) + icmp(136, own6), next: 0)), .foreignProtocol),
    Case(
      "advertisement behind two headers", frame(v6, six(header(60) + header(58) + icmp(136, other6), next: 0)),
      .foreignProtocol),
    Case(
      "advertisement behind authentication", frame(v6, six([58, 1, 0, 0] + zeros(8) + icmp(136, own6), next: 51)),
      .foreignProtocol),
    Case("advertisement in a fragment", frame(v6, six(fragment(58) + icmp(136, own6), next: 44)), .foreignProtocol),
    Case(
      "advertisement behind a fragment's options",
      frame(v6, six(fragment(60) + header(58) + icmp(136, own6), next: 44)), .foreignProtocol),
    Case("headers that end nowhere", frame(v6, six(header(60), next: 0)), .malformed),
    Case(
      "headers that hide what follows", frame(v6, six([58, 31] + zeros(254) + icmp(136, own6), next: 60)), .malformed),
    Case("first fragment without its headers", frame(v6, six(fragment(58), next: 44)), .malformed),
    Case("later fragment of six", frame(v6, six(fragment(17, offset: 3) + udp6, next: 44))),
    Case("router advertisement", frame(v6, six(icmp(134), next: 58, from: link6)), .foreignProtocol),
    Case("redirect", frame(v6, six(icmp(137, own6), next: 58, from: link6)), .foreignProtocol),
    Case("DHCPv6 answer", frame(v6, six([2, 0x23, 2, 0x22, 0, 8, 0, 0], next: 17, from: link6)), .foreignProtocol),
    Case("DHCPv6 request", frame(v6, six([2, 0x22, 2, 0x23, 0, 8, 0, 0], next: 17, from: link6))),
    Case(
      "DHCPv6 answer behind options", frame(v6, six(header(17) + [2, 0x23, 2, 0x22, 0, 8, 0, 0], next: 60)),
      .foreignProtocol),
    Case("spanning tree", frame([0, 38], zeros(38), to: [1, 0x80, 0xc2, 0, 0, 0]), .foreignProtocol),
    Case("LACP", frame([0x88, 9], zeros(46), to: [1, 0x80, 0xc2, 0, 0, 2]), .foreignProtocol),
    Case("LLDP", frame([0x88, 0xcc], zeros(46), to: [1, 0x80, 0xc2, 0, 0, 14]), .foreignProtocol),
    Case("VLAN", frame([0x81, 0, 0, 7] + v4, four()), .foreignProtocol),
    Case("priority alone", frame([0x81, 0, 0xe0, 0] + v4, four())),
    Case("another's address behind a priority", frame([0x81, 0, 0xe0, 0] + v4, four([10, 0, 0, 3])), .foreignIP),
    Case("tag without what follows", frame([0x81, 0], [0]), .malformed),
    Case("three tags", frame([0x81, 0, 0, 0, 0x81, 0, 0, 0, 0x81, 0, 0, 0] + v4, four()), .malformed),
    Case("unknown type", frame([0x12, 0x34], zeros(46)), .foreignIP),
    Case("no frame", [1, 2, 3], .malformed),
  ]

  @Test(arguments: locked) func guestThatIsHeldToItsAddresses(frame: Case) {
    #expect(verdict(Self.rules(), frame.frame) == frame.verdict, "\(frame)")
  }

  /// What is refused by default, without any address given.
  @Test(arguments: locked) func guestThatIsHeldToItsHardwareAddress(frame: Case) {
    let isNone = ["IPv4 too short", "IPv4 with a header of four bytes", "ARP too short", "IPv6 too short"]
    let expected = frame.verdict == .foreignIP || isNone.contains(frame.description) ? nil : frame.verdict
    #expect(verdict(Self.rules { $0.addresses = nil }, frame.frame) == expected, "\(frame)")
  }

  @Test func guestMayUseTheVLANsThatItIsGiven() {
    let rules = Self.rules { $0.vlans = [7, 4094] }
    let tagged = { (vlan: [UInt8], payload: [UInt8]) in Self.frame([0x81, 0] + vlan + Self.v4, payload) }
    #expect(verdict(rules, tagged([0, 7], Self.four())) == nil)
    #expect(verdict(rules, tagged([0x6f, 0xfe], Self.four())) == nil)
    #expect(verdict(rules, tagged([0, 8], Self.four())) == .foreignProtocol)
    #expect(verdict(rules, tagged([0, 7], Self.four([10, 0, 0, 3]))) == .foreignIP)
    #expect(verdict(rules, Self.frame([0x88, 0xa8, 0, 7, 0x81, 0, 0, 8] + Self.v4, Self.four())) == .foreignProtocol)
  }

  @Test func routerMayAnswer() {
    let rules = Self.rules { $0.mayServe = true }
    let answers = Self.locked.filter {
      ["DHCP answer", "DHCPv6 answer", "router advertisement", "redirect"].contains($0.description)
    }
    #expect(answers.count == 4)
    for answer in answers { #expect(verdict(rules, answer.frame) == nil, "\(answer)") }
    // Its own addresses hold all the same.
    #expect(verdict(rules, Self.frame(Self.v6, Self.six(Self.icmp(136, Self.other6), next: 58))) == .foreignIP)
  }

  /// Any prefix of a frame has a verdict, and none reads behind its end (AddressSanitizer looks).
  @Test(arguments: locked) func prefixOfAFrameIsNoWayAround(frame: Case) {
    for count in 0..<frame.frame.count { _ = verdict(Self.rules(), Array(frame.frame.prefix(count))) }
  }
}
