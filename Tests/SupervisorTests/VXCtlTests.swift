import ControlAPI
import Glibc
import Synchronization
import TestSupport
import Testing

@testable import vxctl

/// vxctl against a control socket whose answers the test chooses.
@Suite struct VXCtlTests {
  private let folder = TemporaryFolder()
  private var socket: String { folder.path + "/control.sock" }

  /// The guests that the socket tells of: number and name. Each has a disk, xvde.
  private typealias Guests = [(Int64, String)]

  private final class Calls: Sendable {
    let list = Mutex<[(method: String, guest: String)]>([])
    func add(_ method: String, _ parameters: JSONValue) {
      list.withLock { $0.append((method, parameters["guest"]?.stringValue ?? "")) }
    }
    /// The guests of all calls of a method.
    func guests(_ method: String) -> [String] { list.withLock { $0.filter { $0.method == method }.map(\.guest) } }
  }

  private static let guestParameter = ControlParameter("guest", "string", required: false, "")
  private static let parameters = [
    guestParameter, ControlParameter("device", "string", required: false, ""),
    ControlParameter("bytes", "integer", required: false, ""),
    ControlParameter("seconds", "integer", required: false, ""),
    ControlParameter("profiles", "any", required: false, ""), ControlParameter("after", "integer", required: false, ""),
    ControlParameter("limits", "object", required: false, ""), ControlParameter("port", "string", required: false, ""),
  ]

  private func device(_ guest: (Int64, String), reason: String?) -> JSONValue {
    [
      "guest": .string(guest.1), "domain": .integer(guest.0), "device": "xvde", "id": 51776, "state": "connected",
      "kind": "virtio_disk", "type": "disk", "transport": "xenbus", "reason": reason.map(JSONValue.string) ?? .null,
      "image": .string("/srv/\(guest.1)"), "counters": ["failed": 0, "note": .string(guest.1)],
    ]
  }

  /// - Parameter onChange: is run with the server when a change was asked for.
  private func serve(
    _ guests: Guests, calls: Calls = Calls(), reason: String? = nil,
    onChange: @escaping @Sendable (ControlServer) -> Void = { _ in }
  ) throws -> ControlServer {
    let box = Holder()
    let devices = JSONValue.array(guests.map { device($0, reason: reason) })
    let list = JSONValue.array(
      guests.map { ["domain": .integer($0.0), "name": .string($0.1), "state": "running", "ioreqServer": ["id": 1]] })
    func reading(_ name: String, _ answer: JSONValue) -> ControlMethod {
      ControlMethod(name, "", parameters: Self.parameters, result: [:]) { parameters throws(ControlFault) in
        calls.add(name, parameters)
        return answer
      }
    }
    func change(_ name: String) -> ControlMethod {
      ControlMethod(change: name, "", parameters: Self.parameters) { parameters throws(ControlFault) in
        if parameters["guest"]?.stringValue == "nosuch" {
          throw .notFound("there is no guest 'nosuch'", field: "guest")
        }
        return ControlChange("limits become \(guests.first?.1 ?? "")") {
          calls.add(name, parameters)
          if let server = box.server { onChange(server) }
          return ["accepted": true]
        }
      }
    }
    let server = try ControlServer(
      path: socket,
      methods: ControlMethods(
        [
          reading("guest.list", list), reading("device.list", devices),
          reading("device.get", devices.arrayValue?.first ?? .null),
          reading("system.info", ["version": .string(guests.first?.1 ?? ""), "xenstoreConnected": true]),
          reading(
            "config.diff",
            .array([["guest": .string(guests.first?.1 ?? ""), "changes": .array([.string(reason ?? "")])]])),
          reading("event.subscribe", .null), change("device.resize"), change("device.pause"), change("device.limit"),
          change("device.detach"), change("guest.limit"), change("daemon.limit"),
        ], version: "1"))
    box.put(server)
    return server
  }

  private final class Holder: Sendable {
    private let value = Mutex<ControlServer?>(nil)
    var server: ControlServer? { value.withLock { $0 } }
    func put(_ server: ControlServer) { value.withLock { $0 = server } }
  }

  private static func event(_ name: String, _ domain: Int64, _ guest: String, reason: String) -> JSONValue {
    [
      "event": .string(name), "domain": .integer(domain), "guest": .string(guest), "device": "xvde",
      "reason": .string(reason),
    ]
  }

