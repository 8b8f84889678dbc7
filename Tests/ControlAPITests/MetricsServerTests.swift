import ControlAPI
import EventLoop
import Glibc
import TestSupport
import Testing

@Suite struct MetricsServerTests {
  private let folder = TemporaryFolder()
  private var path: String { folder.path + "/metrics.sock" }

  private func server() throws -> MetricsServer {
    try MetricsServer(path: path, port: nil, contentType: "text/plain") { "answer 42\n" }
  }

  private func receive(_ raw: Int32) -> String {
    var answer: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 4096)
    while case let count = read(raw, &buffer, buffer.count), count > 0 { answer += buffer[..<count] }
    return String(decoding: answer, as: UTF8.self)
  }

  /// Wherever the pieces of a request begin and end.
  @Test(arguments: 1..<40) func requestIsUnderstoodInPieces(piece: Int) throws {
    let server = try server()
    defer { server.stop() }
    let request = Array("GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n".utf8)
    let raw = try UnixSocket.connect(path)
    defer { close(raw) }
    for start in stride(from: 0, to: request.count, by: piece) {
      let part = Array(request[start..<min(start + piece, request.count)])
      #expect(send(raw, part, part.count, Int32(MSG_NOSIGNAL)) == part.count)
      // The server has read it when nothing is left in the socket.
      var waiting: Int32 = 0
      #expect(eventually { ioctl(raw, UInt(TIOCOUTQ), &waiting) == 0 && waiting == 0 })
    }
    let answer = receive(raw)
    #expect(answer.hasPrefix("HTTP/1.0 200 OK\r\n"))
    #expect(answer.hasSuffix("answer 42\n"))
  }

  /// One byte at a time up to the limit: the work for a byte does not grow with what came before.
  @Test func endlessHeadIsGivenUpCheaply() throws {
    let server = try server()
    defer { server.stop() }
    let raw = try UnixSocket.connect(path)
    defer { close(raw) }
    var times: [UInt64] = []
    var sent = 0
    while sent < 100_000 {
      var byte = UInt8(ascii: "x")
      let start = EventLoop.now()
      guard send(raw, &byte, 1, Int32(MSG_NOSIGNAL)) == 1 else { break }
      sent += 1
      var waiting: Int32 = 0
      while ioctl(raw, UInt(TIOCOUTQ), &waiting) == 0, waiting > 0 { yieldThread() }
      times.append(EventLoop.now() - start)
    }
    // The limit of a head, and what is dropped behind the answer (431).
    #expect(sent > 8000 && sent <= 8192 + 65536 + 4096, "\(sent) bytes")
    // By medians, which neighbours on the processor do not move: of the first bytes, and of the last within the limit of a head.
    func median(_ part: ArraySlice<UInt64>) -> UInt64 { part.sorted()[part.count / 2] }
    let (early, late) = (median(times[..<1000]), median(times[7000..<8000]))
    #expect(late < 10 * early, "\(early) ns, then \(late) ns")
  }
}
