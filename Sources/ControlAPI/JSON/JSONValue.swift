/// A JSON value. Objects keep the order of their members.
package enum JSONValue: Equatable, Sendable {
  case null
  case bool(Bool)
  case integer(Int64)
  case number(Double)
  /// A number in the words of its sender, where neither an Int64 nor a Double's own text is the same: `18446744073709551615`, `1e3`. So that an
  /// id comes back as it was.
  case exact(String)
  /// The text of a JSON value, which is written as it is; no text is ever read as one.
  case verbatim(String)
  case string(String)
  case array([JSONValue])
  case object([Member])

  /// A name and its value.
  package struct Member: Equatable, Sendable {
    package var name: String
    package var value: JSONValue

    package init(name: String, value: JSONValue) {
      self.name = name
      self.value = value
    }
  }

  /// The member of an object; nil where there is none.
  package subscript(name: String) -> JSONValue? {
    guard case .object(let members) = self else { return nil }
    return members.first { $0.name == name }?.value
  }

  package var stringValue: String? { if case .string(let value) = self { value } else { nil } }
  package var integerValue: Int64? { if case .integer(let value) = self { value } else { nil } }
  package var boolValue: Bool? { if case .bool(let value) = self { value } else { nil } }
  package var arrayValue: [JSONValue]? { if case .array(let value) = self { value } else { nil } }
  package var objectValue: [Member]? { if case .object(let value) = self { value } else { nil } }

  /// The value as a count; counts beyond 2^63 do not occur.
  package static func count(_ value: some BinaryInteger) -> JSONValue { .integer(Int64(clamping: value)) }

  /// What kind of value it is, in JSON's words.
  package var kind: String {
    switch self {
    case .null: "null"
    case .bool: "boolean"
    case .integer: "integer"
    case .number, .exact: "number"
    case .string: "string"
    case .array: "array"
    case .object: "object"
    case .verbatim: "JSON"
    }
  }
}

extension JSONValue: ExpressibleByStringLiteral, ExpressibleByBooleanLiteral, ExpressibleByIntegerLiteral,
  ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral
{
  package init(stringLiteral value: String) { self = .string(value) }
  package init(booleanLiteral value: Bool) { self = .bool(value) }
  package init(integerLiteral value: Int64) { self = .integer(value) }
  package init(arrayLiteral elements: JSONValue...) { self = .array(elements) }
  package init(dictionaryLiteral elements: (String, JSONValue)...) {
    self = .object(elements.map { Member(name: $0.0, value: $0.1) })
  }
}

extension JSONValue {
  /// The value in a message that refuses it: as it was written where that is short, its kind otherwise.
  package var brief: String {
    switch self {
    case .null: "null"
    case .bool(let value): "\(value)"
    case .integer(let value): "\(value)"
    case .number(let value): "\(value)"
    case .exact(let text): text.utf8.count <= 40 ? text : "a number"
    case .string(let text):
      text.utf8.count <= 80 && !text.unicodeScalars.contains { $0.value < 32 } ? "\"\(text)\"" : "a longer text"
    case .array: "an array"
    case .object: "an object"
    case .verbatim: "a text of JSON"
    }
  }
}
