import ControlAPI
import DeviceHost
import Glibc
import Logging
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Xen

@testable import Supervisor

/// What role operate may open, and what is written down of what anybody asked for.
@Suite struct RightsTests {
  private let lines = Lines()

  /// Log lines with their fields.
  private final class Lines: Sendable {
    let list = Mutex<[(text: String, fields: Logger.Metadata)]>([])
    var all: [(text: String, fields: Logger.Metadata)] { list.withLock { $0 } }
  }

  private struct Handler: LogHandler {
    let lines: Lines
    var metadata: Logger.Metadata = [:]
    var logLevel: Logger.Level = .trace
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
      get { metadata[key] }
      set { metadata[key] = newValue }
    }
    func log(event: LogEvent) {
      lines.list.withLock { $0.append(("\(event.level) \(event.message)", event.metadata ?? [:])) }
    }
  }

  private func world(_ images: String) throws -> (World, ControlMethods) {
    let world = try World()
    _ = try world.domain(5, name: "web1")
    let images = images.replacing("FOLDER", with: world.folder.path)
    let text = #"{"version": 1, "guests": [{"guest": "web*", "spareDisks": 2, "spareImages": [\#(images)]}]}"#
    let actions = SupervisorControl.Actions(profiles: try Profiles(try JSONText.parse(Array(text.utf8))))
    let lines = lines
    let audit = AuditLog(Logger(label: "test") { _ in Handler(lines: lines) }, world.board)
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: text, actions: actions)
    #expect(eventually { world.state("web1", "spare1") == "ready" && world.state("web1", "xvde") == "ready" })
    return (world, SupervisorControl.methods(board: world.board, isSimulated: true, actions: actions, audit: audit))
  }

  private func call(
    _ methods: ControlMethods, _ method: String, _ parameters: JSONValue, _ role: ControlRole = .operate
  ) -> JSONValue {
    let request: JSONValue = ["jsonrpc": "2.0", "id": 1, "method": .string(method), "params": parameters]
    let caller = ControlCaller(role: role, user: 1000, group: 100, process: 4242)
    let reply = methods.answer(Array(JSONText.text(request).utf8), from: caller, subscribe: { _ in .null })
    return reply?["result"] ?? reply?["error"] ?? .null
  }

  @Test func operateAttachesWhatTheProfileListsAndAdminAnything() throws {
    let (world, methods) = try world(#""FOLDER/images/", "FOLDER/one.img", "nbd://store1/web/""#)
    defer { world.end() }
    mkdir(world.folder.path + "/images", 0o755)
    let outside = world.image("outside.img")
    let inside = world.image("images/inside.img")
    let one = world.image("one.img")
    func attach(_ image: String, _ role: ControlRole = .operate, dryRun: Bool = true) -> JSONValue {
      call(methods, "device.attach", ["guest": "web1", "image": .string(image), "dryRun": .bool(dryRun)], role)
    }
    let refused = attach(outside)
    #expect(refused["code"] == -32005)
    #expect(
      refused["message"]?.stringValue
        == "permission denied: '\(outside)' is not in 'spareImages' of guest 'web1' in the profiles; this requires the role admin, and yours is operate"
    )
    #expect(refused["data"]?["remedy"]?.stringValue?.contains("--admin-group") == true)
    for image in [inside, one, "nbd://store1/web/disk1"] { #expect(attach(image)["dryRun"] == true, "\(image)") }
    for image in [
      "/dev/sda", "\(world.folder.path)/images/../outside.img", "\(world.folder.path)/images/./inside.img",
      "\(world.folder.path)/images//inside.img", "\(world.folder.path)/images/", "\(world.folder.path)/images",
      "\(one).other", "nbd://store1/web", "nbd://store1/other/x", "nbd://store1.example.org/web/disk1",
      "nbd+unix:///web/?socket=\(one)", "nbd+unix:///?socket=/run/docker.sock",
    ] {
      #expect(attach(image)["code"] == -32005, "\(image)")
      #expect(attach(image, .admin)["dryRun"] == true, "\(image)")
    }
    #expect(attach(inside, .view)["code"] == -32005)
    // In earnest, and by its effect.
    #expect(attach(outside, dryRun: false)["code"] == -32005)
    #expect(attach(inside, dryRun: false)["device"] == "spare0")
    #expect(eventually { world.eventKinds.contains(.deviceAttached) })
    #expect(world.device("web1", "spare0")["image"]?.stringValue == inside)
    #expect(attach(outside, .admin, dryRun: false)["device"] == "spare1")
  }

  /// The folder is the operator's own: what it may put there is a link.
  @Test(.enabled(if: geteuid() == 0, "links of other users can be made by root only"))
  func linkInAnAllowedFolderLeadsNowhereElse() throws {
    let (world, methods) = try world(#""FOLDER/images/""#)
    defer { world.end() }
    mkdir(world.folder.path + "/images", 0o755)
    let link = world.folder.path + "/images/link"
    #expect(symlink(world.image("outside.img"), link) == 0)
    #expect(lchown(link, 1000, 1000) == 0)
    #expect(call(methods, "device.attach", ["guest": "web1", "image": .string(link)])["accepted"] == true)
    #expect(eventually { world.eventKinds.contains(.deviceNotAttached) })
    #expect(world.reasons(.deviceNotAttached).first?.contains("symbolic link of user 1000") == true)
  }

  @Test func operateGrowsOnlyWhatTheProfileLists() throws {
    let (world, methods) = try world(#""FOLDER/images/""#)
    defer { world.end() }
    mkdir(world.folder.path + "/images", 0o755)
    func resize(_ device: String, _ bytes: Int64?, _ role: ControlRole = .operate) -> JSONValue {
      var members: JSONValue = ["guest": "web1", "device": .string(device), "dryRun": true]
      if let bytes { members = ["guest": "web1", "device": .string(device), "bytes": .integer(bytes), "dryRun": true] }
      return call(methods, "device.resize", members, role)
    }
    #expect(resize("xvde", 1 << 30)["code"] == -32005)
    #expect(resize("xvde", 1 << 30, .admin)["dryRun"] == true)
    #expect(resize("xvde", nil)["dryRun"] == true)
    let image = world.image("images/inside.img")
    #expect(call(methods, "device.attach", ["guest": "web1", "image": .string(image)])["accepted"] == true)
    #expect(eventually { world.eventKinds.contains(.deviceAttached) })
    #expect(resize("spare0", 1 << 30)["dryRun"] == true)
  }

  @Test(arguments: [
    "relative/", "/", "/a/../b", "/a/./b/", "/a//b", "nbd://store", "nbd+unix:///x", "nbds://store/x", "",
    String(repeating: "/x", count: 3000),
  ])
  func namesThatMeanSomethingElseAreRefused(name: String) throws {
    let value: JSONValue = ["version": 1, "guests": [["spareImages": [.string(name)]]]]
    let fault = #expect(throws: SettingFault.self) { try Profiles(value) }
    #expect(fault?.field == "guests[0].spareImages[0]")
  }

  @Test func pathsAreNoLongerThanTheKernelTakesThem() throws {
    let (world, methods) = try world("")
    defer { world.end() }
    for image in ["/" + String(repeating: "x", count: 4095), "/a\u{0}b"] {
      let refused = call(methods, "device.attach", ["guest": "web1", "image": .string(image)], .admin)
      #expect(refused["code"] == -32602)
      #expect(refused["data"]?["field"] == "params.image")
    }
    let longest = "/" + String(repeating: "x", count: 4094)
    let taken = call(methods, "device.attach", ["guest": "web1", "image": .string(longest), "dryRun": true], .admin)
    #expect(taken["dryRun"] == true)
  }

  /// A tenant chooses names: a guest that is called by another's number is not taken for it.
  @Test func guestCalledByTheNumberOfAnotherIsNotTakenForIt() throws {
    let (world, methods) = try world("")
    defer { world.end() }
    _ = try world.domain(6, name: "5")
    try world.toolstack.attach(disk: "xvde", image: world.image("other.img"), to: 6)
    #expect(eventually { world.state("name:5", "xvde") == "ready" })
    func name(_ guest: String) -> JSONValue? {
      let answer = call(methods, "device.list", ["guest": .string(guest)])
      return answer["code"] ?? answer.arrayValue?.first?["domain"]
    }
    #expect(name("5") == -32602)
    #expect(name("id:5") == 5)
    #expect(name("name:5") == 6)
    #expect(name("web1") == 5)
    #expect(name("6") == 6)
    #expect(name("name:6") == -32001)
    #expect(name("id:x") == -32602)
  }

  // MARK: Who asked

  @Test func changesAreWrittenDownWithWhoAskedForThem() throws {
    let (world, methods) = try world(#""FOLDER/""#)
    defer { world.end() }
    #expect(call(methods, "device.pause", ["guest": "5", "device": "xvde"])["accepted"] == true)
    let accepted = try #require(lines.all.first)
    #expect(
      accepted.text
        == "notice control: uid 1000 (pid 4242, gid 100, role operate): device.pause accepted: requests of xvde wait until 'device.resume'"
    )
    for (field, value) in [
      "CALLER_UID": "1000", "CALLER_PID": "4242", "CALLER_GID": "100", "CALLER_ROLE": "operate",
      "VXD_METHOD": "device.pause", "VXD_RESULT": "accepted", "GUEST": "web1", "DEVICE": "xvde",
    ] { #expect("\(accepted.fields[field] ?? "")" == value, "\(field)") }
    // Refusals too, by role or for another reason; what was written is cut and cannot change a terminal.
    #expect(call(methods, "system.shutdown", [:])["code"] == -32005)
    #expect(call(methods, "device.detach", ["guest": "web1", "device": "xvde"])["code"] == -32006)
    let long = "\u{1b}[2J" + String(repeating: "x", count: 3000)
    #expect(call(methods, "device.pause", ["guest": .string(long), "device": "xvde"])["code"] == -32001)
    let refused = lines.all.dropFirst()
    #expect(refused.count == 3)
    #expect(refused.allSatisfy { $0.text.hasPrefix("warning") && "\($0.fields["VXD_RESULT"] ?? "")" == "refused" })
    #expect("\(refused.first?.fields["VXD_ERROR"] ?? "")" == "-32005")
    #expect(
      refused.last.map { $0.text.utf8.count < 500 && !$0.text.contains("\u{1b}") && $0.fields["GUEST"] == nil } == true)
    // What changes nothing is not.
    _ = call(methods, "device.list", [:])
    let limits: JSONValue = ["guest": "web1", "device": "xvde", "limits": ["readOps": 5], "dryRun": true]
    #expect(call(methods, "device.limit", limits)["dryRun"] == true)
    #expect(lines.all.count == 4)
    // Once, however often its answer is asked for.
    for _ in 0..<3 {
      _ = call(
        methods, "device.limit",
        [
          "guest": "web1", "device": "xvde", "limits": ["readOps": 5], "idempotencyKey": "k",
        ])
    }
    #expect(lines.all.count == 5)
  }

  @Test func whoAttachesToAConsoleIsWrittenDown() throws {
    let lines = lines
    let audit = AuditLog(Logger(label: "test") { _ in Handler(lines: lines) }, StatusBoard())
    for (role, isAllowed) in [(ControlRole.view, false), (.operate, true), (.admin, true)] {
      #expect(audit.mayAttachToConsole(ControlCaller(role: role, user: 1000, group: 100, process: 7)) == isAllowed)
      #expect(lines.all.last?.text.contains(isAllowed ? "console attached" : "console refused") == true)
      #expect("\(lines.all.last?.fields["CALLER_UID"] ?? "")" == "1000")
    }
  }

  @Test func refusalsFloodNoLog() throws {
    let (world, methods) = try world("")
    defer { world.end() }
    for _ in 0..<1000 { _ = call(methods, "system.shutdown", [:], .view) }
    #expect(lines.all.count == 20)
    // Changes that are made are written down all the same.
    #expect(call(methods, "device.pause", ["guest": "web1", "device": "xvde"])["accepted"] == true)
    #expect(lines.all.count == 21)
  }
}

/// What role view can have the control thread do in one request.
@Suite struct ProfileWorkTests {
  private func elapsed(_ body: () throws -> Void) rethrows -> Duration { try ContinuousClock().measure(body) }

  /// Quadratic once: 50000 devices took minutes.
  @Test func largestProfilesAreCheckedInTime() throws {
    let methods = SupervisorControl.methods(board: StatusBoard(), isSimulated: true)
    func check(_ profiles: String) -> JSONValue? {
      let request = #"{"jsonrpc":"2.0","id":1,"method":"config.check","params":{"profiles":\#(profiles)}}"#
      #expect(request.utf8.count <= 1 << 20)
      return methods.answer(Array(request.utf8), from: ControlCaller(role: .view), subscribe: { _ in .null })
    }
    func many(_ item: String, bytes: Int = 1 << 20) -> String {
      Array(repeating: item, count: (bytes - 200) / (item.utf8.count + 1)).joined(separator: ",")
    }
    let time = elapsed {
      let tooMany = check(#"{"version":1,"guests":[{"devices":[\#(many(#"{"type":"entropy"}"#))]}]}"#)
      #expect(tooMany?["error"]?["message"] == "guests[0].devices: expected at most 64 devices")
      let guest = #"{"devices":[\#(Array(repeating: #"{"type":"entropy"}"#, count: 64).joined(separator: ","))]}"#
      #expect(check(#"{"version":1,"guests":[\#(many(guest))]}"#)?["result"]?["correct"] == true)
      #expect(check(#"{"version":1,"disks":[\#(many(#"{"queues":4}"#))]}"#)?["result"]?["correct"] == true)
    }
    // Three requests of the largest size; a debug build on a busy machine takes some seconds.
    #expect(time < .seconds(60))
  }
}
