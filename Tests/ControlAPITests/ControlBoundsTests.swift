import ControlAPI
import EventLoop
import Glibc
import Synchronization
import TestSupport
import Testing

/// What clients of the control socket may take up: places, memory and time, one by one and all together.
@Suite struct ControlBoundsTests {
  private let folder = TemporaryFolder()
  private var path: String { folder.path + "/control.sock" }

  /// Who connects next.
  private let next = Next()

  private final class Next: Sendable { let user = Mutex<UInt32>(0) }

  private func server(_ change: (inout ControlServer.Bounds) -> Void = { _ in }) throws -> ControlServer {
    var bounds = ControlServer.Bounds()
    let next = next
    change(&bounds)
    return try ControlServer(
      path: path, bounds: bounds,
      identify: { _ in
        let user = next.user.withLock { $0 }
        return ControlCaller(role: user == 0 ? .admin : .view, user: user)
      },
      methods: ControlMethods(
        [
          ControlMethod("ping", "", result: [:]) { _ throws(ControlFault) in "pong" },
          ControlMethod("large", "", result: [:]) { _ throws(ControlFault) in
            .string(String(repeating: "x", count: 700_000))
          },
        ], version: "1"))
  }

  private func request(_ method: String, id: Int = 1) -> String {
    #"{"jsonrpc":"2.0","id":\#(id),"method":"\#(method)"}"#
  }

  private func readLine(_ socket: Int32) -> String {
    var bytes: [UInt8] = []
    var byte: UInt8 = 0
    var poller = pollfd(fd: socket, events: Int16(POLLIN), revents: 0)
    while poll(&poller, 1, 20_000) > 0, read(socket, &byte, 1) == 1, byte != 0x0a { bytes.append(byte) }
    return String(decoding: bytes, as: UTF8.self)
  }

  private func send(_ socket: Int32, _ text: String) {
    let bytes = Array(text.utf8)
    #expect(Glibc.send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count)
  }

