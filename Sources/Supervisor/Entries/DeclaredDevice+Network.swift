import Backends
import ControlAPI
import Devices
import Engines
import Glibc
import Xen

/// Options of network devices.
extension DeclaredDevice {
  private static let networkNames =
    "bridge, tap, macvtap, mac, mtu, queues, queueSize, link, macLock, addresses, vlans, router, checksum, tso, ufo, uso, mergeable"

  func network(_ owner: Owner, _ field: String) throws(ProfileFault) -> NetSettings {
    var settings = NetSettings(
      attachment: .created(bridge: nil), tapName: "vx\(owner.domain).\(owner.tapSuffix)",
      mac: Self.address(owner.uuid ?? owner.guest, name))
    var attachments = 0
    for member in options {
      let place = "\(field).\(member.name)"
      switch member.name {
      case "bridge", "tap", "macvtap":
        let interface = try Self.interface(member.value, place)
        settings.attachment =
          member.name == "bridge"
          ? .created(bridge: interface) : member.name == "tap" ? .tap(interface) : .macvtap(interface)
        attachments += 1
      case "mac":
        guard let mac = MACAddress(try OptionReader.text(member.value, place)), !mac.isGroup, mac.value != 0 else {
          throw ProfileFault(
            field: place, reason: "a hardware address of one station is wanted, such as 00:16:3e:01:02:03")
        }
        settings.mac = mac
      case "mtu": settings.mtu = UInt16(try OptionReader.number(member.value, place, 68...65_521))
      case "queues": settings.pairs = Int(try OptionReader.number(member.value, place, 1...16))
      case "queueSize":
        let size = try OptionReader.number(member.value, place, 64...1024)
        guard size.nonzeroBitCount == 1 else {
          throw ProfileFault(field: place, reason: "a power of two from 64 to 1024 is wanted")
        }
        settings.queueSize = UInt16(size)
      case "link":
        guard let text = member.value.stringValue, text == "up" || text == "down" else {
          throw ProfileFault(field: place, reason: "'up' or 'down' is wanted")
        }
        settings.isLinkUp = text == "up"
      case "macLock": settings.locksMAC = try OptionReader.flag(member.value, place)
      case "addresses":
        var addresses: [InternetAddress] = []
        for (index, value) in try OptionReader.array(member.value, place).enumerated() {
          let text = try OptionReader.text(value, "\(place)[\(index)]")
          guard let address = InternetAddress(text) else {
            throw ProfileFault(field: "\(place)[\(index)]", reason: "'\(text)' is no IPv4 or IPv6 address")
          }
          addresses.append(address)
        }
        settings.addresses = addresses
      case "vlans":
        var vlans: Set<UInt16> = []
        for (index, value) in try OptionReader.array(member.value, place).enumerated() {
          vlans.insert(UInt16(try OptionReader.number(value, "\(place)[\(index)]", 1...4094)))
        }
        settings.vlans = vlans
      case "router": settings.mayServe = try OptionReader.flag(member.value, place)
      case "checksum": try Self.switchOffload(.checksum, member.value, place, &settings)
      case "tso": try Self.switchOffload(.tso, member.value, place, &settings)
      case "ufo": try Self.switchOffload(.ufo, member.value, place, &settings)
      case "uso": try Self.switchOffload(.uso, member.value, place, &settings)
      case "mergeable": try Self.switchOffload(.mergeable, member.value, place, &settings)
      default:
        guard try Self.applyCommon(member, to: &settings, field) else {
          throw ProfileFault(
            field: place, reason: "there is no such option; \(Self.networkNames), \(Self.commonNames) are")
        }
      }
    }
    guard attachments <= 1 else {
      throw ProfileFault(field: "\(field).bridge", reason: "only one of bridge, tap and macvtap can be given")
    }
    return settings
  }

  private static func switchOffload(
    _ offload: NetSettings.Offloads, _ value: JSONValue, _ field: String, _ settings: inout NetSettings
  ) throws(ProfileFault) {
    if try OptionReader.flag(value, field) {
      settings.offloads.insert(offload)
    } else {
      settings.offloads.remove(offload)
    }
  }

  private static func interface(_ value: JSONValue, _ field: String) throws(ProfileFault) -> String {
    let name = try OptionReader.text(value, field)
    guard NetworkInterface.isName(name) else {
      throw ProfileFault(field: field, reason: "'\(name)' is no name of an interface (15 characters at most)")
    }
    return name
  }

  /// The same for the same guest and device whenever it is asked for: Xen's prefix, and a digest (FNV-1a).
  private static func address(_ guest: String, _ device: String) -> MACAddress {
    var digest: UInt64 = 0xcbf2_9ce4_8422_2325
    for byte in "\(guest)/\(device)".utf8 { digest = (digest ^ UInt64(byte)) &* 0x100_0000_01b3 }
    return MACAddress(value: 0x0016_3e00_0000 | (digest ^ digest >> 32) & 0x7f_ffff)
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
