import ArgumentParser
import ControlAPI

/// What an option or argument takes that is not any text. Read by `value`, so that one that is refused is refused with what was expected.
protocol CommandValue {
  /// After "expected ...": a noun phrase.
  static var expected: String { get }

  /// nil for a text that is none.
  init?(argument: String)
}

extension CommandValue {
  /// For `transform:` of options and arguments.
  ///
  /// - Throws: what was expected; the parser puts the option and the value before it.
  static func value(_ text: String) throws -> Self {
    guard let value = Self(argument: text) else { throw ValidationError("expected \(expected)") }
    return value
  }
}

extension CommandValue where Self: CaseIterable & RawRepresentable, RawValue == String {
  static var expected: String { allCases.map(\.rawValue).alternatives }

  init?(argument: String) { self.init(rawValue: argument) }
}

extension [String] {
  /// "a, b or c".
  var alternatives: String {
    count < 2 ? joined() : dropLast().joined(separator: ", ") + " or " + (last ?? "")
  }
}

/// Readers for `transform:` of numbers and texts: values out of range are refused before they are used.
enum Value {
  typealias Reader<Result> = @Sendable (String) throws -> Result

  static func number<Number: FixedWidthInteger & Sendable>(
    _ range: ClosedRange<Number>, of things: String = ""
  ) -> Reader<Number> {
    { text in
      guard let number = Number(text), range.contains(number) else {
        let upTo = range.upperBound == .max ? "\(range.lowerBound) on" : "\(range.lowerBound) to \(range.upperBound)"
        throw ValidationError("expected a number\(things.isEmpty ? "" : " of \(things)") from \(upTo)")
      }
      return number
    }
  }

  /// A whole number of seconds, up to a day.
  static let seconds: Reader<Int> = number(0...86_400, of: "seconds")

  /// A pause, from a tenth of a second to an hour.
  static func pause(_ text: String) throws -> Double {
    guard let seconds = Double(text), (0.1...3600).contains(seconds) else {
      throw ValidationError("expected a number of seconds from 0.1 to 3600")
    }
    return seconds
  }

  /// Any text but an empty one.
  ///
  /// - Parameter what: "a path".
  static func text(_ what: String, upTo limit: Int = .max) -> Reader<String> {
    { text in
      guard !text.isEmpty, text.utf8.count <= limit else { throw ValidationError("expected \(what)") }
      return text
    }
  }

  static let path: Reader<String> = text("a path")
}
