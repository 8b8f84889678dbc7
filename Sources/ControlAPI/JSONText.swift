import CJSON

/// Text to values and back, by json-c.
package enum JSONText {
  /// Levels of nesting that are read at most.
  package static let depthLimit: Int32 = 32

  /// Why a text is not taken.
  package enum Fault: Error, Equatable {
    case syntax(String, offset: Int)
    case tooDeep
    case empty

    package var message: String {
      switch self {
      case .syntax(let words, let offset): "\(words), at byte \(offset)"
      case .tooDeep: "nested deeper than \(JSONText.depthLimit) levels"
      case .empty: "the text is empty"
      }
    }
  }

  /// Reads one JSON value (RFC 8259).
  ///
  /// - Throws: for text that is not a JSON value, is followed by something else, is nested too deep, or is not UTF-8.
  package static func parse(_ text: [UInt8]) throws(Fault) -> JSONValue { try parse(text) { _ in } }

  /// As above.
  ///
  /// - Parameter found: gets the text as it was looked at, once it is known to be JSON.
  static func parse(_ text: [UInt8], _ found: (JSONScanner) -> Void) throws(Fault) -> JSONValue {
    guard text.contains(where: { $0 != 0x20 && $0 != 0x09 && $0 != 0x0d && $0 != 0x0a }) else { throw .empty }
    let scanner = try JSONScanner(text)
    let prepared = scanner.prepared
    guard let tokener = json_tokener_new_ex(depthLimit) else { throw .syntax("out of memory", offset: 0) }
    defer { json_tokener_free(tokener) }
    json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8)
    // A newline after the text ends a bare number, which json-c would otherwise continue to read.
    let terminated = prepared + [0x0a]
    let object = terminated.withUnsafeBytes {
      json_tokener_parse_ex(tokener, $0.bindMemory(to: CChar.self).baseAddress, Int32(clamping: $0.count))
    }
    defer { json_object_put(object) }
    let error = json_tokener_get_error(tokener)
    let offset = Int(json_tokener_get_parse_end(tokener))
    if error == json_tokener_error_depth { throw .tooDeep }
    guard error == json_tokener_success else {
      let words =
        error == json_tokener_continue ? "the text ends too early" : String(cString: json_tokener_error_desc(error))
      throw .syntax(words, offset: min(offset, text.count))
    }
    guard prepared[min(offset, prepared.count)...].allSatisfy({ $0 == 0x20 || $0 == 0x09 || $0 == 0x0d || $0 == 0x0a })
    else {
      throw .syntax("something follows the value", offset: offset)
    }
    found(scanner)
    return value(of: object)
  }

  private static func value(of object: OpaquePointer?) -> JSONValue {
    guard let object else { return .null }
    switch json_object_get_type(object) {
    case json_type_boolean: return .bool(json_object_get_boolean(object) != 0)
    case json_type_int: return .integer(json_object_get_int64(object))
    case json_type_double:
      // json-c keeps the text of a double that it has read.
      guard let start = json_object_to_json_string_ext(object, JSON_C_TO_STRING_PLAIN) else { return .null }
      var text = String(cString: start)
      if text.hasSuffix(JSONScanner.mark), Int64(text.dropLast(JSONScanner.mark.count)) == nil,
        text.dropLast(JSONScanner.mark.count).utf8.allSatisfy({
          $0 == UInt8(ascii: "-") || $0 >= UInt8(ascii: "0") && $0 <= UInt8(ascii: "9")
        })
      {
        text.removeLast(JSONScanner.mark.count)
      }
      let number = json_object_get_double(object)
      return "\(number)" == text ? .number(number) : .exact(text)
    case json_type_string:
      let length = Int(json_object_get_string_len(object))
      guard let start = json_object_get_string(object) else { return .string("") }
      return .string(String(decoding: UnsafeRawBufferPointer(start: start, count: length), as: UTF8.self))
    case json_type_array:
      return .array((0..<json_object_array_length(object)).map { value(of: json_object_array_get_idx(object, $0)) })
    case json_type_object:
      var members: [JSONValue.Member] = []
      var iterator = json_object_iter_begin(object)
      var end = json_object_iter_end(object)
      while json_object_iter_equal(&iterator, &end) == 0 {
        if let name = json_object_iter_peek_name(&iterator) {
          members.append(
            .init(name: String(cString: name), value: value(of: json_object_iter_peek_value(&iterator))))
        }
        json_object_iter_next(&iterator)
      }
      return .object(members)
    default: return .null
    }
  }

  /// One line of text, without a newline at its end.
  package static func text(_ value: JSONValue, pretty: Bool = false) -> String {
    let object = make(value)
    defer { json_object_put(object) }
    let style = pretty ? JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED : JSON_C_TO_STRING_PLAIN
    guard let text = json_object_to_json_string_ext(object, style | JSON_C_TO_STRING_NOSLASHESCAPE) else {
      return "null"
    }
    return String(cString: text)
  }

  private static func make(_ value: JSONValue) -> OpaquePointer? {
    switch value {
    case .null: return nil
    case .bool(let flag): return json_object_new_boolean(flag ? 1 : 0)
    case .integer(let number): return json_object_new_int64(number)
    // The shortest text that means the number; json-c's own has 17 digits. JSON knows neither NaN nor infinity.
    case .number(let number): return number.isFinite ? json_object_new_double_s(number, "\(number)") : nil
    // json-c writes the text that a double brings with it, whatever it is.
    case .exact(let text), .verbatim(let text): return json_object_new_double_s(0, text)
    case .string(let text):
      var text = text
      return text.withUTF8 { bytes in
        bytes.withMemoryRebound(to: CChar.self) { characters in
          guard let start = characters.baseAddress else { return json_object_new_string("") }
          return json_object_new_string_len(start, Int32(clamping: characters.count))
        }
      }
    case .array(let elements):
      let array = json_object_new_array()
      for element in elements { json_object_array_add(array, make(element)) }
      return array
    case .object(let members):
      let object = json_object_new_object()
      for member in members { json_object_object_add(object, member.name, make(member.value)) }
      return object
    }
  }
}