  @Test func userWithManyConnectionsTakesNobodysPlace() throws {
    let server = try server {
      $0.clients = 20
      $0.reserved = 4
      $0.clientsPerUser = 8
    }
    defer { server.stop() }
    var sockets: [Int32] = []
    defer { sockets.forEach { close($0) } }
    func admit(_ user: UInt32) throws -> String {
      next.user.withLock { $0 = user }
      let socket = try UnixSocket.connect(path)
      sockets.append(socket)
      // Who is turned away may find the connection closed.
      let bytes = Array((request("ping") + "\n").utf8)
      _ = Glibc.send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL))
      return readLine(socket)
    }
    for _ in 0..<8 { #expect(try admit(54321).contains("pong")) }
    let refused = try admit(54321)
    #expect(refused.contains("-32007") && refused.contains("user 54321 has 8 connections"), "\(refused)")
    // Others still have room, and at last admins alone.
    for _ in 0..<8 { #expect(try admit(54322).contains("pong")) }
    #expect(try admit(54323).contains("the last 4 are for role admin"))
    for _ in 0..<4 { #expect(try admit(0).contains("pong")) }
    #expect(try admit(0).contains("vxd has 20 connections"))
    // A place that is given back is another's.
    close(sockets.removeFirst())
    #expect(eventually { (try? admit(0).contains("pong")) == true })
  }

  /// Answers that nobody takes: their sum is bounded, and the one who has them is the one who loses.
  @Test func clientsTogetherHoldABoundedAmount() throws {
    let server = try server { $0.bytes = 4 << 20 }
    defer { server.stop() }
    let modest = try ControlClient(path: path)
    #expect(try modest.call("ping") == "pong")
    var sockets: [Int32] = []
    defer { sockets.forEach { close($0) } }
    for _ in 0..<16 {
      let socket = try UnixSocket.connect(path)
      sockets.append(socket)
      send(socket, String(repeating: request("large") + "\n", count: 4))
      #expect(try modest.call("ping") == "pong")
    }
    // Who was dropped finds the end behind what the kernel had; the last ones are there and get everything.
    func answers(_ socket: Int32) -> Int {
      shutdown(socket, Int32(SHUT_WR))
      var count = 0
      while readLine(socket).contains("result") { count += 1 }
      return count
    }
    let complete = sockets.map(answers).count { $0 == 4 }
    #expect(complete < 8, "\(complete) of 16 clients with 2.8 MB each got everything, with 4 MiB in all")
    #expect(try modest.call("ping") == "pong")
  }

  @Test func clientThatTakesNothingIsDroppedAfterAWhile() throws {
    let server = try server { $0.patience = 200 }
    defer { server.stop() }
    let socket = try UnixSocket.connect(path)
    defer { close(socket) }
    let idle = try ControlClient(path: path)
    #expect(try idle.call("ping") == "pong")
    send(socket, String(repeating: request("large") + "\n", count: 4))
    // Nothing is read: the end shows as a hang-up all the same.
    var poller = pollfd(fd: socket, events: 0, revents: 0)
    #expect(poll(&poller, 1, 30_000) == 1)
    #expect(poller.revents & Int16(POLLHUP) != 0)
    // One that waits for nothing stays.
    #expect(try idle.call("ping") == "pong")
  }

  /// A client that always leaves a little would have everything that it was ever sent kept for it.
  @Test func whatWasSentIsNotKept() throws {
    let pair = try ChildProcess.pair()
    defer { close(pair.near) }
    _ = fcntl(pair.far, F_SETFL, fcntl(pair.far, F_GETFL) | O_NONBLOCK)
    let connection = ControlConnection(
      OwnedDescriptor(adopting: pair.far),
      methods: ControlMethods(
        [
          ControlMethod("large", "", result: [:]) { _ throws(ControlFault) in
            .string(String(repeating: "x", count: 700_000))
          }
        ], version: "1"), caller: ControlCaller(role: .view), history: EventHistory())
    var buffer = [UInt8](repeating: 0, count: 500_000)
    for _ in 0..<100 {
      send(pair.near, request("large") + "\n")
      connection.receive()
      connection.flush()
      var taken = 0
      while taken < 700_000 {
        let count = recv(pair.near, &buffer, min(buffer.count, 700_000 - taken), Int32(MSG_DONTWAIT))
        if count <= 0 { break }
        taken += count
        connection.flush()
      }
      #expect(connection.held < 8 << 20)
    }
    #expect(!connection.isOver)
  }

  @Test func answersToOneBatchAreBounded() throws {
    let methods = ControlMethods(
      [
        ControlMethod("large", "", result: [:]) { _ throws(ControlFault) in
          .string(String(repeating: "x", count: 700_000))
        }
      ], version: "1")
    let batch = "[" + (0..<64).map { request("large", id: $0) }.joined(separator: ",") + "]"
    let answer = try #require(methods.answer(Array(batch.utf8), subscribe: { _ in .null })?.arrayValue)
    #expect(answer.count == 64)
    #expect(answer.map { $0["id"]?.integerValue } == (0..<64).map { Int64($0) })
    let done = answer.count { $0["result"] != nil }
    #expect(done == 6)
    #expect(answer.last?["error"]?["code"] == -32007)
  }

  @Test func keysAreRememberedForTheirUserAndForSmallRequestsOnly() throws {
    let methods = ControlMethods(
      [
        ControlMethod(change: "set", "", parameters: [ControlParameter("text", "string", required: true, "")]) {
          parameters throws(ControlFault) in
          ControlChange("set") { ["text": parameters["text"] ?? .null] }
        }
      ], version: "1")
    func set(_ text: String, by user: UInt32) -> JSONValue? {
      let request: JSONValue = [
        "jsonrpc": "2.0", "id": 1, "method": "set",
        "params": ["text": .string(text), "idempotencyKey": "k"],
      ]
      let caller = ControlCaller(role: .operate, user: user)
      return methods.answer(Array(JSONText.text(request).utf8), from: caller, subscribe: { _ in .null })
    }
    #expect(set("a", by: 1)?["result"]?["text"] == "a")
    // The same key of another user is another key.
    #expect(set("b", by: 2)?["result"]?["text"] == "b")
    let conflict = set("c", by: 1)?["error"]
    #expect(conflict?["code"] == -32004)
    #expect(conflict?["message"] == "the idempotency key 'k' was used for another request")
    let large = set(String(repeating: "x", count: 20_000), by: 3)?["error"]
    #expect(large?["code"] == -32602)
    #expect(large?["data"]?["field"] == "params.idempotencyKey")
  }
}
