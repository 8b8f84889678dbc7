import Devices
package import JSON
package import Lifecycle

/// What devices of every type have.
extension DeviceSettings {
  /// For the end of each type's table.
  package static var commonRows: [OptionRow<Self>] {
    [
      OptionRow(
        "limits", .object, "see Limits", default: "none", read: { $0.limits.text }
      ) { (settings: inout Self, given) throws(SettingFault) in
        try settings.limits.change(given.value, given.field)
      },
      OptionRow.choice(
        "restart", \.restart.mode,
        "when a failed backend is restarted: `never`; `on-failure`: when its storage has disappeared; `always`: also when the guest broke a virtqueue"
      ),
      OptionRow.number(
        "restartLimit", 1...1000, \.restart.limit,
        "how many restarts are allowed within `restartWindowSeconds`; after that, the device is quarantined"
      ),
      OptionRow.number(
        "restartWindowSeconds", 1...86_400, \.restart.windowSeconds, "the period in which restarts are counted"),
      OptionRow(
        "slot", .number(3...31), "device number on the guest's PCI bus; only with the transport `pci`",
        default: "chosen by vxd", read: { $0.slot.map { "\($0)" } ?? "chosen by vxd" }
      ) { settings, given in settings.slot = UInt8(clamping: given.number) },
      OptionRow(
        "transport", .choice(RegisterTransport.allCases.map(\.rawValue)),
        "how an HVM guest finds this device: `mmio` or `pci`, as for the guest", default: "the guest's",
        read: { $0.transport?.rawValue ?? "the guest's" }
      ) { $0.transport = RegisterTransport(rawValue: $1.text) },
    ]
  }
}

/// Limits as profiles and the control socket write them:
///
///     {"readOps": 500, "writeOps": 200, "readBytes": 10485760, "writeBytes": 5242880, "burstMilliseconds": 100, "inFlight": 16}
///
/// Rates are by the second; null or 0 is no limit.
extension RateLimits {
  package static let options = OptionTable<RateLimits>([
    .limit("readOps", 1...1_000_000_000, \.readOperations, "read requests per second"),
    .limit("writeOps", 1...1_000_000_000, \.writeOperations, "write requests per second"),
    .limit("readBytes", 512...1_000_000_000_000, \.readBytes, "bytes read per second"),
    .limit("writeBytes", 512...1_000_000_000_000, \.writeBytes, "bytes written per second"),
    OptionRow(
      "burstMilliseconds", .limit(1...60_000), "burst: how many milliseconds of unused rate can accumulate",
      read: { "\($0.burstMilliseconds)" }
    ) { $0.burstMilliseconds = $1.number == 0 ? RateLimits().burstMilliseconds : $1.number },
    .limit("inFlight", 1...32_768, \.inFlight, "requests in progress at a time"),
  ])

  package static var memberNames: String { options.rows.map(\.option.name).joined(separator: ", ") }

  /// Changes what the value names, and leaves the rest.
  ///
  /// - Parameter field: where the value stands, for the message.
  package mutating func change(_ value: JSONValue, _ field: String) throws(SettingFault) {
    guard let members = value.objectValue else {
      throw SettingFault(field, expected: "an object with \(Self.memberNames)", not: value)
    }
    try Self.options.apply(members, to: &self, field)
  }

  package var json: JSONValue {
    func count(_ value: UInt64?) -> JSONValue { value.map { .count($0) } ?? .null }
    return [
      "readOps": count(readOperations), "writeOps": count(writeOperations), "readBytes": count(readBytes),
      "writeBytes": count(writeBytes), "burstMilliseconds": .count(burstMilliseconds), "inFlight": count(inFlight),
    ]
  }

  /// Those that are set.
  var text: String {
    let plain = Self.options.texts(RateLimits())
    let set = zip(Self.options.texts(self), plain).filter { $0.value != $1.value }.map(\.0)
    return set.isEmpty ? "none" : set.map { "\($0.name) \($0.value)" }.joined(separator: ", ")
  }
}
