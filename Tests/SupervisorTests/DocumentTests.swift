import ControlAPI
import DeviceHost
import Glibc
import Supervisor
import Testing

/// What the documents list is what the code has.
@Suite struct DocumentTests {
  private static let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")

  private func text(_ path: String) throws -> String {
    let file = try #require(fopen(Self.root + "/" + path, "re"), "\(path)")
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes[..<count], as: UTF8.self)
  }

  /// The tables of options in the manual are those that profiles are read by: `make man` writes them.
  @Test func tablesOfOptionsAreTheCodesOwn() throws {
    let document = try text("docs/profiles.md")
    let tables = Profiles.documents
    #expect(tables.count >= 8 && tables.reduce(0) { $0 + $1.rows.count } > 50)
    for table in tables {
      let section = try #require(
        document.split(separator: "\n## ", omittingEmptySubsequences: false).first { $0.hasPrefix("\(table.title)\n") },
        "docs/profiles.md has no section '\(table.title)'")
      #expect(section.contains(table.markdown), "docs/profiles.md, \(table.title): run 'make man'")
      for row in table.rows {
        guard case .choice(let names) = row.option.kind else { continue }
        for name in names {
          #expect(row.option.help.contains("`\(name)`"), "\(table.title): \(row.option.name), \(name)")
        }
      }
    }
    let titles = tables.map(\.title)
    for type in DeviceTypes.all { for table in type.documents { #expect(titles.contains(table.title)) } }
  }

  @Test func everyMetricIsDocumented() throws {
    let document = try text("docs/metrics.md")
    for family in Metrics.families {
      let name = ["counter": "\(family.name)_total", "info": "\(family.name)_info"][family.type] ?? family.name
      #expect(document.contains(name), "docs/metrics.md does not have \(name)")
    }
  }

  @Test func everyMethodIsDocumentedWithItsRole() throws {
    let rows = try text("docs/api.md").split(separator: "\n").filter { $0.hasPrefix("|") }
    let description = try JSONText.parse(Array(try text("deploy/control-api.json").utf8))
    let methods = try #require(description["methods"]?.arrayValue)
    #expect(methods.count > 20)
    for method in methods {
      let name = try #require(method["name"]?.stringValue)
      let role = try #require(method["x-role"]?.stringValue)
      let row = rows.first { $0.split(separator: "|")[0].split { " ,".contains($0) }.contains(Substring(name)) }
      #expect(row?.contains("| \(role) |") == true, "docs/api.md: \(name), \(role)")
      for parameter in method["params"]?.arrayValue ?? [] {
        guard let parameter = parameter["name"]?.stringValue, !["dryRun", "idempotencyKey"].contains(parameter) else {
          continue
        }
        #expect(row?.contains(parameter) == true, "docs/api.md: \(name) takes \(parameter)")
      }
    }
  }
}

extension String {
  fileprivate var words: [String] { split(separator: " ").map(String.init) }
}
