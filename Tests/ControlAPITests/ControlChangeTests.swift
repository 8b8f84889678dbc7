import ControlAPI
import EventLoop
import Glibc
import Synchronization
import TestSupport
import Testing

/// Changes by the control socket, who may make them, and events that are not lost.
@Suite struct ControlChangeTests {
  private let folder = TemporaryFolder()
  private var path: String { folder.path + "/control.sock" }

  private final class Tally: Sendable {
    let count = Mutex(0)
    var value: Int { count.withLock { $0 } }
  }

  private func methods(_ tally: Tally) -> ControlMethods {
    ControlMethods(
      [
        ControlMethod("look", "Looks.", result: ["type": "integer"]) { _ throws(ControlFault) in .count(tally.value) },
        ControlMethod(
          change: "add", "Adds.", parameters: [ControlParameter("number", "integer", required: true, "How much.")]
        ) { parameters throws(ControlFault) in
          let number = Int(parameters["number"]?.integerValue ?? 0)
          guard number > 0 else { throw .invalidParameters("'number' must be positive", field: "number") }
          return ControlChange("\(number) is added") {
            tally.count.withLock { $0 += number }
            return ["total": .count(tally.value)]
          }
        },
        ControlMethod(change: "end", "Ends.", role: .admin) { _ throws(ControlFault) in ControlChange("the end") },
        ControlMethod(
          "event.subscribe", "Subscribes.", parameters: [ControlParameter("after", "integer", required: false, "")],
          result: ["type": "object"]
        ) {
          _ throws(ControlFault) in .null
        },
      ], version: "1")
  }

  private func ask(_ methods: ControlMethods, _ method: String, _ parameters: JSONValue, role: ControlRole = .admin)
    -> JSONValue
  {
    let request: JSONValue = ["jsonrpc": "2.0", "id": 1, "method": .string(method), "params": parameters]
    let reply = methods.answer(Array(JSONText.text(request).utf8), from: ControlCaller(role: role)) { _ in .null }
    return reply?["result"] ?? reply?["error"] ?? .null
  }

  @Test func dryRunChecksAndChangesNothing() {
    let tally = Tally()
    let methods = methods(tally)
    #expect(ask(methods, "add", ["number": 5, "dryRun": true]) == ["dryRun": true, "would": "5 is added"])
    #expect(tally.value == 0)
    #expect(ask(methods, "add", ["number": -5, "dryRun": true])["code"] == -32602)
  }

