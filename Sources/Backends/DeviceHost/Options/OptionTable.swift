package import JSON

/// The options that settings of one type have: the one place where they are declared. Parsing, messages, `vxctl config diff` and the
/// tables of docs/profiles.md come from it.
package struct OptionTable<Settings>: Sendable {
  package let rows: [OptionRow<Settings>]

  package init(_ rows: [OptionRow<Settings>]) { self.rows = rows }

  /// Gives settings what the members of an object say; those whose names are in no row are refused.
  ///
  /// - Parameters:
  ///   - field: where the object stands.
  ///   - others: names of members that stand beside those of the table, and are looked at by the caller.
  package func apply(
    _ members: [JSONValue.Member], to settings: inout Settings, _ field: String, others: [String] = []
  ) throws(SettingFault) {
    for member in members where !others.contains(member.name) {
      let place = field.isEmpty ? member.name : "\(field).\(member.name)"
      guard let row = rows.first(where: { $0.option.name == member.name }) else {
        throw SettingFault(place, unknown: member.name, known: others + rows.map(\.option.name))
      }
      guard row.option.allows(member.value) else {
        throw SettingFault(place, expected: row.option.expected, not: member.value)
      }
      try row.apply(&settings, GivenOption(value: member.value, field: place))
    }
  }

  /// Every option's name with its value, as profiles write them.
  package func texts(_ settings: Settings) -> [(name: String, value: String)] {
    rows.map { ($0.option.name, $0.read(settings)) }
  }

  /// The same in one line.
  package func text(_ settings: Settings) -> String {
    texts(settings).map { "\($0.name) \($0.value)" }.joined(separator: ", ")
  }

  /// - Parameter settings: as they are when nothing is said: where the document has the defaults from.
  package func document(_ title: String, _ settings: Settings) -> OptionDocument {
    OptionDocument(
      title: title,
      rows: rows.map { OptionDocument.Row(option: $0.option, value: $0.option.fallback ?? $0.read(settings)) })
  }
}

/// A table of options as the manual has it.
package struct OptionDocument: Sendable {
  package struct Row: Sendable {
    package var option: DeviceOption
    /// The default.
    package var value: String
  }

  /// The heading that it stands under.
  package var title: String
  package var rows: [Row]

  package init(title: String, rows: [Row]) {
    self.title = title
    self.rows = rows
  }

  /// The table in Markdown.
  package var markdown: String {
    var text = "| option | meaning | default |\n|---|---|---|\n"
    for row in rows {
      let range = row.option.range.map { " (\($0))" } ?? ""
      text += "| `\(row.option.name)` | \(row.option.help)\(range) |\(row.value.isEmpty ? "" : " \(row.value)") |\n"
    }
    return text
  }
}
