import Glibc
import Testing

/// The repository checks itself.
@Suite struct HouseTests {
  /// C modules that each folder below Sources may import; the longest matching folder counts.
  private static let allowed: [String: Set<String>] = [
    "Backends/HostMemory": ["Glibc"], "Backends/Virtqueue": [], "Backends/Transport": [],
    "Backends/Devices": ["CLinux", "Glibc"],
    "Backends/EventLoop": ["CLinux", "Glibc"], "Backends/ConsoleLink": [],
    "Backends/Engines": ["CAIO", "CLinux", "Glibc"],
    "Backends/Xen": ["CXen", "Glibc"], "Backends/DeviceHost": ["Glibc"],
    "SimulatedXen": ["CLinux", "Glibc"], "ControlAPI": ["CJSON", "CLinux", "Glibc"],
    "Lifecycle": [], "Supervisor": ["CLinux", "CSystemd", "Glibc"],
    "vxd": ["CLinux", "Glibc"], "vxctl": ["CLinux", "Glibc"],
  ]

  private static let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")

  /// Swift files below a folder of the repository, relative to it. There are some: a check that finds no file checks nothing.
  private static func files(_ folder: String) throws -> [String] {
    let found = names("\(root)/\(folder)")
    try #require(found.count > 1, "\(folder) has no Swift files")
    return found
  }

  private static func names(_ folder: String) -> [String] {
    guard let directory = opendir(folder) else { return [] }
    defer { closedir(directory) }
    var found: [String] = []
    while let entry = readdir(directory) {
      let name = withUnsafePointer(to: &entry.pointee.d_name) {
        $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
      }
      if name.hasPrefix(".") { continue }
      if name.hasSuffix(".swift") {
        found.append(name)
      } else {
        found += names("\(folder)/\(name)").map { "\(name)/\($0)" }
      }
    }
    return found
  }

