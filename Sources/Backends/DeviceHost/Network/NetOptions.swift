package import Devices
import Engines
import Glibc
import JSON

/// Options of network devices.
extension NetSettings {
  package static let options = OptionTable<NetSettings>(
    [
      interface(
        "bridge", "create a tap and add it to this bridge (Linux or Open vSwitch)", default: "a tap in no bridge",
        { .created(bridge: $0) },
        { if case .created(let bridge) = $0 { bridge ?? "none" } else { nil } }),
      interface(
        "tap", "use this existing tap instead of creating one", default: "", { .tap($0) },
        { if case .tap(let name) = $0 { name } else { nil } }),
      interface(
        "macvtap", "use this existing macvtap instead of creating a tap", default: "", { .macvtap($0) },
        { if case .macvtap(let name) = $0 { name } else { nil } }),
      OptionRow(
        "mac", .text, "the guest's MAC address, a unicast address",
        default: "derived from the guest's UUID; required in a driver domain that does not know the UUID",
        read: { $0.mac.text }
      ) { (settings: inout NetSettings, given) throws(SettingFault) in
        guard let mac = MACAddress(given.text), !mac.isGroup, mac.value != 0 else {
          throw given.fault(expected: "a unicast MAC address such as 00:16:3e:01:02:03")
        }
        settings.mac = mac
      },
      OptionRow(
        "mtu", .number(68...65_521), "MTU; also announced to the guest", default: "the bridge's",
        read: { $0.mtu.map { "\($0)" } ?? "the bridge's" }
      ) { settings, given in settings.mtu = UInt16(clamping: given.number) },
      .number("queues", 1...16, \.pairs, "number of queue pairs; each has its own thread"),
      OptionRow(
        "queueSize", .powerOfTwo(64...1024), "number of entries of each queue", read: { "\($0.queueSize)" }
      ) { settings, given in settings.queueSize = UInt16(clamping: given.number) },
      OptionRow(
        "link", .choice(["up", "down"]), "initial link state, `up` or `down`; `vxctl link` changes it later",
        read: { $0.isLinkUp ? "up" : "down" }
      ) { settings, given in settings.isLinkUp = given.text == "up" },
      OptionRow(
        "speed", .number(1...1_000_000),
        "link speed in Mbit/s that is reported to the guest (as full duplex); it does not limit anything",
        default: "the bridge's or the interface's, if known", read: { $0.speed.map { "\($0)" } ?? "the bridge's" }
      ) { settings, given in settings.speed = UInt32(clamping: given.number) },
      .flag("macLock", \.locksMAC, "drop packets from the guest with another source MAC address"),
      OptionRow(
        "addresses", .array,
        "drop packets from the guest with a source IP address that is not in this list, also in ARP and neighbour discovery",
        default: "any", read: { $0.addresses.map { "\($0.count) addresses" } ?? "any" }
      ) { (settings: inout NetSettings, given) throws(SettingFault) in
        settings.addresses = try readAddresses(given)
      },
      OptionRow(
        "vlans", .array, "VLAN tags that the guest may send, 1 to 4094; packets with other tags are dropped",
        default: "none", read: { $0.vlans.isEmpty ? "none" : "\($0.vlans.count) VLANs" }
      ) { (settings: inout NetSettings, given) throws(SettingFault) in
        settings.vlans = try readVLANs(given)
      },
      .flag(
        "router", \.mayServe, "allow the guest to send router advertisements, redirects, and answers of a DHCP server"),
      offload("checksum", .checksum, "offer checksum offload, in both directions; the other offloads need it"),
      offload("tso", .tso, "offer TCP segmentation offload"),
      offload("ufo", .ufo, "offer UDP fragmentation offload"),
      offload("uso", .uso, "offer UDP segmentation offload, if the host's kernel supports it (Linux 6.2)"),
      offload("mergeable", .mergeable, "offer mergeable receive buffers"),
    ] + commonRows)

  private static let attachments = ["bridge", "tap", "macvtap"]

  /// What the options say only together.
  static func checkAttachments(_ members: [JSONValue.Member], _ field: String) throws(SettingFault) {
    let given = members.map(\.name).filter(attachments.contains)
    guard given.count <= 1 else {
      throw SettingFault(
        field: "\(field).\(attachments[0])",
        reason: "expected one of \(attachments.joined(separator: ", ")), not \(given.joined(separator: " and "))")
    }
  }

  private static func interface(
    _ name: String, _ help: String, default fallback: String,
    _ attachment: @escaping @Sendable (String) -> NetAttachment,
    _ read: @escaping @Sendable (NetAttachment) -> String?
  ) -> OptionRow<NetSettings> {
    OptionRow(name, .text, help, default: fallback, read: { read($0.attachment) ?? "none" }) {
      (settings: inout NetSettings, given) throws(SettingFault) in
      guard NetworkInterface.isName(given.text) else {
        throw given.fault(expected: "the name of an interface, of at most 15 characters without / and :")
      }
      settings.attachment = attachment(given.text)
    }
  }

  private static func offload(_ name: String, _ offload: Offloads, _ help: String) -> OptionRow<NetSettings> {
    OptionRow(name, .flag, help, read: { "\($0.offloads.contains(offload))" }) { settings, given in
      if given.flag { settings.offloads.insert(offload) } else { settings.offloads.remove(offload) }
    }
  }

  private static func readVLANs(_ given: GivenOption) throws(SettingFault) -> Set<UInt16> {
    var vlans: Set<UInt16> = []
    for (index, value) in (given.value.arrayValue ?? []).enumerated() {
      guard let number = value.integerValue, (1...4094).contains(number) else {
        throw SettingFault("\(given.field)[\(index)]", expected: "a VLAN from 1 to 4094", not: value)
      }
      vlans.insert(UInt16(number))
    }
    return vlans
  }

  private static func readAddresses(_ given: GivenOption) throws(SettingFault) -> [InternetAddress] {
    var addresses: [InternetAddress] = []
    for (index, value) in (given.value.arrayValue ?? []).enumerated() {
      guard let address = value.stringValue.flatMap(InternetAddress.init) else {
        throw SettingFault("\(given.field)[\(index)]", expected: "an IPv4 or IPv6 address", not: value)
      }
      addresses.append(address)
    }
    return addresses
  }
}

extension MACAddress {
  /// The same for the same guest and device whenever it is asked for: Xen's prefix, and a digest (FNV-1a).
  init(of guest: String, _ device: String) {
    var digest: UInt64 = 0xcbf2_9ce4_8422_2325
    for byte in "\(guest)/\(device)".utf8 { digest = (digest ^ UInt64(byte)) &* 0x100_0000_01b3 }
    self.init(value: 0x0016_3e00_0000 | (digest ^ digest >> 32) & 0x7f_ffff)
  }
}

extension InternetAddress {
  /// As people write it; nil for anything else.
  package init?(_ text: String) {
    var four = in_addr()
    if inet_pton(AF_INET, text, &four) == 1 {
      self.init(version4: UInt32(bigEndian: four.s_addr))
      return
    }
    var six = in6_addr()
    guard inet_pton(AF_INET6, text, &six) == 1 else { return nil }
    let (high, low) = withUnsafeBytes(of: &six) {
      (UInt64(bigEndian: $0.load(as: UInt64.self)), UInt64(bigEndian: $0.load(fromByteOffset: 8, as: UInt64.self)))
    }
    self.init(version6: high, low)
  }
}