  @Test func changeWithAKeyIsDoneOnce() {
    let tally = Tally()
    let methods = methods(tally)
    for _ in 0..<3 { #expect(ask(methods, "add", ["number": 5, "idempotencyKey": "a"]) == ["total": 5]) }
    #expect(tally.value == 5)
    let other = ask(methods, "add", ["number": 6, "idempotencyKey": "a"])
    #expect(other["code"] == -32004)
    #expect(other["data"]?["field"] == "params.idempotencyKey")
    #expect(ask(methods, "add", ["number": 6, "idempotencyKey": ""])["code"] == -32602)
    // A refusal is no change: the key is free again.
    #expect(ask(methods, "add", ["number": 0, "idempotencyKey": "b"])["code"] == -32602)
    #expect(ask(methods, "add", ["number": 1, "idempotencyKey": "b"]) == ["total": 6])
    for number in 0..<3000 { _ = ask(methods, "add", ["number": 1, "idempotencyKey": .string("k\(number)")]) }
    #expect(tally.value == 3006)
  }

  @Test func rolesDecideWhoMayDoWhat() {
    let tally = Tally()
    let methods = methods(tally)
    #expect(ask(methods, "look", [:], role: .view) == 0)
    let refused = ask(methods, "add", ["number": 1], role: .view)
    #expect(refused["code"] == -32005)
    #expect(refused["message"] == "permission denied: 'add' requires the role operate, and yours is view")
    #expect(ask(methods, "add", ["number": 1], role: .operate) == ["total": 1])
    #expect(ask(methods, "end", [:], role: .operate)["code"] == -32005)
    #expect(ask(methods, "end", [:], role: .admin) == ["accepted": true])
    var access = ControlAccess()
    access.operators = [100]
    access.admins = [200]
    #expect(access.role(user: 0, groups: []) == .admin)
    #expect(access.role(user: 12345, groups: [5]) == .view)
    #expect(access.role(user: 12345, groups: [5, 100]) == .operate)
    #expect(access.role(user: 12345, groups: [100, 200]) == .admin)
  }

  // MARK: Events

  private func event(_ number: Int, filler: Int = 0) -> JSONValue {
    ["event": "test", "number": .count(number), "filler": .string(String(repeating: "x", count: filler))]
  }

  @Test func eventsAreNumberedAndSentAgainFromANumber() throws {
    let server = try ControlServer(path: path, methods: methods(Tally()))
    defer { server.stop() }
    let first = try ControlClient(path: path)
    let answer = try first.call("event.subscribe")
    #expect(answer["sequence"] == 0)
    for number in 1...20 { server.publish(event(number)) }
    for number in 1...20 {
      let message = try first.receive(5000)
      #expect(message["params"]?["sequence"]?.integerValue == Int64(number))
    }
    let second = try ControlClient(path: path)
    let later = try second.call("event.subscribe", ["after": 15])
    #expect(later["sequence"] == 20)
    #expect(later["epoch"] == answer["epoch"])
    for number in 16...20 { #expect(try second.receive(5000)["params"]?["number"]?.integerValue == Int64(number)) }
    server.publish(event(21))
    #expect(try second.receive(5000)["params"]?["sequence"] == 21)
  }

  @Test func whatIsForgottenIsToldAsDropped() throws {
    let server = try ControlServer(path: path, methods: methods(Tally()))
    defer { server.stop() }
    for number in 1...6000 { server.publish(event(number)) }
    // The server takes what is published in turn with what its clients ask.
    #expect(eventually { (try? ControlClient(path: path).call("event.subscribe"))?["sequence"] == 6000 })
    let client = try ControlClient(path: path)
    _ = try client.call("event.subscribe", ["after": 10])
    let dropped = try client.receive(5000)
    #expect(dropped["method"] == "event.dropped")
    #expect(dropped["params"]?["from"] == 11)
    let next = try client.receive(5000)
    #expect(next["params"]?["sequence"]?.integerValue == (dropped["params"]?["to"]?.integerValue ?? 0) + 1)
  }

  @Test func slowSubscriberIsToldWhatItMissedAndGoesOn() throws {
    let server = try ControlServer(path: path, methods: methods(Tally()))
    defer { server.stop() }
    let slow = try ControlClient(path: path)
    _ = try slow.call("event.subscribe")
    for number in 1...200 { server.publish(event(number, filler: 20_000)) }
    let other = try ControlClient(path: path)
    #expect(try other.call("look") == 0)
    var last: Int64 = 0
    var missed: (Int64, Int64)?
    while missed == nil {
      let message = try slow.receive(5000)
      if message["method"] == "event.dropped" {
        missed = (message["params"]?["from"]?.integerValue ?? 0, message["params"]?["to"]?.integerValue ?? 0)
      } else {
        #expect(message["params"]?["sequence"]?.integerValue == last + 1)
        last += 1
      }
    }
    #expect(missed?.0 == last + 1)
    #expect(missed?.1 == 200)
    server.publish(event(201))
    #expect(try slow.receive(5000)["params"]?["sequence"] == 201)
  }

  @Test func aThousandClientsAreServed() throws {
    let server = try ControlServer(path: path, methods: methods(Tally()))
    defer { server.stop() }
    var clients: [ControlClient] = []
    for _ in 0..<1000 { clients.append(try ControlClient(path: path)) }
    for client in clients { #expect(try client.call("look") == 0) }
    for client in clients.prefix(500) { _ = try client.call("event.subscribe") }
    server.publish(event(1))
    for client in clients.prefix(500) { #expect(try client.receive(10_000)["params"]?["number"] == 1) }
  }

  // MARK: Metrics

  private func get(_ socket: Int32, _ request: String) -> String {
    defer { close(socket) }
    var bytes = Array(request.utf8)
    guard write(socket, &bytes, bytes.count) == bytes.count else { return "" }
    var answer: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      let count = read(socket, &buffer, buffer.count)
      if count <= 0 { break }
      answer += buffer[..<count]
    }
    return String(decoding: answer, as: UTF8.self)
  }

  @Test func metricsAreServedByHTTPOnTheSocketAndOthersAreRefused() throws {
    let text = String(repeating: "vxd_test 1\n", count: 50_000)
    let server = try MetricsServer(path: path, port: nil, contentType: "text/test", text: { text })
    defer { server.stop() }
    let answer = get(try UnixSocket.connect(path), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    #expect(answer.hasPrefix("HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"))
    #expect(answer.hasSuffix("\r\n\r\n" + text))
    #expect(get(try UnixSocket.connect(path), "POST /metrics HTTP/1.1\r\n\r\n").hasPrefix("HTTP/1.0 405"))
    #expect(get(try UnixSocket.connect(path), "GET / HTTP/1.1\r\n\r\n").hasPrefix("HTTP/1.0 404"))
    #expect(get(try UnixSocket.connect(path), "nonsense\r\n\r\n").hasPrefix("HTTP/1.0 400"))
    // Endless heads end the connection, and a client that says nothing holds nobody up.
    let silent = try UnixSocket.connect(path)
    #expect(get(try UnixSocket.connect(path), String(repeating: "x", count: 10_000)).hasPrefix("HTTP/1.0 431"))
    #expect(get(try UnixSocket.connect(path), "GET /metrics HTTP/1.0\r\n\r\n").hasPrefix("HTTP/1.0 200"))
    close(silent)
  }
}
