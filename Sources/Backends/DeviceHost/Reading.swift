import Devices
import Engines
package import JSON
package import Transport

/// What operators see of something while it works: a value, or gauges with how their numbers are told, which are read when somebody asks.
///
/// Invariant: nothing but values and gauges can be put into one, no function and no object of another kind. So who keeps a reading keeps nothing of
/// what it is of, and cannot call into it.
package enum Reading: Sendable {
  case value(JSONValue)
  case count(Gauge)
  /// In hexadecimal.
  case address(Gauge)
  /// Whether a bit is set, 0 to 63.
  case flag(Gauge, bit: Int)
  /// One of several, by number; the last of them for every greater one. There is at least one.
  case choice(Gauge, [Reading])
  /// One text of several, one behind the other.
  case text([Reading])
  /// The MTU of a network interface of the host by this name, as the kernel says when it is asked; 1500 where there is none.
  case mtu(interface: String)
  case list([[Member]])

  package struct Member: Sendable {
    package var name: String
    package var reading: Reading

    package init(_ name: String, _ reading: Reading) {
      self.name = name
      self.reading = reading
    }

    package init(_ name: String, _ value: JSONValue) { self.init(name, .value(value)) }

    package var json: JSONValue.Member { JSONValue.Member(name: name, value: reading.json) }
  }

  /// As it is now.
  package var json: JSONValue {
    switch self {
    case .value(let value): value
    case .count(let gauge): .count(gauge.value)
    case .address(let gauge): .string("0x" + String(gauge.value, radix: 16))
    case .flag(let gauge, let bit): .bool(ConsolePortBoard.bit(gauge.value, bit))
    case .choice(let gauge, let readings): readings[min(Int(clamping: gauge.value), readings.count - 1)].json
    case .text(let readings): .string(readings.map(\.words).joined())
    case .mtu(let interface): .count(TapDevice.mtu(of: interface))
    case .list(let items): .array(items.map { .object($0.map(\.json)) })
    }
  }

  /// As it is now, for people.
  package var words: String {
    switch json {
    case .string(let text): text
    case .integer(let number): "\(number)"
    case .bool(let isSo): isSo ? "yes" : "no"
    case let other: other.brief
    }
  }
}

extension Reading: ExpressibleByStringInterpolation {
  package init(stringLiteral text: String) { self = .value(.string(text)) }
}
