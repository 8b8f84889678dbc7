import ControlAPI
import EventLoop
import Glibc
import TestSupport
import Testing

/// The metrics endpoint as scrapers, probes and people ask it.
@Suite struct MetricsHTTPTests {
  private let folder = TemporaryFolder()
  private var path: String { folder.path + "/metrics.sock" }

  private static let openMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8"
  private static let text = """
    # TYPE vxd_build info
    # HELP vxd_build The version.
    vxd_build_info{version="1"} 1
    # TYPE vxd_requests counter
    # UNIT vxd_requests requests
    # HELP vxd_requests Requests # so far.
    vxd_requests_total{guest="a # TYPE b"} 5
    # TYPE vxd_state stateset
    # HELP vxd_state The state.
    vxd_state{vxd_state="ready"} 1
    # TYPE vxd_time_seconds histogram
    # HELP vxd_time_seconds Time.
    vxd_time_seconds_bucket{le="+Inf"} 1
    vxd_time_seconds_count 1
    vxd_time_seconds_sum 0.5
    # EOF

    """

  private func server() throws -> MetricsServer {
    try MetricsServer(path: path, port: nil, contentType: Self.openMetrics, text: { Self.text })
  }

  private struct Answer {
    var status = ""
    var fields: [String: String] = [:]
    var body = ""
  }

  private func ask(_ request: String) throws -> Answer {
    let socket = try UnixSocket.connect(path)
    defer { close(socket) }
    var bytes = Array(request.utf8)
    _ = send(socket, &bytes, bytes.count, Int32(MSG_NOSIGNAL))
    var read: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while case let count = recv(socket, &buffer, buffer.count, 0), count > 0 { read += buffer[..<count] }
    var answer = Answer()
    guard let end = (0..<max(0, read.count - 3)).first(where: { Array(read[$0..<($0 + 4)]) == [13, 10, 13, 10] }) else {
      return answer
    }
    let lines = String(decoding: read[..<end], as: UTF8.self).split(separator: "\r\n").map(String.init)
    answer.status = lines.first.map { String($0.dropFirst(9).prefix(3)) } ?? ""
    for line in lines.dropFirst() {
      let parts = line.split(separator: ":", maxSplits: 1).map(String.init)
      if parts.count == 2 { answer.fields[parts[0].lowercased()] = String(parts[1].dropFirst()) }
    }
    answer.body = String(decoding: read[(end + 4)...], as: UTF8.self)
    return answer
  }

  @Test func headIsAnsweredLikeGetWithoutABody() throws {
    let server = try server()
    defer { server.stop() }
    let get = try ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    let head = try ask("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    #expect(head.status == "200")
    #expect(head.body == "")
    #expect(head.fields == get.fields)
    #expect(head.fields["content-length"] == "\(get.body.utf8.count)")
    #expect(try ask("HEAD /nothing HTTP/1.1\r\n\r\n").status == "404")
    #expect(try ask("HEAD /nothing HTTP/1.1\r\n\r\n").body == "")
  }

  @Test(
    arguments: [
      (nil, false), ("*/*", false), ("text/plain;version=0.0.4", false), ("text/plain", false),
      ("application/openmetrics-text", true), ("application/openmetrics-text; version=1.0.0; charset=utf-8", true),
      // As Prometheus 2 asks.
      (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        true
      ),
      ("text/plain;q=1,application/openmetrics-text;q=0.1", false), ("application/openmetrics-text;q=0", false),
      ("application/openmetrics-text;q=x", false), (",;,q=,", false),
    ] as [(String?, Bool)])
  func clientsGetTheFormatThatTheyAskFor(accept: String?, isOpenMetrics: Bool) throws {
    let server = try server()
    defer { server.stop() }
    let answer = try ask("GET /metrics HTTP/1.1\r\n\(accept.map { "aCCept:  \($0)  \r\n" } ?? "")\r\n")
    #expect(answer.status == "200")
    #expect(
      answer.fields["content-type"] == (isOpenMetrics ? Self.openMetrics : "text/plain; version=0.0.4; charset=utf-8"))
    #expect(answer.fields["vary"] == "Accept")
    #expect((answer.body == Self.text) == isOpenMetrics)
  }

  /// Prometheus' own format: no types that it does not know, names of metadata are those of samples, no end mark.
  @Test func plainTextIsPrometheusFormat() throws {
    let server = try server()
    defer { server.stop() }
    let body = try ask("GET /metrics HTTP/1.0\r\n\r\n").body
    #expect(
      body == """
        # TYPE vxd_build_info gauge
        # HELP vxd_build_info The version.
        vxd_build_info{version="1"} 1
        # TYPE vxd_requests_total counter
        # HELP vxd_requests_total Requests # so far.
        vxd_requests_total{guest="a # TYPE b"} 5
        # TYPE vxd_state gauge
        # HELP vxd_state The state.
        vxd_state{vxd_state="ready"} 1
        # TYPE vxd_time_seconds histogram
        # HELP vxd_time_seconds Time.
        vxd_time_seconds_bucket{le="+Inf"} 1
        vxd_time_seconds_count 1
        vxd_time_seconds_sum 0.5

        """)
  }

  @Test(arguments: [
    ("GET http://host/metrics HTTP/1.1\r\n\r\n", "200"), ("GET HTTP://host:9/metrics?a=b HTTP/1.1\r\n\r\n", "200"),
    ("GET http://host HTTP/1.1\r\n\r\n", "404"), ("GET http://metrics HTTP/1.1\r\n\r\n", "404"),
    ("GET /metrics HTTP/1.1\n\n", "200"), ("GET /metrics HTTP/1.1\nHost: x\r\n\n", "200"),
    ("\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n", "200"), ("\n\nGET /metrics HTTP/1.1\n\n", "200"),
    ("GET /metrics HTTP/2.0\r\n\r\n", "400"), ("GET metrics HTTP/1.1\r\n\r\n", "400"), ("hello\n\n", "400"),
    ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405"), ("OPTIONS * HTTP/1.1\r\n\r\n", "405"),
  ])
  func requestsHaveTheFormsOfHTTP(request: String, status: String) throws {
    let server = try server()
    defer { server.stop() }
    let answer = try ask(request)
    #expect(answer.status == status, "\(request)")
    if status == "405" { #expect(answer.fields["allow"] == "GET, HEAD") }
  }

  /// A head of many cookies is refused in words, also when the client sends on and only then reads.
  @Test func longHeadsAreRefused() throws {
    let server = try server()
    defer { server.stop() }
    for count in [9000, 60_000] {
      let answer = try ask("GET /metrics HTTP/1.1\r\nCookie: \(String(repeating: "x", count: count))\r\n\r\n")
      #expect(answer.status == "431", "\(count)")
    }
    let fits = try ask("GET /metrics HTTP/1.1\r\nCookie: \(String(repeating: "x", count: 8000))\r\n\r\n")
    #expect(fits.status == "200")
  }

  /// A head that comes byte by byte costs no more for each than the one before, and is answered at its end.
  @Test func headMayComeInPieces() throws {
    let server = try server()
    defer { server.stop() }
    let socket = try UnixSocket.connect(path)
    defer { close(socket) }
    for byte in "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".utf8 {
      var byte = byte
      #expect(send(socket, &byte, 1, Int32(MSG_NOSIGNAL)) == 1)
    }
    var buffer = [UInt8](repeating: 0, count: 4096)
    let count = recv(socket, &buffer, buffer.count, 0)
    #expect(String(decoding: buffer[..<max(count, 0)], as: UTF8.self).hasPrefix("HTTP/1.0 200"))
  }
}