  private static func lines(_ path: String) throws -> [String] {
    let file = try #require(fopen(path, "re"))
    defer { fclose(file) }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      let count = fread(&buffer, 1, buffer.count, file)
      if count == 0 { break }
      bytes += buffer[..<count]
    }
    return String(decoding: bytes, as: UTF8.self).split(separator: "\n", omittingEmptySubsequences: false).map(
      String.init)
  }

  private static let cModules: Set<String> = ["CXen", "CAIO", "CLinux", "CJSON", "CSystemd", "Glibc"]

  @Test func cHeadersAreImportedOnlyWhereTheyMayBe() throws {
    var imports = 0
    for file in try Self.files("Sources") {
      let allowed = Self.allowed.filter { file.hasPrefix($0.key + "/") }.max { $0.key.count < $1.key.count }?.value
      let permitted = try #require(allowed, "Sources/\(file) is in no known module")
      for line in try Self.lines("\(Self.root)/Sources/\(file)") where line.contains("import ") {
        let words = line.split(separator: " ").map(String.init)
        guard let last = words.last, words.dropLast().last == "import" else { continue }
        imports += 1
        #expect(last != "Foundation" && last != "Dispatch", "Sources/\(file) imports \(last)")
        if Self.cModules.contains(last) { #expect(permitted.contains(last), "Sources/\(file) imports \(last)") }
      }
    }
    #expect(imports > 100)
  }

  @Test func lifecycleDependsOnNothing() throws {
    let files = try Self.files("Sources/Lifecycle")
    #expect(files.count > 10)
    for file in files {
      for line in try Self.lines("\(Self.root)/Sources/Lifecycle/\(file)") {
        #expect(!line.split(separator: " ").contains("import"), "\(file): \(line)")
      }
    }
  }

  /// The status board holds values and counters (`StatusBoardTests` looks through one), and these are what a counter is made of: reflection does not
  /// see what cannot be copied, which a lock with anything behind it would be too.
  @Test func countersOfTheStatusBoardAreAtomicsAlone() throws {
    let files = [
      "Transport/Gauge.swift", "Xen/PoolGauges.swift", "Devices/Accounting/DeviceCounters.swift",
      "Devices/Accounting/LatencyHistogram.swift",
    ]
    var properties = 0
    for file in files {
      for line in try Self.lines("\(Self.root)/Sources/Backends/\(file)") where line.hasPrefix("  ") {
        #expect(!line.contains("Mutex"), "\(file): \(line)")
        guard !line.hasPrefix("   "), line.contains(" let "), !line.contains("static ") else { continue }
        properties += 1
        #expect(["Atomic<", "Gauge()", "Counter()", "Gauges()"].contains { line.contains($0) }, "\(file): \(line)")
      }
    }
    #expect(properties > 30)
  }

  /// What a transport is, is asked of the bus: nobody above it names one. What knows all of them is the list.
  @Test func nobodyAsksWhichTransportADeviceHas() throws {
    let names = [
      "MMIOBus", "PCIBus", "XenbusBus", "MMIOTransport", "PCITransport", "XenbusTransport", "Transport.self",
    ]
    for folder in ["Supervisor", "Lifecycle", "vxd", "vxctl"] {
      for file in try Self.files("Sources/\(folder)") where !file.hasPrefix("Buses/") {
        for line in try Self.lines("\(Self.root)/Sources/\(folder)/\(file)") where !line.trimmed.hasPrefix("//") {
          for name in names { #expect(!line.contains(name), "\(folder)/\(file): \(line)") }
          // libxl's entries have a node "transport" of their own, which says "mmio" of all devices.
          #expect(!line.contains("== \"xenbus\"") && !line.contains("== \"pci\""), "\(folder)/\(file): \(line)")
          // Nor guesses it by what facts a bus tells.
          #expect(!line.contains("[\"name\"] == "), "\(folder)/\(file): \(line)")
        }
      }
    }
  }

  /// Work crosses over to the guest's thread in one place, behind effects; others only end the thread.
  @Test func oneFileHandsWorkToTheGuestsThread() throws {
    for file in try Self.files("Sources/Supervisor") where file != "EffectRunner.swift" {
      for line in try Self.lines("\(Self.root)/Sources/Supervisor/\(file)") where !line.trimmed.hasPrefix("//") {
        #expect(
          !line.contains("buses.thread.run") && !line.contains("buses.thread.loop"), "Supervisor/\(file): \(line)")
      }
    }
  }

  /// What a device's type is, is asked of the type: nobody looks for one of them behind its protocol.
  @Test func backendsAreNotDowncast() throws {
    for file in try Self.files("Sources/Supervisor") {
      for line in try Self.lines("\(Self.root)/Sources/Supervisor/\(file)") {
        #expect(!line.contains("as? ") && !line.contains("as! "), "Supervisor/\(file): \(line)")
        #expect(
          !line.contains("case let ") || !line.contains("as Net") && !line.contains("as Block"), "\(file): \(line)")
      }
    }
  }

  @Test func nothingInTheDataPathIsAsynchronous() throws {
    for folder in ["Virtqueue", "Transport", "Devices", "Engines"] {
      for file in try Self.files("Sources/Backends/\(folder)") {
        for line in try Self.lines("\(Self.root)/Sources/Backends/\(folder)/\(file)") {
          #expect(!line.contains(" async ") && !line.contains("await "), "\(folder)/\(file): \(line)")
        }
      }
    }
  }

  @Test func uncheckedSendabilityNamesItsInvariant() throws {
    var classes = 0
    for file in try Self.files("Sources") {
      let lines = try Self.lines("\(Self.root)/Sources/\(file)")
      for (index, line) in lines.enumerated() where line.contains("@unchecked Sendable") && line.contains("class") {
        classes += 1
        let near = lines[index..<min(index + 4, lines.count)].joined()
        #expect(near.contains("Invariant behind @unchecked Sendable"), "Sources/\(file):\(index + 1)")
      }
    }
    #expect(classes > 10)
  }

  /// What operators read is plain English: the patterns that were not, in string literals.
  @Test func messagesArePlainEnglish() throws {
    let patterns = [
      " is wanted", " are wanted", " is no ", "there is no such", "goes on", "somebody", "whoever", "for want of",
      " anew", "is all there is", "is none of", " of vxd's", " of QEMU's", " of libxl's", "tried again", "in spite of",
      " go on ",
    ]
    for file in try Self.files("Sources") where !file.hasPrefix("SimulatedXen/") {
      for (index, line) in try Self.lines("\(Self.root)/Sources/\(file)").enumerated() {
        // Between quotation marks; comments are for those who know the house.
        let literals = line.split(separator: "\"", omittingEmptySubsequences: false).enumerated()
          .filter { $0.offset % 2 == 1 }.map(\.element).joined(separator: "|").replacing("there is no ", with: "")
        guard !line.trimmed.hasPrefix("//") else { continue }
        for pattern in patterns {
          #expect(!literals.contains(pattern), "Sources/\(file):\(index + 1): '\(pattern)' in \(line)")
        }
      }
    }
  }

  @Test func noWorkIsLeftMarked() throws {
    for file in try Self.files("Sources") {
      for line in try Self.lines("\(Self.root)/Sources/\(file)") {
        #expect(!line.contains("TODO") && !line.contains("FIXME"), "Sources/\(file): \(line)")
      }
    }
  }
}

extension String {
  fileprivate var trimmed: Substring { drop { $0 == " " } }
}
