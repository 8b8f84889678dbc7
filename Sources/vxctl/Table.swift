import ControlAPI

/// Columns of text, aligned.
struct Table {
  private var rows: [[String]]

  init(_ header: String...) { rows = [header] }

  mutating func add(_ cells: String...) { rows.append(cells) }

  var text: String {
    let widths = rows[0].indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
    return rows.map { row in
      var line = ""
      for (column, cell) in row.enumerated() {
        line += cell
        if column < row.count - 1 { line += String(repeating: " ", count: widths[column] - cell.count + 2) }
      }
      return line
    }.joined(separator: "\n")
  }
}

extension JSONValue {
  /// A member as an operator reads it, without control characters; a dash where there is none.
  func cell(_ name: String) -> String {
    switch self[name] {
    case .string(let text): Output.printable(text)
    case .integer(let number): "\(number)"
    case .number(let number): "\(number)"
    case .exact(let text), .verbatim(let text): text
    case .bool(let flag): flag ? "yes" : "no"
    case nil, .null, .array, .object: "-"
    }
  }

  /// A count of bytes in a unit that keeps it short.
  func byteCell(_ name: String) -> String {
    guard var value = self[name]?.integerValue else { return "-" }
    for unit in ["B", "KiB", "MiB", "GiB"] {
      if value < 1024 || value % 1024 != 0 && value < 10240 { return "\(value) \(unit)" }
      value /= 1024
    }
    return "\(value) TiB"
  }
}