  // MARK: Outcomes

  /// What happens to another guest's disk of the same name is not the outcome, whichever way it ended.
  @Test func changeWaitsForItsOwnGuest() throws {
    let server = try serve([(9, "db1"), (5, "web1")]) { server in
      server.publish(Self.event("device.notResized", 9, "db1", reason: "foreign"))
      server.publish(Self.event("device.resized", 9, "db1", reason: "foreign"))
      server.publish(Self.event("device.resized", 5, "web1", reason: "ours"))
    }
    defer { server.stop() }
    for name in ["web1/xvde", "5/xvde", "id:5/xvde", "name:web1/51776"] {
      let run = ProgramRun.vxctl("resize", name, "20G", "--socket", socket)
      #expect(run.status == 0, "\(name): \(run.errors)")
      #expect(run.output == "web1/xvde: device.resized, ours\n", "\(name)")
    }
    let failing = ProgramRun.vxctl("resize", "9/xvde", "20G", "--json", "--socket", socket)
    #expect(failing.status == 1)
    let error = try JSONText.parse(Array(failing.output.utf8))["error"]
    #expect(error?["message"] == "device.notResized: foreign")
  }

  // MARK: Errors

  @Test func errorsAreJSONWhereJSONIsAskedFor() throws {
    func error(_ run: ProgramRun) throws -> JSONValue {
      #expect(run.errors == "", "\(run.errors)")
      return try #require(try JSONText.parse(Array(run.output.utf8))["error"])
    }
    for verb in [["status"], ["show", "a/b"], ["list"], ["top"], ["pause", "a/b"], ["console", "a"], ["events"]] {
      let asks = verb == ["top"] ? [] : ["--json"]
      let run = ProgramRun(ProgramRun.path("vxctl"), verb + asks + ["--socket", "/nowhere"])
      #expect(run.status == 2, "\(verb)")
      if verb == ["top"] {
        #expect(run.errors.contains("/nowhere"))
      } else {
        #expect(try error(run)["kind"] == "unreachable", "\(verb)")
      }
    }
    let server = try serve([(5, "web1")])
    defer { server.stop() }
    let refused = try error(.vxctl("pause", "nosuch/xvde", "--json", "--socket", socket))
    #expect(refused["kind"] == "refused")
    #expect(refused["code"] == -32001)
    #expect(refused["data"]?["field"] == "params.guest")
    #expect(refused["data"]?["remedy"]?.stringValue?.isEmpty == false)
    let usage = ProgramRun.vxctl("resize", "web1/xvde", "20X", "--json")
    #expect(usage.status == 64)
    #expect(try error(usage)["kind"] == "usage")
    // Xenstore is not there either.
    let toolstack = ProgramRun.vxctl("attach", "a", "disk", "--backend", "b", "--image", "/x", "--json")
    #expect(toolstack.status == 1)
    #expect(try error(toolstack)["data"]?["remedy"]?.stringValue?.contains("dom0") == true)
    // Without --json they are words on standard error.
    let words = ProgramRun.vxctl("pause", "nosuch/xvde", "--socket", socket)
    #expect(words.output == "")
    #expect(words.errors.hasPrefix("vxctl: there is no guest 'nosuch'\n       "))
  }

  @Test(arguments: [
    ["top", "--interval", "5000"], ["top", "--interval", "inf"], ["top", "--interval", "1e300"],
    ["top", "--interval", "nan"], ["top", "--interval", "-1"], ["top", "--count", "0"], ["events", "--count", "-5"],
    ["events", "--after", "-1"], ["console", "a", "--seconds", "9223372036854775807"],
    ["detach", "a/b", "--deadline", "9223372036854775807"], ["detach", "a/b", "--deadline", "-1"],
    ["attach", "a", "disk", "--image", "/x", "--wait", "-1"],
    ["attach", "a", "disk", "--image", "/x", "--wait", "9223372036854775807"],
    ["reattach", "--backend", "b", "--wait", "-9223372036854775808"], ["acpi-table", "--slots", "33", "/dev/null"],
    ["resize", "a/b", "9223372036854775807T"],
  ])
  func numbersOutOfRangeAreRefused(arguments: [String]) {
    // Option and value of a negative number in one word.
    var words = arguments
    if let value = words.last, value.hasPrefix("-") {
      words = words.dropLast(2) + ["\(words[words.count - 2])=\(value)"]
    }
    let run = ProgramRun(ProgramRun.path("vxctl"), words)
    #expect(run.status == 64, "\(run.errors)")
  }

