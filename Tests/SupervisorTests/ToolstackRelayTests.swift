import ControlAPI
import EventLoop
import Glibc
import Logging
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// 'vxctl --domain': the control socket of a driver domain, through Xenstore.
@Suite struct ToolstackRelayTests {
  /// A driver domain with a control socket. In the simulation every client of xenstored has dom0's directory, so that the domain's and dom0's
  /// paths are the same ones; the number in `domid` is what makes it a driver domain.
  private final class Stage {
    let folder = TemporaryFolder()
    let store: XenstoreServer
    let xenstore: XenStore
    let control: ControlServer
    var relay: ToolstackRelay?
    private let patience: UInt64
    let requests = "/local/domain/0/vxd/control"
    let answers = "/local/domain/0/data/vxd-control"

    init(answer: JSONValue = ["well": true], patience: UInt64 = 90_000) throws {
      self.patience = patience
      store = try XenstoreServer(path: folder.path + "/xenstored")
      xenstore = try XenStore(socketPath: store.path)
      try xenstore.write("/local/domain/0/domid", "7")
      let profiles = [ControlParameter("profiles", "any", required: false, "")]
      let methods = ["device.list", "system.metrics", "config.check"].map { name in
        ControlMethod(name, "", parameters: profiles, result: [:]) { parameters throws(ControlFault) in
          guard let given = parameters["profiles"] else { return answer }
          return ["bytes": .integer(Int64(JSONText.text(given).utf8.count))]
        }
      }
      control = try ControlServer(path: folder.path + "/control.sock", methods: ControlMethods(methods, version: "0"))
      try startRelay()
    }

    func startRelay() throws {
      relay = try ToolstackRelay(
        xenstoreSocket: store.path, control: folder.path + "/control.sock", log: Logger(label: "test"),
        patience: patience)
    }

    deinit {
      relay?.stop()
      control.stop()
      store.stop()
    }

    func vxctl(_ arguments: String...) -> ProgramRun {
      ProgramRun("/usr/bin/env", ["XENSTORED_PATH=\(store.path)", ProgramRun.path("vxctl")] + arguments)
    }

    /// Whether the relay and its clients have left nothing.
    var isClean: Bool { (xenstore.list(requests) ?? []).isEmpty && (xenstore.list(answers) ?? []).isEmpty }

    func end(_ identifier: String) -> String? { xenstore.read("\(answers)/\(identifier)/end") }
  }

  @Test func answersOfManyPiecesComeWholeAndNothingIsLeft() throws {
    // Characters of several bytes, which pieces cut where it happens.
    let long = String(repeating: "größer ", count: 20_000)
    let stage = try Stage(answer: ["contentType": "text", "text": .string(long)])
    let run = stage.vxctl("metrics", "--domain", "0")
    #expect(run.status == 0, "\(run.errors)")
    #expect(run.output == long)
    #expect(eventually { stage.isClean })
  }

  @Test func requestsOfManyPiecesComeWhole() throws {
    let stage = try Stage()
    let file = stage.folder.file("profiles.json", text: "[\"" + String(repeating: "x", count: 300_000) + "\"]")
    let run = stage.vxctl("config", "check", file, "--domain", "Domain-0", "--json")
    #expect(run.status == 0, "\(run.errors)")
    #expect(run.output.contains("300004"), "\(run.output)")
  }

  @Test func aDomainThatIsNotThereIsSaid() throws {
    let stage = try Stage()
    let run = stage.vxctl("list", "--domain", "storage")
    #expect(run.status == 2)
    #expect(run.errors.contains("no domain 'storage'"), "\(run.errors)")
  }

  @Test func theClientOfAnEarlierDaemonLearnsThatItIsGone() throws {
    let stage = try Stage()
    try stage.xenstore.write("\(stage.requests)/a1/out", "1 {\"jsonrpc\"")
    #expect(eventually { stage.xenstore.read("\(stage.answers)/a1/taken") == "1" })
    // As kill -9 leaves it: no end, and what was written stays.
    stage.relay?.stop()
    try stage.xenstore.remove("\(stage.answers)/a1/end")
    try stage.startRelay()
    #expect(eventually { stage.end("a1") == "vxd was restarted" })
    try stage.xenstore.remove("\(stage.requests)/a1")
    #expect(eventually { stage.isClean })
  }

  @Test func aClientThatWaitedForTheDaemonIsServedWhenItComes() throws {
    let stage = try Stage()
    stage.relay?.stop()
    try stage.xenstore.write(
      "\(stage.requests)/b1/out", "1 {\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"device.list\"}\n")
    try stage.startRelay()
    #expect(eventually { stage.xenstore.read("\(stage.answers)/b1/out")?.contains("well") == true })
  }

  @Test func clientsHaveALimitAndSilentOnesAreGivenUp() throws {
    let stage = try Stage(patience: 1500)
    for number in 0..<ToolstackRelay.limit { try stage.xenstore.write("\(stage.requests)/c\(number)/out", "1 x") }
    let last = "c\(ToolstackRelay.limit - 1)"
    #expect(eventually { stage.xenstore.read("\(stage.answers)/\(last)/taken") == "1" })
    try stage.xenstore.write("\(stage.requests)/d/out", "1 x")
    #expect(eventually { stage.end("d")?.contains("limit") == true })
    #expect(
      eventually {
        (0..<ToolstackRelay.limit).allSatisfy { stage.end("c\($0)")?.contains("the client was silent") == true }
      })
    // The next client clears away what the dead ones have left, and has a place.
    let run = stage.vxctl("list", "--domain", "0", "--json")
    #expect(run.status == 0, "\(run.errors)")
    #expect(eventually { stage.isClean })
  }

  @Test(arguments: ["2 x", "1 ", "18446744073709551615 x", "1 " + String(repeating: "x", count: 1537)])
  func aPieceAgainstTheRulesEndsTheStream(_ piece: String) throws {
    let stage = try Stage()
    try stage.xenstore.write("\(stage.requests)/e/out", piece)
    #expect(eventually { stage.end("e") == "the other side breaks the rules" })
  }

  @Test(arguments: ["", " ", "x", "-1 x", "99999999999999999999 x", "1"])
  func whatIsNoPieceIsNoneYet(_ value: String) throws {
    #expect(StoreStream.piece(Array(value.utf8)) == nil)
  }

  /// A domain that is not trusted answers for ever, but never what was asked.
  @Test func aPeerThatNeverAnswersDoesNotKeepTheCaller() throws {
    var pair: [Int32] = [-1, -1]
    try #require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair) == 0)
    let liar = pair[1]
    let thread = try LoopThread(name: "liar")
    defer {
      thread.stopAndJoin()
      close(liar)
    }
    let client = ControlClient(adopting: pair[0], timeoutMilliseconds: 1000)
    thread.loop.enqueue {
      let line = Array("{\"jsonrpc\":\"2.0\",\"id\":99,\"result\":0}\n".utf8)
      // Until the client has closed its side.
      while send(liar, line, line.count, Int32(MSG_NOSIGNAL)) > 0 {}
    }
    let begun = EventLoop.now()
    #expect(throws: ControlClient.Failure.self) { try client.call("device.list") }
    #expect(EventLoop.now() - begun < 30_000_000_000)
    // Now that nobody reads, the liar would wait for ever.
    shutdown(liar, Int32(SHUT_RDWR))
  }
}
