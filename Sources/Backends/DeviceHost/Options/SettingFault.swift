package import JSON

/// What is wrong with an option: where it stands, and what was expected there.
package struct SettingFault: Error, Equatable {
  /// disks[2].queues
  package var field: String
  package var reason: String

  package init(field: String, reason: String) {
    self.field = field
    self.reason = reason
  }

  /// - Parameter expected: "a whole number from 1 to 32".
  package init(_ field: String, expected: String, not value: JSONValue) {
    self.init(field: field, reason: "expected \(expected), not \(value.brief)")
  }

  /// An option that is not there.
  ///
  /// - Parameter known: those that are.
  package init(_ field: String, unknown name: String, known: [String]) {
    let near = known.first { Self.isNear($0, name) }
    self.init(
      field: field,
      reason:
        "unknown option\(near.map { "; did you mean \"\($0)\"?" } ?? "") (expected one of \(known.joined(separator: ", ")))"
    )
  }

  package var message: String { "\(field): \(reason)" }

  /// Whether two names differ by one letter that is missing, wrong or too much, or by capitals.
  private static func isNear(_ known: String, _ given: String) -> Bool {
    let (long, short) =
      known.utf8.count >= given.utf8.count
      ? (Array(known.lowercased().utf8), Array(given.lowercased().utf8))
      : (Array(given.lowercased().utf8), Array(known.lowercased().utf8))
    guard long.count - short.count <= 1 else { return false }
    let start = zip(long, short).prefix { $0 == $1 }.count
    let end = zip(long.dropFirst(start + 1), short.dropFirst(start + (long.count == short.count ? 1 : 0)))
    return end.allSatisfy { $0 == $1 }
  }
}