  /// Where the daemon is asked only among other things: what was found stays as it was, and says why.
  @Test(arguments: [["doctor"], ["explain", "a"]]) func reportsSayInJSONThatTheDaemonIsNotReached(verb: [String]) throws
  {
    let run = ProgramRun(ProgramRun.path("vxctl"), verb + ["--json", "--socket", "/nowhere"])
    #expect(run.status == 1)
    let rows = try #require(try JSONText.parse(Array(run.output.utf8)).arrayValue)
    let row = try #require(rows.last)
    #expect(row["ok"] == false)
    #expect(row["error"]?["kind"] == "unreachable")
    #expect(row["error"]?["message"] == row["text"])
    #expect(rows.dropLast().allSatisfy { $0["error"] == nil })
  }

  @Test func unknownVerbIsNamed() throws {
    for words in [
      ["frobnicate"], ["frobnicate", "web1", "--force"], ["config", "frobnicate"], ["device", "frobnicate", "a/b"],
    ] {
      let plain = ProgramRun(ProgramRun.path("vxctl"), words)
      #expect(plain.status == 64)
      #expect(plain.errors.contains("unknown verb 'frobnicate': expected one of "), "\(plain.errors)")
      for arguments in [words + ["--json"], ["--json"] + words] {
        let run = ProgramRun(ProgramRun.path("vxctl"), arguments)
        #expect(run.status == 64)
        #expect(run.errors == "")
        let error = try JSONText.parse(Array(run.output.utf8))["error"]
        #expect(error?["kind"] == "usage")
        let message = error?["message"]?.stringValue ?? ""
        #expect(message.contains("unknown verb 'frobnicate': expected one of "), "\(message)")
        #expect(
          message.contains(words[0] == "config" ? "diff" : words[0] == "device" ? "pause" : "status"), "\(message)")
      }
    }
    // What is wrong with a known verb is still said.
    #expect(ProgramRun.vxctl("list", "--frob").errors.contains("--frob"))
  }

  /// Every value on the command line: one that is refused is refused with what was expected. Nothing may be empty.
  @Test func everyValueThatIsRefusedSaysWhatWasExpected() throws {
    let valid = [
      "guest": "a", "device": "a/b", "kind": "disk", "target": "a", "file": "/nowhere", "direction": "up",
      "level": "info",
      "output": "/nowhere", "size": "1G", "port": "0",
    ]
    var count = 0
    func try_(_ words: [String], _ what: String) {
      count += 1
      let run = ProgramRun(ProgramRun.path("vxctl"), words)
      #expect(run.status == 64, "\(what): \(run.errors)")
      #expect(run.errors.contains("expected "), "\(what): \(run.errors)")
    }
    func walk(_ command: JSONValue, _ path: [String]) throws {
      for other in command["subcommands"]?.arrayValue ?? [] {
        guard let name = other["commandName"]?.stringValue, name != "help" else { continue }
        try walk(other, path + [name])
      }
      var before: [String] = []
      for argument in command["arguments"]?.arrayValue ?? [] {
        let value = argument["valueName"]?.stringValue ?? ""
        switch argument["kind"]?.stringValue {
        case "option":
          let name = argument["preferredName"]
          let option = (name?["kind"] == "long" ? "--" : "-") + (name?["name"]?.stringValue ?? "")
          try_(path + [option, ""], "\(path) \(option)")
        case "positional":
          try_(path + before + [""], "\(path) \(value)")
          before.append(try #require(valid[value], "\(path): no valid value for \(value) in this test"))
        default: break
        }
      }
    }
    let help = ProgramRun.vxctl("--experimental-dump-help")
    try walk(try #require(try JSONText.parse(Array(help.output.utf8))["command"]), [])
    #expect(count > 100, "\(count) values")
    for (words, expected) in [
      (["limit", "a", "--read-ops", "5x"], "expected a number from 0"),
      (["limit", "id:9999999999999999999/xvde"], "expected"),
      (["show", "demo/"], "expected GUEST/DEVICE"), (["list", "id:01"], "without leading zeros"),
      (["link", "a/b", "sideways"], "expected up or down"),
      (["console", "a", "--size", "80"], "expected COLUMNSxROWS"),
      (["attach", "a", "floppy", "--image", "/x"], "expected disk, network, console, entropy"),
      (["resize", "a/b", "5X"], "expected a number of bytes"), (["log-level", "loud"], "expected debug"),
    ] {
      let run = ProgramRun(ProgramRun.path("vxctl"), words)
      #expect(run.status == 64, "\(words)")
      #expect(run.errors.contains(expected), "\(words): \(run.errors)")
    }
  }

  // MARK: Names

  @Test func aWordThatCouldBeTwoGuestsIsRefused() throws {
    let domains = [(3, "a"), (7, "3"), (8, "twin"), (9, "twin"), (10, "10")].map {
      GuestName.Domain(number: UInt32($0.0), name: $0.1)
    }
    func find(_ text: String) throws -> UInt32? {
      try #require(GuestName(argument: text)).find(in: domains)?.number
    }
    #expect(try find("a") == 3)
    #expect(try find("7") == 7)
    #expect(try find("id:3") == 3)
    #expect(try find("name:3") == 7)
    #expect(try find("10") == 10)
    #expect(try find("id:9") == 9)
    #expect(try find("nobody") == nil)
    #expect(try find("99") == nil)
    #expect(try find("name:7") == nil)
    for text in ["3", "twin", "name:twin"] { #expect(throws: GuestName.Ambiguous.self, "\(text)") { try find(text) } }
    // A number has one form, and a word of another is a name.
    #expect(try find("07") == nil)
    #expect(try find("id:0") == nil)
    for text in ["", "id:", "id:x", "id:-1", "id:+1", "id:07", "id:00", "name:", "id:4294967296"] {
      #expect(GuestName(argument: text) == nil)
    }
    #expect(DeviceName(argument: "a/b/xvde")?.guest.plain == "a/b")
  }

  /// What reaches the daemon can mean one guest only.
  @Test func theDaemonGetsTheGuestThatWasMeant() throws {
    let calls = Calls()
    let server = try serve([(3, "a"), (7, "3"), (8, "b")], calls: calls)
    defer { server.stop() }
    for (name, expected) in [
      ("b", "id:8"), ("id:8", "id:8"), ("id:3", "id:3"), ("name:3", "id:7"), ("7", "id:7"), ("name:a", "id:3"),
    ] {
      let run = ProgramRun.vxctl("limit", name, "--read-ops", "5", "--socket", socket)
      #expect(run.status == 0, "\(name): \(run.errors)")
      #expect(calls.guests("guest.limit").last == expected, "\(name)")
    }
    let count = calls.guests("guest.limit").count
    let refused = ProgramRun.vxctl("limit", "3", "--read-ops", "5", "--socket", socket)
    #expect(refused.status == 1)
    #expect(refused.errors.contains("id:3 or name:3"), "\(refused.errors)")
    #expect(calls.guests("guest.limit").count == count)
    // A guest may even be called like the word for all of them.
    _ = ProgramRun.vxctl("limit", "name:daemon", "--read-ops", "5", "--socket", socket)
    #expect(calls.guests("guest.limit").last == "name:daemon")
    #expect(calls.guests("daemon.limit").isEmpty)
  }

  // MARK: Terminals

  /// Whatever a guest is called and the daemon gives as a reason: no control character comes out, in any verb.
  @Test func controlCharactersDoNotReachTheTerminal() throws {
    let hostile = "w\u{1b}[2Je\u{7}\u{9b}31mb\u{7f}1\u{85}\u{202e}x\r\n\tforged"
    let server = try serve([(5, hostile)], reason: hostile) { server in
      server.publish(Self.event("device.resized", 5, hostile, reason: hostile))
    }
    defer { server.stop() }
    server.publish(Self.event("device.failed", 5, hostile, reason: hostile))
    let file = folder.path + "/profiles.json"
    #expect(write("{}", to: file))
    let verbs: [[String]] = [
      ["status"], ["list"], ["show", "5/xvde"], ["top", "--count", "1"], ["events", "--count", "1", "--after", "0"],
      ["doctor"], ["explain", "5"], ["limit", "5"], ["limit", "5/xvde"], ["resize", "5/xvde"],
      ["config", "diff", file], ["pause", "5/xvde", "--dry-run"], ["pause", "\(hostile)/xvde", "--dry-run"],
    ]
    for verb in verbs {
      for asks in verb[0] == "top" || verb.contains(file) ? [[]] : [[], ["--json"]] {
        let run = ProgramRun(ProgramRun.path("vxctl"), verb + asks + ["--socket", socket])
        let text = run.output + run.errors
        #expect(!text.isEmpty, "\(verb)")
        let bad = text.unicodeScalars.filter {
          $0 != "\n" && $0 != "\t" && ($0.value < 0x20 || (0x7f..<0xa0).contains($0.value) || $0.value == 0x202e)
        }
        #expect(bad.isEmpty, "\(verb) \(asks): \(bad.map { String($0.value, radix: 16) })")
        #expect(!text.split(separator: "\n").contains { $0.hasPrefix("\tforged") || $0.hasPrefix("forged") }, "\(verb)")
        if !asks.isEmpty { #expect(throws: Never.self, "\(verb)") { try JSONText.parse(Array(run.output.utf8)) } }
      }
    }
    #expect(
      ProgramRun.vxctl("list", "--socket", socket).output.contains(
        #"w\u001b[2Je\u0007\u009b31mb\u007f1\u0085\u202ex\u000d\u000a\#tforged"#))
    // As JSON, the names are what they were.
    let list = try JSONText.parse(Array(ProgramRun.vxctl("list", "--json", "--socket", socket).output.utf8))
    #expect(list.arrayValue?.first?["guest"]?.stringValue == hostile)
  }

  // MARK: Doctor

  private func verdict(_ facts: HostFacts, _ subject: String) -> (Finding.Verdict, String)? {
    facts.findings.first { $0.subject == subject }.map { ($0.verdict, $0.text) }
  }

  @Test func doctorNamesTheTrueCauseOfMissingAIO() {
    var facts = HostFacts()
    facts.aioLimit = 1_048_576
    #expect(verdict(facts, "asynchronous I/O")?.0 == .good)
    facts.aio = ENOSYS
    #expect(verdict(facts, "asynchronous I/O")?.0 == .bad)
    #expect(verdict(facts, "asynchronous I/O")?.1.contains("CONFIG_AIO") == true)
    #expect(verdict(facts, "asynchronous I/O")?.1.contains("sysctl") == false)
    facts.aio = EAGAIN
    #expect(verdict(facts, "asynchronous I/O")?.1.contains("used up") == true)
    facts.aio = EPERM
    #expect(verdict(facts, "asynchronous I/O")?.1 == "io_setup fails: Operation not permitted")
    facts.aio = 0
    facts.aioLimit = 65536
    #expect(verdict(facts, "asynchronous I/O")?.1.contains("65536") == true)
  }

  @Test func doctorSaysWhatServesDisksWithoutIOUring() {
    var facts = HostFacts()
    #expect(verdict(facts, "io_uring")?.0 == .good)
    for (failure, words) in [
      (EPERM, "kernel.io_uring_disabled"), (ENOSYS, "not supported by this kernel"), (ENOMEM, "Cannot allocate memory"),
    ] {
      facts.ring = failure
      #expect(verdict(facts, "io_uring")?.0 == .note)
      #expect(verdict(facts, "io_uring")?.1.contains(words) == true)
      #expect(verdict(facts, "io_uring")?.1.contains("libaio") == true)
    }
  }

  @Test func doctorKnowsWhereItRuns() {
    var facts = HostFacts()
    facts.nodes = ["evtchn": 0, "gntdev": 0, "privcmd": ENOENT]
    #expect(verdict(facts, "/dev/xen/privcmd")?.0 == .bad)
    // A driver domain needs no privcmd.
    facts.isControlDomain = false
    #expect(!facts.findings.contains { $0.verdict == .bad })
    #expect(verdict(facts, "/dev/xen/privcmd") == nil)
    // A member of the view group cannot open the nodes, which says nothing about vxd.
    facts.nodes = ["evtchn": EACCES, "gntdev": EACCES]
    facts.isRoot = false
    #expect(!facts.findings.contains { $0.verdict == .bad })
    facts.isRoot = true
    #expect(verdict(facts, "/dev/xen/gntdev")?.0 == .bad)
    // Without Xen there is one finding about that, and not one for each node.
    facts.isXen = false
    #expect(facts.findings.filter { $0.verdict == .bad }.map(\.subject) == ["hypervisor"])
  }
}

private func write(_ text: String, to path: String) -> Bool {
  guard let file = fopen(path, "we") else { return false }
  fputs(text, file)
  return fclose(file) == 0
}
