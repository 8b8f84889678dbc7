package import ControlAPI
package import DeviceHost
import Devices
import EventLoop
import Glibc
import Lifecycle

/// Options of disks that libxl cannot carry, from a JSON file:
///
///     {"version": 1, "disks": [{"guest": "db*", "device": "xvde", "queues": 4, "onNoSpace": "hold"}],
///      "guests": [{"guest": "db*", "limits": {"writeBytes": 104857600}, "spareDisks": 2}],
///      "daemon": {"limits": {"readOps": 50000}}}
///
/// `guest` is a name or UUID, `device` a name or number; either may end in `*`, and one that is missing matches all. Every entry that
/// matches is applied, in the file's order.
package struct Profiles: Equatable, Sendable {
  private struct Entry: Equatable, Sendable {
    var guest: String
    var device: String
    var options: [JSONValue.Member]
  }

  private struct GuestEntry: Equatable, Sendable {
    var pattern: String
    var options: GuestOptions
  }

  /// Options of a guest as a whole.
  struct GuestOptions: Equatable, Sendable {
    var limits = RateLimits()
    /// Disks of no size that `vxctl attach` fills.
    var spareDisks = 0
    /// What role operate may attach there.
    var spareImages = SpareImages()
    /// Network, console and entropy devices.
    var devices: [ProfileDevice] = []
    /// How the guest finds its devices.
    var transport = RegisterTransport.mmio

    static func options(_ types: [any DeviceSettings.Type]) -> OptionTable<GuestOptions> {
      OptionTable([
        OptionRow(
          "limits", .object, "limits of all devices of the guest together", default: "none", read: { _ in "" }
        ) { (guest: inout GuestOptions, given) throws(SettingFault) in
          try guest.limits.change(given.value, given.field)
        },
        .number(
          "spareDisks", 0...16, \.spareDisks,
          "number of placeholder disks of size 0, to be filled by `vxctl attach` (HVM guests)"),
        .choice(
          "transport", \.transport,
          "how an HVM guest finds its devices: `mmio` (slots in an ACPI table) or `pci` (functions on its PCI bus); a device's own `transport` overrides it. It does not change while the guest exists"
        ),
        OptionRow(
          "spareImages", .array, "images that the role operate may attach to the guest and grow; see below",
          default: "none", read: { _ in "" }
        ) { (guest: inout GuestOptions, given) throws(SettingFault) in
          guest.spareImages = try SpareImages(given.value.arrayValue ?? [], given.field)
        },
        OptionRow(
          "devices", .array, "up to 64 network, console and entropy devices; see below", default: "none",
          read: { _ in "" }
        ) { (guest: inout GuestOptions, given) throws(SettingFault) in
          for (index, value) in (given.value.arrayValue ?? []).enumerated() {
            guard index < deviceLimit else {
              throw SettingFault(field: given.field, reason: "expected at most \(deviceLimit) devices")
            }
            let device = try ProfileDevice(value, "\(given.field)[\(index)]", types: types, after: guest.devices)
            guest.devices.append(device)
          }
        },
      ])
    }
  }

  /// Options of all guests together.
  private static let daemonOptions = OptionTable<RateLimits>([
    OptionRow("limits", .object, "limits of all guests together", default: "none", read: { _ in "" }) {
      (limits: inout RateLimits, given) throws(SettingFault) in try limits.change(given.value, given.field)
    }
  ])

  /// The tables of docs/profiles.md.
  package static var documents: [OptionDocument] {
    [
      OptionDocument(title: "Common options", rows: EntropySettings.options.document("", EntropySettings()).rows),
      GuestOptions.options(DeviceTypes.all).document("Guests", GuestOptions()),
      RateLimits.options.document("Limits", RateLimits()),
    ] + DeviceTypes.all.flatMap { $0.documents }
  }

  /// Devices of a guest at most.
  private static let deviceLimit = 64
  private var entries: [Entry] = []
  private var guestEntries: [GuestEntry] = []
  /// How much there is to look at for each device.
  var count: Int { entries.count + guestEntries.count }
  /// Limits of all guests together.
  private(set) var daemonLimits = RateLimits()

  /// No profiles: every disk has the defaults.
  package init() {}

  /// Reads a file.
  ///
  /// - Parameter isOptional: a file that is not there is an empty one.
  package init(path: String, isOptional: Bool) throws(SettingFault) {
    guard let file = fopen(path, "re") else {
      if isOptional && errno == ENOENT {
        self.init()
        return
      }
      throw SettingFault(field: path, reason: "the file cannot be read: \(Errno.last)")
    }
    defer { fclose(file) }
    var text: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 65536)
    while case let count = fread(&piece, 1, piece.count, file), count > 0 {
      text += piece[..<count]
      guard text.count <= 1 << 20 else { throw SettingFault(field: path, reason: "the file is larger than 1 MiB") }
    }
    let value: JSONValue
    do throws(JSONText.Fault) {
      value = try JSONText.parse(text)
    } catch {
      switch error {
      case .syntax(let words, let offset):
        throw SettingFault(field: path, reason: "expected JSON: \(words), at byte \(offset)")
      case .tooDeep: throw SettingFault(field: path, reason: "the value is nested too deep")
      case .empty:
        throw SettingFault(field: path, reason: "the file is empty; {\"version\": 1, \"disks\": []} has no profiles")
      }
    }
    try self.init(value)
  }

  /// Checks a value and takes it.
  ///
  /// - Parameter types: those of devices that can be declared.
  package init(_ value: JSONValue, types: [any DeviceSettings.Type] = DeviceTypes.all) throws(SettingFault) {
    let keys = ["version", "disks", "guests", "daemon"]
    for member in try Self.members(value, "file") where !keys.contains(member.name) {
      throw SettingFault(member.name, unknown: member.name, known: keys)
    }
    guard value["version"]?.integerValue == 1 else {
      throw SettingFault("version", expected: "1", not: value["version"] ?? .null)
    }
    for (index, disk) in try Self.array(value["disks"], "disks").enumerated() {
      let place = "disks[\(index)]"
      var entry = Entry(guest: "*", device: "*", options: [])
      for member in try Self.members(disk, place) {
        switch member.name {
        case "guest": entry.guest = try Self.pattern(member.value, "\(place).guest")
        case "device": entry.device = try Self.pattern(member.value, "\(place).device")
        default: entry.options.append(member)
        }
      }
      // Applied to a disk of no meaning, so that a mistake shows now and not when a guest comes.
      var probe = BlockSettings(path: "/", readOnly: false, discard: false, serial: "")
      try probe.apply(entry.options, place)
      entries.append(entry)
    }
    let table = GuestOptions.options(types)
    for (index, guest) in try Self.array(value["guests"], "guests").enumerated() {
      let place = "guests[\(index)]"
      var entry = GuestEntry(pattern: "*", options: GuestOptions())
      let members = try Self.members(guest, place)
      for member in members where member.name == "guest" {
        entry.pattern = try Self.pattern(member.value, "\(place).guest")
      }
      try table.apply(members, to: &entry.options, place, others: ["guest"])
      guestEntries.append(entry)
    }
    try Self.daemonOptions.apply(
      try Self.members(value["daemon"] ?? .object([]), "daemon"), to: &daemonLimits, "daemon")
  }

  private static func members(_ value: JSONValue, _ field: String) throws(SettingFault) -> [JSONValue.Member] {
    guard let members = value.objectValue else { throw SettingFault(field, expected: "an object", not: value) }
    return members
  }

  private static func array(_ value: JSONValue?, _ field: String) throws(SettingFault) -> [JSONValue] {
    guard let value else { return [] }
    guard let array = value.arrayValue else { throw SettingFault(field, expected: "an array", not: value) }
    return array
  }

  /// Options of a guest: those of the last entry that matches.
  func options(guest: String, uuid: String?) -> GuestOptions {
    guestEntries.last { entry in
      Self.matches(entry.pattern, guest) || uuid.map { Self.matches(entry.pattern, $0) } == true
    }?.options ?? GuestOptions()
  }

  /// Whether a guest is called by its number, as in a driver domain, where that matches nothing.
  var namesNumbers: Bool { (entries.map(\.guest) + guestEntries.map(\.pattern)).contains { $0.hasPrefix("domain-") } }

  /// Whether any guest has devices that vxd is to make.
  var declaresDevices: Bool { guestEntries.contains { $0.options.devices.contains(where: \.isCreated) } }

  private static func pattern(_ value: JSONValue, _ field: String) throws(SettingFault) -> String {
    guard let text = value.stringValue, !text.isEmpty else {
      throw SettingFault(field, expected: "a string", not: value)
    }
    return text
  }

  private static func matches(_ pattern: String, _ text: String) -> Bool {
    pattern.hasSuffix("*") ? text.hasPrefix(pattern.dropLast()) : text == pattern
  }

  /// Gives a disk the options that are meant for it.
  package func apply(to settings: inout BlockSettings, guest: String, uuid: String?, device: String, number: UInt32) {
    for entry in entries
    where (Self.matches(entry.guest, guest) || uuid.map { Self.matches(entry.guest, $0) } == true)
      && (Self.matches(entry.device, device) || entry.device == "\(number)")
    {
      try? settings.apply(entry.options, "")  // checked by `init`
    }
  }
}
