import ControlAPI
import EventLoop
import Glibc
import Synchronization
import TestSupport
import Testing

/// What clients that others wrote do on the control socket: socat, nc, generated OpenRPC clients.
@Suite struct StockClientTests {
  private let folder = TemporaryFolder()
  private var path: String { folder.path + "/control.sock" }

  private let count = Tally()

  private final class Tally: Sendable {
    private let value = Mutex(0)
    func add() { value.withLock { $0 += 1 } }
    var total: Int { value.withLock { $0 } }
  }

  private var methods: ControlMethods {
    let count = count
    return ControlMethods(
      [
        ControlMethod(
          "echo", "", parameters: [ControlParameter("text", "any", required: false, "")], result: [:]
        ) { parameters throws(ControlFault) in
          count.add()
          return parameters["text"] ?? "nothing"
        },
        ControlMethod("large", "", result: [:]) { _ throws(ControlFault) in
          .string(String(repeating: "x", count: 10_000))
        },
        ControlMethod("event.subscribe", "", result: [:]) { _ throws(ControlFault) in .null },
      ], version: "1")
  }

  private func answer(_ text: String) -> JSONValue? { methods.answer(Array(text.utf8), subscribe: { _ in .null }) }

  // MARK: Connections

  private func write(_ socket: Int32, _ text: String) {
    var rest = Array(text.utf8)[...]
    while !rest.isEmpty {
      let count = rest.withUnsafeBytes { send(socket, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
      guard count > 0 else { return }
      rest = rest.dropFirst(count)
    }
  }

  /// Everything up to the end of the connection.
  private func readAll(_ socket: Int32, timeout: Int32 = 20_000) -> [UInt8]? {
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      var poller = pollfd(fd: socket, events: Int16(POLLIN), revents: 0)
      guard poll(&poller, 1, timeout) > 0 else { return nil }
      let count = read(socket, &buffer, buffer.count)
      if count <= 0 { return count == 0 ? bytes : nil }
      bytes += buffer[..<count]
    }
  }

  private func lines(_ bytes: [UInt8]?) -> Int? { bytes?.count { $0 == 0x0a } }

  /// `echo ... | socat - UNIX:...`: the end of requests is not that of interest. More answers than any buffer holds.
  @Test func halfClosedClientGetsAllAnswers() throws {
    let server = try ControlServer(path: path, methods: methods)
    defer { server.stop() }
    for (method, requests) in [("echo", 1), ("large", 60), ("large", 400), ("echo", 3000)] {
      let socket = try UnixSocket.connect(path)
      defer { close(socket) }
      write(socket, String(repeating: #"{"jsonrpc":"2.0","id":1,"method":"\#(method)"}"# + "\n", count: requests))
      #expect(shutdown(socket, Int32(SHUT_WR)) == 0)
      #expect(lines(readAll(socket)) == requests, "\(method), \(requests)")
    }
  }

  @Test func lastLineNeedsNoNewline() throws {
    let server = try ControlServer(path: path, methods: methods)
    defer { server.stop() }
    for (text, expected) in [
      (#"{"jsonrpc":"2.0","id":7,"method":"echo"}"#, #"{"jsonrpc":"2.0","result":"nothing","id":7}"#), ("{", "-32700"),
      ("", nil), ("\n", "-32600"),
    ] as [(String, String?)] {
      let socket = try UnixSocket.connect(path)
      defer { close(socket) }
      write(socket, text)
      shutdown(socket, Int32(SHUT_WR))
      let answer = String(decoding: readAll(socket) ?? Array("no end".utf8), as: UTF8.self)
      if let expected { #expect(answer.contains(expected), "\(text): \(answer)") } else { #expect(answer == "") }
    }
  }

  /// A subscriber that sends no more still listens.
  @Test func halfClosedSubscriberGetsEvents() throws {
    let server = try ControlServer(path: path, methods: methods)
    defer { server.stop() }
    let socket = try UnixSocket.connect(path)
    write(socket, #"{"jsonrpc":"2.0","id":1,"method":"event.subscribe"}"# + "\n")
    shutdown(socket, Int32(SHUT_WR))
    var buffer = [UInt8](repeating: 0, count: 4096)
    #expect(read(socket, &buffer, buffer.count) > 0)
    for number in 1...3 {
      server.publish(["event": "test", "number": .count(number)])
      let count = read(socket, &buffer, buffer.count)
      #expect(String(decoding: buffer[..<max(count, 0)], as: UTF8.self).contains("\"number\":\(number)"))
    }
    close(socket)
  }

  /// Whoever sends notifications and leaves has still asked for them.
  @Test func requestsOfAClientThatHasGoneAreDone() throws {
    let server = try ControlServer(path: path, methods: methods)
    defer { server.stop() }
    for (message, requests) in [
      (#"{"jsonrpc":"2.0","method":"echo"}"#, 1500), (#"{"jsonrpc":"2.0","id":1,"method":"echo"}"#, 1500),
    ] {
      let before = count.total
      let socket = try UnixSocket.connect(path)
      write(socket, String(repeating: message + "\n", count: requests))
      close(socket)
      #expect(eventually { count.total == before + requests }, "\(count.total - before)")
    }
  }

  /// Thousands of requests at once, whose answers nobody takes: the next client does not wait for them, and their sender gets them all later.
  @Test func floodHoldsNobodyUpAndLosesNothing() throws {
    let server = try ControlServer(path: path, methods: methods)
    defer { server.stop() }
    let socket = try UnixSocket.connect(path)
    defer { close(socket) }
    let requests = 1400
    write(socket, String(repeating: #"{"jsonrpc":"2.0","id":1,"method":"large"}"# + "\n", count: requests))
    let other = try ControlClient(path: path)
    for _ in 0..<10 { #expect(try other.call("echo") == "nothing") }
    shutdown(socket, Int32(SHUT_WR))
    #expect(lines(readAll(socket)) == requests)
  }

  // MARK: Messages

  /// JSON-RPC 2.0, section 5: the same value as in the request.
  @Test(arguments: [
    "0", "-1", "9223372036854775807", "9223372036854775808", "18446744073709551615", "-9223372036854775809",
    "123456789012345678901234567890", "0.1", "1.50", "1e3", "-2.5E-7", #""text""#, #""""#, #""ä \" \u0001""#, "null",
  ])
  func idComesBackAsItWas(id: String) throws {
    let reply = try #require(answer(#"{"jsonrpc":"2.0","id":\#(id),"method":"echo"}"#))
    #expect(JSONText.text(reply) == #"{"jsonrpc":"2.0","result":"nothing","id":\#(id)}"#)
    let echoed = try #require(answer(#"{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":[\#(id)]}}"#))
    #expect(JSONText.text(echoed) == #"{"jsonrpc":"2.0","result":[\#(id)],"id":1}"#)
  }

  /// Also in forms that mean the same as another: byte by byte, as clients compare them that keep the text.
  @Test(arguments: [
    "-0", "-0.0", "0.0", "1E+02", #""\ud800""#, #""\udc00x""#, #""\ud83d\ude00""#, #""\u0041\/\b""#, "\"\u{9b}\u{7f}\"",
    "123456789012345678901234567890", #""\u0000""#,
  ])
  func idComesBackByteByByte(id: String) throws {
    for (request, expected) in [
      (#"{"jsonrpc":"2.0","id":\#(id),"method":"echo"}"#, #"{"jsonrpc":"2.0","result":"nothing","id":\#(id)}"#),
      // Its name may be written in another form, its value stand anywhere, and the last of several counts.
      (
        #"{"method":"echo","params":{"text":{"id":[8]}},"id":1, "\u0069d" : \#(id) ,"jsonrpc":"2.0"}"#,
        #"{"jsonrpc":"2.0","result":{"id":[8]},"id":\#(id)}"#
      ),
      (
        #"[{"jsonrpc":"2.0","method":"echo","id":1},{"jsonrpc":"2.0","id":\#(id),"method":"echo","params":{"text":[1,2]}}]"#,
        #"[{"jsonrpc":"2.0","result":"nothing","id":1},{"jsonrpc":"2.0","result":[1,2],"id":\#(id)}]"#
      ),
    ] {
      #expect(JSONText.text(try #require(answer(request))) == expected)
    }
    let refused = JSONText.text(try #require(answer(#"{"jsonrpc":"2.0","id":\#(id),"method":"nosuch"}"#)))
    #expect(refused.hasSuffix(#","id":\#(id)}"#), "\(refused)")
  }

  /// It is put into each answer, and is bounded.
  @Test func longIDIsRefused() throws {
    func ask(_ bytes: Int) -> JSONValue? {
      answer(#"{"jsonrpc":"2.0","id":"\#(String(repeating: "x", count: bytes - 2))","method":"echo"}"#)
    }
    #expect(ask(1024)?["result"] == "nothing")
    let before = count.total
    for bytes in [1025, 100_000] {
      let refused = try #require(ask(bytes))
      #expect(refused["error"]?["code"] == -32600)
      #expect(refused["error"]?["data"]?["field"] == "id")
      #expect(refused["error"]?["message"] == .string("'id' has \(bytes) bytes; expected at most 1024"))
      #expect(refused["id"] == .null)
    }
    #expect(count.total == before)
  }

  /// RFC 8259, section 6, and what json-c would take otherwise.
  @Test(arguments: [
    "NaN", "Infinity", "-Infinity", "-NaN", "1e999", "-1e999", "1.", ".5", "+1", "01", "-", "1e", "0x10", "True", "nul",
    "'a'", "\"a\tb\"", "\"a\u{1}\"", #"{"a\u0000b":1}"#, "nulll", "truefalse", "[1 2]", "\u{a0}1",
  ])
  func textThatIsNoJSONIsAParseError(text: String) {
    let request = #"{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":\#(text)}}"#
    #expect(answer(request)?["error"]?["code"] == -32700, "\(text)")
    #expect(throws: JSONText.Fault.self) { try JSONText.parse(Array(text.utf8)) }
  }

  @Test(arguments: [
    #"{"a\u0020":1}"#, #"["\\u0000"]"#, #"["\u0000"]"#, #""\\""#, "1E+2", "-0.0e-0", "[]",
    #"{"a":{"b":[true,false,null]}}"#,
  ])
  func textThatIsJSONIsTaken(text: String) throws {
    let value = try JSONText.parse(Array(text.utf8))
    #expect(try JSONText.parse(Array(JSONText.text(value).utf8)) == value)
  }

  /// Doubles are written in their shortest form: 0.1, not 0.10000000000000001; and never as something that is no JSON.
  @Test func doublesSurvive() throws {
    for number in [0.1, 1.0 / 3, 1e300, .leastNonzeroMagnitude, -2.5, 1e16] {
      let text = JSONText.text(.number(number))
      #expect(Double(text) == number, "\(text)")
      #expect(throws: Never.self) { try JSONText.parse(Array(text.utf8)) }
    }
    #expect(JSONText.text(.number(0.1)) == "0.1")
    for number in [Double.nan, .infinity, -.infinity] { #expect(JSONText.text(.number(number)) == "null") }
  }

  /// Any bytes: what is taken comes out as JSON that means the same.
  @Test func whatIsTakenComesBack() throws {
    var random = SeededGenerator(seed: 0x15)
    let pieces = [
      "{", "}", "[", "]", ",", ":", "\"a\"", "\"\\u0000\"", "1", "-0", "1e5", "99999999999999999999", "0.50", "true",
      "null", " ", "\\", "N",
      "\"", "\u{7f}",
    ]
    var taken = 0
    for _ in 0..<20_000 {
      let text = (0..<Int.random(in: 1...7, using: &random)).map { _ in pieces.randomElement(using: &random) ?? "" }
        .joined()
      guard let value = try? JSONText.parse(Array(text.utf8)) else { continue }
      taken += 1
      let again = JSONText.text(value)
      #expect(try JSONText.parse(Array(again.utf8)) == value, "seed 0x15: \(text) became \(again)")
    }
    #expect(taken > 500)
  }

  @Test func emptyAndAbsentParametersAreTheSame() {
    for params in ["", #","params":[]"#, #","params":null"#, #","params":{}"#] {
      #expect(answer(#"{"jsonrpc":"2.0","id":1,"method":"echo"\#(params)}"#)?["result"] == "nothing", "\(params)")
    }
    for params in ["[1]", "5", #""x""#, "true"] {
      let error = answer(#"{"jsonrpc":"2.0","id":1,"method":"echo","params":\#(params)}"#)?["error"]
      #expect(error?["code"] == -32602, "\(params)")
      #expect(error?["data"]?["field"] == "params")
    }
  }

  /// JSON-RPC 2.0, 4.1: whatever is wrong with it.
  @Test func notificationsAreNeverAnswered() {
    for rest in ["", #","params":[1]"#, #","params":5"#, #","params":{"nosuch":1}"#] {
      for method in ["echo", "nosuch", "rpc.discover"] {
        #expect(answer(#"{"jsonrpc":"2.0","method":"\#(method)"\#(rest)}"#) == nil, "\(method) \(rest)")
      }
    }
    #expect(answer(#"[{"jsonrpc":"2.0","method":"echo","params":[1]}]"#) == nil)
    // No request at all: nobody can tell what was meant, and the answer has no id.
    #expect(answer(#"{"jsonrpc":"2.0"}"#)?["id"] == .null)
    #expect(answer(#"{"method":"echo"}"#)?["error"]?["code"] == -32600)
  }
}
