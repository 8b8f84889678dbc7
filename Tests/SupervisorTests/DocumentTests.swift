import ControlAPI
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

  /// Names of options in the message that refuses one: those that the code knows.
  private func options(_ profiles: JSONValue) throws -> Set<String> {
    let fault = #expect(throws: ProfileFault.self) { _ = try DiskProfiles(profiles) }
    let reason = try #require(fault).reason
    let words = reason.split { !$0.isLetter && !$0.isNumber }.map(String.init)
    return Set(words).subtracting("there is no such option key limit are and unknown expected one of nosuch".words)
  }

  /// Every option that the profiles take is in the document, from which the manual page is made.
  @Test func everyProfileOptionIsDocumented() throws {
    let document = try text("docs/profiles.md")
    func device(_ members: [JSONValue.Member]) -> JSONValue {
      ["version": 1, "guests": [["devices": [.object(members)]]]]
    }
    func member(_ name: String, _ value: JSONValue) -> JSONValue.Member { .init(name: name, value: value) }
    let refused: [(String, JSONValue, atLeast: Int)] = [
      ("file", ["version": 1, "nosuch": 1], 4),
      ("disks", ["version": 1, "disks": [["nosuch": 1]]], 17),
      ("limits", ["version": 1, "daemon": ["limits": ["nosuch": 1]]], 6),
      ("guests", ["version": 1, "guests": [["nosuch": 1]]], 4),
      ("network", device([member("type", "network"), member("nosuch", 1)]), 19),
      ("console", device([member("type", "console"), member("nosuch", 1)]), 8),
      ("log", device([member("type", "console"), member("log", ["path": "/x", "nosuch": 1])]), 4),
      ("entropy", device([member("type", "entropy"), member("nosuch", 1)]), 4),
    ]
    for (kind, profiles, atLeast) in refused {
      let names = try options(profiles)
      #expect(names.count >= atLeast, "\(kind): \(names.sorted())")
      for name in names {
        #expect(document.contains("`\(name)`"), "docs/profiles.md does not have '\(name)' (\(kind))")
      }
    }
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
