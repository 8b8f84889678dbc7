import ControlAPI
import Devices

/// Limits as profiles and the control socket write them:
///
///     {"readOps": 500, "writeOps": 200, "readBytes": 10485760, "writeBytes": 5242880, "burstMilliseconds": 100, "inFlight": 16}
///
/// Rates are by the second; null or 0 is no limit.
extension RateLimits {
  static let memberNames = "readOps, writeOps, readBytes, writeBytes, burstMilliseconds, inFlight"

  /// Changes what the value names, and leaves the rest.
  ///
  /// - Parameter field: where the value stands, for the message.
  mutating func change(_ value: JSONValue, _ field: String) throws(ProfileFault) {
    guard let members = value.objectValue else {
      throw ProfileFault(field: field, reason: "an object with \(Self.memberNames) is wanted")
    }
    for member in members {
      let place = "\(field).\(member.name)"
      func number(_ range: ClosedRange<Int64>) throws(ProfileFault) -> UInt64? {
        if case .null = member.value { return nil }
        guard let number = member.value.integerValue, number == 0 || range.contains(number) else {
          throw ProfileFault(
            field: place,
            reason: "a whole number from \(range.lowerBound) to \(range.upperBound) is wanted; 0 is no limit")
        }
        return number == 0 ? nil : UInt64(number)
      }
      switch member.name {
      case "readOps": readOperations = try number(1...1_000_000_000)
      case "writeOps": writeOperations = try number(1...1_000_000_000)
      case "readBytes": readBytes = try number(512...1_000_000_000_000)
      case "writeBytes": writeBytes = try number(512...1_000_000_000_000)
      case "burstMilliseconds": burstMilliseconds = try number(1...60_000) ?? 100
      case "inFlight": inFlight = try number(1...32_768)
      default: throw ProfileFault(field: place, reason: "there is no such limit; \(Self.memberNames) are")
      }
    }
  }

  var json: JSONValue {
    func count(_ value: UInt64?) -> JSONValue { value.map { .count($0) } ?? .null }
    return [
      "readOps": count(readOperations), "writeOps": count(writeOperations), "readBytes": count(readBytes),
      "writeBytes": count(writeBytes), "burstMilliseconds": .count(burstMilliseconds), "inFlight": count(inFlight),
    ]
  }
}
