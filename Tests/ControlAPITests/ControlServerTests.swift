import ControlAPI
import EventLoop
import Glibc
import TestSupport
import Testing

@Suite struct ControlServerTests {
  private let folder = TemporaryFolder()
  private var path: String { folder.path + "/control.sock" }

  private func server() throws -> ControlServer {
    try ControlServer(
      path: path,
      methods: ControlMethods(
        [
          ControlMethod("ping", "Answers.", result: ["type": "string"]) { _ throws(ControlFault) in "pong" },
          ControlMethod(
            "event.subscribe", "Subscribes.", parameters: [ControlParameter("after", "integer", required: false, "")],
            result: ["type": "object"]
          ) { _ throws(ControlFault) in ["subscribed": true] },
        ], version: "1"))
  }

  @Test func callsAreAnswered() throws {
    let server = try server()
    defer { server.stop() }
    let client = try ControlClient(path: path)
    for _ in 0..<100 { #expect(try client.call("ping") == "pong") }
  }

  @Test func socketIsForOwnerAndGroupOnly() throws {
    let server = try server()
    defer { server.stop() }
    var status = stat()
    #expect(stat(path, &status) == 0)
    #expect(status.st_mode & 0o777 == 0o660)
  }

  @Test func messageOverOneMebibyteGetsAnErrorAndTheConnectionGoesOn() throws {
    let server = try server()
    defer { server.stop() }
    let client = try ControlClient(path: path)
    try client.send([UInt8](repeating: 0x20, count: 3 << 20))
    let reply = try client.receive(5000)
    #expect(reply["error"]?["code"]?.integerValue == -32600)
    #expect(reply["error"]?["data"]?["field"]?.stringValue == "message")
    #expect(try client.call("ping") == "pong")
  }

  @Test func subscribersGetEventsAndOthersDoNot() throws {
    let server = try server()
    defer { server.stop() }
    let listener = try ControlClient(path: path)
    let other = try ControlClient(path: path)
    _ = try listener.call("event.subscribe")
    _ = try other.call("ping")
    server.publish(["event": "device.ready"])
    #expect(try listener.receive(5000)["params"]?["event"] == "device.ready")
    // Who got the event got it before this: the next message to the other is the answer to its own call.
    try other.send(Array(#"{"jsonrpc": "2.0", "id": 77, "method": "ping"}"#.utf8))
    #expect(try other.receive(30_000)["id"] == 77)
  }

  @Test(arguments: ["0", "1", "3", "4", "9223372036854775806", "9223372036854775807"])
  func eventsBehindAnyNumberAreReplayed(after: String) throws {
    let server = try server()
    defer { server.stop() }
    for number: Int64 in 1...3 { server.publish(["number": .integer(number)]) }
    let client = try ControlClient(path: path)
    _ = try client.call("ping")
    try client.send(
      Array(#"{"jsonrpc": "2.0", "id": 1, "method": "event.subscribe", "params": {"after": \#(after)}}"#.utf8))
    #expect(try client.receive(5000)["result"]?["sequence"] == 3)
    let first = (Int64(after) ?? .max) < 3 ? (Int64(after) ?? .max) + 1 : 4
    for number in first..<4 {
      #expect(try client.receive(5000)["params"]?["number"] == .integer(number))
    }
    server.publish(["number": 4])
    #expect(try client.receive(5000)["params"]?["sequence"] == 4)
  }

  @Test(arguments: ["-1", "-9223372036854775808", "-99999999999999999999", "99999999999999999999", "0.5"])
  func numberThatNoEventCanHaveIsRefused(after: String) throws {
    let server = try server()
    defer { server.stop() }
    server.publish(["number": 1])
    let client = try ControlClient(path: path)
    try client.send(
      Array(#"{"jsonrpc": "2.0", "id": 1, "method": "event.subscribe", "params": {"after": \#(after)}}"#.utf8))
    let reply = try client.receive(5000)
    #expect(reply["error"]?["code"] == -32602)
    #expect(reply["error"]?["data"]?["field"] == "params.after")
    #expect(try client.call("ping") == "pong")
    // It is no subscriber: an event would come before the answer to what is asked later.
    server.publish(["number": 2])
    try client.send(Array(#"{"jsonrpc": "2.0", "id": 77, "method": "ping"}"#.utf8))
    #expect(try client.receive(30_000)["id"] == 77)
  }

  /// A client that never reads is dropped; the others are answered all the time.
  @Test func clientThatDoesNotReadHoldsNobodyUp() throws {
    let server = try server()
    defer { server.stop() }
    let lazy = try ControlClient(path: path)
    _ = try lazy.call("event.subscribe")
    let client = try ControlClient(path: path)
    let event: JSONValue = ["filler": .string(String(repeating: "x", count: 100_000))]
    for round in 0..<200 {
      server.publish(event)
      if round % 20 == 0 { #expect(try client.call("ping") == "pong") }
    }
    #expect(try client.call("ping") == "pong")
  }

  @Test func socketOfADeadDaemonIsReplacedAndThatOfALiveOneIsNot() throws {
    close(try UnixSocket.listen(path, mode: 0o600))
    let server = try server()
    defer { server.stop() }
    #expect(throws: Errno(EADDRINUSE)) { _ = try UnixSocket.listen(path, mode: 0o600) }
  }

  @Test func absentDaemonIsNamedWithItsRemedy() {
    do {
      _ = try ControlClient(path: "/nowhere/control.sock")
      Issue.record("a connection to nothing")
    } catch {
      #expect(error.message.contains("/nowhere/control.sock"))
      #expect(error.message.contains("Is it running"))
    }
  }
}
