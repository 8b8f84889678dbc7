/// OpenMetrics text as Prometheus' own text format 0.0.4, for scrapers that do not ask for OpenMetrics: metadata carry the names of the
/// samples, an info or a state set is a gauge, and there is no end mark.
enum PrometheusText {
  static let contentType = "text/plain; version=0.0.4; charset=utf-8"

  static func from(openMetrics text: String) -> String {
    var result = ""
    result.reserveCapacity(text.utf8.count)
    /// The suffix of samples of the present family.
    var suffix = ""
    for line in text.split(separator: "\n") {
      let words = line.split(separator: " ", maxSplits: 3)
      guard line.hasPrefix("#"), words.count >= 2 else {
        result += line
        result += "\n"
        continue
      }
      switch words[1] {
      case "TYPE" where words.count == 4:
        suffix = ["counter": "_total", "info": "_info"][words[3]] ?? ""
        let type = ["info", "stateset"].contains(words[3]) ? "gauge" : words[3] == "unknown" ? "untyped" : words[3]
        result += "# TYPE \(words[2])\(suffix) \(type)\n"
      case "HELP" where words.count == 4: result += "# HELP \(words[2])\(suffix) \(words[3])\n"
      default: break  // UNIT, EOF
      }
    }
    return result
  }
}

/// What a client takes (RFC 9110, 12.5.1).
enum AcceptHeader {
  /// Whether OpenMetrics is asked for by name, and not less than plain text: a client that accepts anything gets the format that every scraper reads.
  static func prefersOpenMetrics(_ values: [String]) -> Bool {
    var openMetrics = 0.0
    var plain = 0.0
    for range in values.flatMap({ $0.split(separator: ",") }) {
      let parts = range.split(separator: ";").map { $0.trimmingSpaces.lowercased() }
      var quality = 1.0
      for part in parts.dropFirst() where part.hasPrefix("q=") { quality = Double(part.dropFirst(2)) ?? 0 }
      switch parts.first {
      case "application/openmetrics-text": openMetrics = max(openMetrics, quality)
      case "text/plain", "text/*": plain = max(plain, quality)
      default: break
      }
    }
    return openMetrics > 0 && openMetrics >= plain
  }
}

extension Substring {
  var trimmingSpaces: Substring {
    var text = drop { $0 == " " || $0 == "\t" }
    while let last = text.last, last == " " || last == "\t" { text.removeLast() }
    return text
  }
}
