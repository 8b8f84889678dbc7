package import JSON

/// One option as operators write it in a profile: what parsing, messages and the manual need of it. What it means is in the row of a
/// table (`OptionRow`) that has it.
package struct DeviceOption: Sendable {
  package enum Kind: Sendable {
    case flag
    /// A whole number.
    case number(ClosedRange<Int64>)
    case powerOfTwo(ClosedRange<Int64>)
    /// A whole number; 0 and null are no limit.
    case limit(ClosedRange<Int64>)
    case choice([String])
    case text
    /// An absolute path of so many bytes at most: short enough for the address of a socket where it is one.
    case path(limit: Int)
    case array
    case object
  }

  package let name: String
  package let kind: Kind
  /// One line for the manual, in Markdown.
  package let help: String
  /// The default in words, where it is not a value of its own.
  package let fallback: String?

  /// What the value must be, as a message says it.
  package var expected: String {
    switch kind {
    case .flag: "true or false"
    case .number(let range): "a whole number from \(range.lowerBound) to \(range.upperBound)"
    case .powerOfTwo(let range): "a power of two from \(range.lowerBound) to \(range.upperBound)"
    case .limit(let range):
      "a whole number from \(range.lowerBound) to \(range.upperBound), or 0 for no limit"
    case .choice(let names): "one of \(names.joined(separator: ", "))"
    case .text: "a string"
    case .path(let limit): "an absolute path of at most \(limit) bytes"
    case .array: "an array"
    case .object: "an object"
    }
  }

  /// Its range, for the manual; nil where there is none, or where the help explains each value.
  package var range: String? {
    switch kind {
    case .number(let range), .limit(let range): "\(range.lowerBound) to \(range.upperBound)"
    case .powerOfTwo(let range): "a power of two from \(range.lowerBound) to \(range.upperBound)"
    case .flag, .choice, .text, .path, .array, .object: nil
    }
  }

  /// Whether a value is of the kind.
  package func allows(_ value: JSONValue) -> Bool {
    switch kind {
    case .flag: value.boolValue != nil
    case .number(let range): value.integerValue.map(range.contains) ?? false
    case .powerOfTwo(let range): value.integerValue.map { range.contains($0) && $0.nonzeroBitCount == 1 } ?? false
    case .limit(let range): value == .null || (value.integerValue.map { $0 == 0 || range.contains($0) } ?? false)
    case .choice(let names): value.stringValue.map(names.contains) ?? false
    case .text: value.stringValue.map { !$0.isEmpty } ?? false
    case .path(let limit):
      value.stringValue.map { $0.hasPrefix("/") && $0.utf8.count <= limit && !$0.utf8.contains(0) } ?? false
    case .array: value.arrayValue != nil
    case .object: value.objectValue != nil
    }
  }
}

/// A value that an option was given, of the kind that it has, and where it stands.
package struct GivenOption {
  package let value: JSONValue
  package let field: String

  /// The value of a number; 0 where it is none.
  package var number: UInt64 { UInt64(clamping: value.integerValue ?? 0) }
  package var flag: Bool { value.boolValue ?? false }
  package var text: String { value.stringValue ?? "" }

  package func fault(expected: String) -> SettingFault { SettingFault(field, expected: expected, not: value) }
}

/// An option of a table with what it does to the settings that the table is for.
package struct OptionRow<Settings>: Sendable {
  let option: DeviceOption
  /// The option's value as profiles write it.
  let read: @Sendable (Settings) -> String
  let apply: @Sendable (inout Settings, GivenOption) throws(SettingFault) -> Void

  package init(
    _ name: String, _ kind: DeviceOption.Kind, _ help: String, default fallback: String? = nil,
    read: @escaping @Sendable (Settings) -> String,
    apply: @escaping @Sendable (inout Settings, GivenOption) throws(SettingFault) -> Void
  ) {
    option = DeviceOption(name: name, kind: kind, help: help, fallback: fallback)
    self.read = read
    self.apply = apply
  }
}

// Rows that only store their value.
extension OptionRow {
  package typealias Member<Value> = any WritableKeyPath<Settings, Value> & Sendable

  package static func flag(
    _ name: String, _ member: Member<Bool>, _ help: String, default fallback: String? = nil
  ) -> Self {
    Self(name, .flag, help, default: fallback, read: { "\($0[keyPath: member])" }) { $0[keyPath: member] = $1.flag }
  }

  /// - Parameter unit: the member's value for 1: 1000 where the option has seconds and the member milliseconds.
  package static func number<Value: FixedWidthInteger & Sendable>(
    _ name: String, _ range: ClosedRange<Int64>, _ member: Member<Value>, unit: Value = 1, _ help: String,
    default fallback: String? = nil
  ) -> Self {
    Self(name, .number(range), help, default: fallback, read: { "\($0[keyPath: member] / unit)" }) {
      // The range is the option's: it is for whoever declares it that the product fits.
      $0[keyPath: member] = Value(clamping: $1.number) * unit
    }
  }

  package static func limit(
    _ name: String, _ range: ClosedRange<Int64>, _ member: Member<UInt64?>, _ help: String
  ) -> Self {
    Self(
      name, .limit(range), help, default: "no limit", read: { $0[keyPath: member].map { "\($0)" } ?? "no limit" }
    ) {
      $0[keyPath: member] = $1.number == 0 ? nil : $1.number
    }
  }

  package static func choice<Value: RawRepresentable & CaseIterable & Sendable>(
    _ name: String, _ member: Member<Value>, _ help: String, default fallback: String? = nil
  ) -> Self where Value.RawValue == String {
    Self(
      name, .choice(Value.allCases.map(\.rawValue)), help, default: fallback,
      read: { $0[keyPath: member].rawValue }
    ) {
      if let value = Value(rawValue: $1.text) { $0[keyPath: member] = value }
    }
  }
}
