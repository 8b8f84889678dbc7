package import Backends
package import ControlAPI
import Devices
import Engines
import EventLoop
import Glibc

/// What is wrong with a file of profiles: where, and what would be right.
package struct ProfileFault: Error, Equatable {
  /// disks[2].queues
  package var field: String
  package var reason: String

  package var message: String { "\(field): \(reason)" }
}

/// Options of disks that libxl cannot carry, from a JSON file:
///
///     {"version": 1, "disks": [{"guest": "db*", "device": "xvde", "queues": 4, "onNoSpace": "hold"}],
///      "guests": [{"guest": "db*", "limits": {"writeBytes": 104857600}, "spareDisks": 2}],
///      "daemon": {"limits": {"readOps": 50000}}}
///
/// `guest` is a name or UUID, `device` a name or number; either may end in `*`, and one that is missing matches all. Every entry that
/// matches is applied, in the file's order.
package struct DiskProfiles: Equatable, Sendable {
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
    var devices: [DeclaredDevice] = []
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
  package init(path: String, isOptional: Bool) throws(ProfileFault) {
    guard let file = fopen(path, "re") else {
      if isOptional && errno == ENOENT {
        self.init()
        return
      }
      throw ProfileFault(field: path, reason: "the file cannot be read: \(Errno.last)")
    }
    defer { fclose(file) }
    var text: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 65536)
    while case let count = fread(&piece, 1, piece.count, file), count > 0 {
      text += piece[..<count]
      guard text.count <= 1 << 20 else { throw ProfileFault(field: path, reason: "the file is larger than 1 MiB") }
    }
    let value: JSONValue
    do throws(JSONText.Fault) {
      value = try JSONText.parse(text)
    } catch {
      switch error {
      case .syntax(let words, let offset):
        throw ProfileFault(field: path, reason: "this is no JSON: \(words), at byte \(offset)")
      case .tooDeep: throw ProfileFault(field: path, reason: "the value is nested too deep")
      case .empty:
        throw ProfileFault(field: path, reason: "the file is empty; {\"version\": 1, \"disks\": []} has no profiles")
      }
    }
    try self.init(value)
  }

  /// Checks a value and takes it.
  package init(_ value: JSONValue) throws(ProfileFault) {
    guard let members = value.objectValue else { throw ProfileFault(field: "file", reason: "an object is wanted") }
    for member in members where !["version", "disks", "guests", "daemon"].contains(member.name) {
      throw ProfileFault(
        field: member.name, reason: "there is no such key; 'version', 'disks', 'guests' and 'daemon' are")
    }
    guard value["version"]?.integerValue == 1 else { throw ProfileFault(field: "version", reason: "it must be 1") }
    guard let disks = (value["disks"] ?? .array([])).arrayValue else {
      throw ProfileFault(field: "disks", reason: "an array is wanted")
    }
    for (index, disk) in disks.enumerated() {
      let place = "disks[\(index)]"
      guard let members = disk.objectValue else { throw ProfileFault(field: place, reason: "an object is wanted") }
      var entry = Entry(guest: "*", device: "*", options: [])
      for member in members {
        switch member.name {
        case "guest": entry.guest = try Self.pattern(member.value, "\(place).guest")
        case "device": entry.device = try Self.pattern(member.value, "\(place).device")
        default: entry.options.append(member)
        }
      }
      // Applied to a disk of no meaning, so that a mistake shows now and not when a guest comes.
      var probe = BlockSettings(path: "/", readOnly: false, discard: false, serial: "")
      try Self.apply(entry.options, to: &probe, place)
      entries.append(entry)
    }
    try readGuests(value["guests"] ?? .array([]))
    for member in try Self.members(value["daemon"] ?? .object([]), "daemon") {
      guard member.name == "limits" else {
        throw ProfileFault(field: "daemon.\(member.name)", reason: "there is no such option; limits is")
      }
      try daemonLimits.change(member.value, "daemon.limits")
    }
  }

  private static func members(_ value: JSONValue, _ field: String) throws(ProfileFault) -> [JSONValue.Member] {
    guard let members = value.objectValue else { throw ProfileFault(field: field, reason: "an object is wanted") }
    return members
  }

  private mutating func readGuests(_ value: JSONValue) throws(ProfileFault) {
    guard let guests = value.arrayValue else { throw ProfileFault(field: "guests", reason: "an array is wanted") }
    for (index, guest) in guests.enumerated() {
      let place = "guests[\(index)]"
      var entry = GuestEntry(pattern: "*", options: GuestOptions())
      for member in try Self.members(guest, place) {
        let field = "\(place).\(member.name)"
        switch member.name {
        case "guest": entry.pattern = try Self.pattern(member.value, field)
        case "limits": try entry.options.limits.change(member.value, field)
        case "spareDisks": entry.options.spareDisks = Int(try OptionReader.number(member.value, field, 0...16))
        case "spareImages": entry.options.spareImages = try SpareImages(member.value, field)
        case "devices":
          for (index, value) in try OptionReader.array(member.value, field).enumerated() {
            guard index < Self.deviceLimit else {
              throw ProfileFault(field: field, reason: "expected at most \(Self.deviceLimit) devices")
            }
            let device = try DeclaredDevice(value, "\(field)[\(index)]", after: entry.options.devices)
            entry.options.devices.append(device)
          }
        default:
          throw ProfileFault(
            field: field, reason: "there is no such option; guest, limits, spareDisks, spareImages and devices are")
        }
      }
      guestEntries.append(entry)
    }
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

  private static func pattern(_ value: JSONValue, _ field: String) throws(ProfileFault) -> String {
    guard let text = value.stringValue, !text.isEmpty else {
      throw ProfileFault(field: field, reason: "a string is wanted")
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
      try? Self.apply(entry.options, to: &settings, "")  // checked by `init`
    }
  }

  // MARK: Options

  private static func apply(
    _ options: [JSONValue.Member], to settings: inout BlockSettings, _ place: String
  ) throws(ProfileFault) {
    var retryMilliseconds: UInt64 = 30_000
    if let seconds = options.first(where: { $0.name == "retrySeconds" }) {
      retryMilliseconds = try OptionReader.number(seconds.value, "\(place).retrySeconds", 1...3600) * 1000
    }
    for option in options {
      let field = "\(place).\(option.name)"
      switch option.name {
      case "queues": settings.queues = Int(try OptionReader.number(option.value, field, 1...64))
      case "threads": settings.threads = Int(try OptionReader.number(option.value, field, 1...64))
      case "queueSize": settings.queueSize = UInt16(try OptionReader.number(option.value, field, 1...32768))
      // libxl wants a target that exists: it names a file then, and the address stands here.
      case "nbd":
        guard let address = option.value.stringValue else {
          throw ProfileFault(field: field, reason: "a string is wanted")
        }
        do throws(ImageFault) {
          settings.path = try NBDAddress(address).text
        } catch {
          throw ProfileFault(field: field, reason: error.message)
        }
      case "packed": settings.packed = try OptionReader.flag(option.value, field)
      case "inOrder": settings.inOrder = try OptionReader.flag(option.value, field)
      case "direct": settings.direct = try OptionReader.flag(option.value, field)
      case "cache":
        let names = BlockCacheMode.allCases.map(\.rawValue).joined(separator: ", ")
        guard let mode = option.value.stringValue.flatMap(BlockCacheMode.init(rawValue:)) else {
          throw ProfileFault(field: field, reason: "one of \(names) is wanted")
        }
        settings.cache = mode
      case "onError": settings.errors.onError = try action(option.value, field, retryMilliseconds)
      case "onNoSpace": settings.errors.onNoSpace = try action(option.value, field, retryMilliseconds)
      case "retrySeconds": break
      case "reconnectSeconds":
        settings.reconnectMilliseconds = try OptionReader.number(option.value, field, 0...86_400) * 1000
      case "stuckSeconds": settings.stuckMilliseconds = try OptionReader.number(option.value, field, 1...86_400) * 1000
      case "bounceMiB": settings.bounceBytes = Int(try OptionReader.number(option.value, field, 1...256)) << 20
      default:
        guard try DeclaredDevice.applyCommon(option, to: &settings, place) else {
          throw ProfileFault(
            field: field,
            reason:
              "there is no such option; nbd, queues, threads, queueSize, packed, inOrder, direct, cache, onError, onNoSpace, "
              + "retrySeconds, reconnectSeconds, stuckSeconds, bounceMiB, \(DeclaredDevice.commonNames) are"
          )
        }
      }
    }
    guard settings.packed || settings.queueSize.nonzeroBitCount == 1 else {
      throw ProfileFault(field: "\(place).queueSize", reason: "a split ring's size is a power of two")
    }
  }

  private static func action(
    _ value: JSONValue, _ field: String, _ retryMilliseconds: UInt64
  ) throws(ProfileFault) -> BlockErrorPolicy.Action {
    switch value.stringValue {
    case "report": return .report
    case "retry": return .retry(milliseconds: retryMilliseconds)
    case "hold": return .hold
    default: throw ProfileFault(field: field, reason: "one of report, retry, hold is wanted")
    }
  }
}
