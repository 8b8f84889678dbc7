import TestSupport
import Testing

/// Four landings one after the other run every scenario (CONTRIBUTING.md), and each says what it leaves out.
@Suite struct TurnTests {
  private static let testbed =
    "/" + #filePath.split(separator: "/").dropLast(2).joined(separator: "/") + "/Testbed"

  private func lines(_ program: String, _ arguments: [String], turn: Int = 0) throws -> [String] {
    let run = try ChildProcess.run(program, arguments, environment: ["VXD_TESTBED_TURN": "\(turn)"])
    #expect(run.status == 0, "\(run.output)")
    return run.output.split(separator: "\n").map(String.init)
  }

  @Test func everyScenarioHasItsTurnInTheGate() throws {
    let command = Self.testbed + "/testbed"
    var all: Set<String> = []
    var ran: Set<String> = []
    for turn in 7..<11 {
      let now = try lines(command, ["list"], turn: turn)
      let left = try lines(command, ["list", "left"], turn: turn)
      #expect(!now.isEmpty && !left.isEmpty && Set(now + left).count == now.count + left.count)
      #expect(all.isEmpty || all == Set(now + left))
      all = Set(now + left)
      ran.formUnion(now)
    }
    #expect(ran == all)
    let files = try lines(
      "/bin/sh", ["-c", "cd \(Self.testbed)/scenarios && ls *.sh extra/*.sh | sed 's/[.]sh$//'"])
    #expect(files.count > 20)
    for name in files { #expect(all.contains(name), "no turn runs \(name)") }
  }
}
