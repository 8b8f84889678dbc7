import ArgumentParser

/// Readers of times on the command line: values out of range are refused before they are used.
enum Seconds {
  /// A whole number of seconds, up to a day.
  static func whole(_ text: String) throws -> Int {
    guard let seconds = Int(text), (0...86_400).contains(seconds) else {
      throw ValidationError("expected a number of seconds from 0 to 86400, not '\(text)'")
    }
    return seconds
  }

  /// A pause, from a tenth of a second to an hour.
  static func pause(_ text: String) throws -> Double {
    guard let seconds = Double(text), (0.1...3600).contains(seconds) else {
      throw ValidationError("expected a number of seconds from 0.1 to 3600, not '\(text)'")
    }
    return seconds
  }
}
