import CLinux
package import EventLoop
import Glibc

/// Answers HTTP GET and HEAD of /metrics with a text: on a Unix socket and, where wanted, on a TCP port of the loopback. One request a
/// connection (HTTP/1.0 with Connection: close, which scrapers and curl take). Clients that ask for OpenMetrics get it, others Prometheus' text
/// format.
package final class MetricsServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but the immutable parts is touched on the server's thread only.

  /// Read and dropped after the answer, so that a client which still sends reads the answer before the connection is reset.
  private static let lingerLimit = 1 << 16
  private static let clientLimit = 64
  /// A client that has not sent its request, or taken its answer, by then is dropped.
  private static let patience: UInt64 = 10_000

  private final class Client {
    let descriptor: OwnedDescriptor
    var token: EventLoop.Token?
    var timer: UInt64 = 0
    var head: [UInt8] = []
    var boundary = MetricsRequest.Boundary()
    var answer: [UInt8] = []
    var sent = 0
    /// Bytes dropped after the answer; nil before its end.
    var lingered: Int?

    init(_ raw: Int32) { descriptor = OwnedDescriptor(adopting: raw) }
  }

  private let thread: LoopThread
  private let text: @Sendable () -> String
  private let contentType: String
  private let listeners: [Int32]
  private let path: String?
  private var accepting: [AcceptLoop] = []
  private var clients: [Int32: Client] = [:]

  /// - Parameters:
  ///   - path: of the Unix socket.
  ///   - port: of 127.0.0.1; nil for none.
  ///   - contentType: of OpenMetrics.
  ///   - text: makes the answer as OpenMetrics text, on the server's thread.
  /// - Throws: EADDRINUSE if another process listens there.
  package init(path: String, port: UInt16?, contentType: String, text: @escaping @Sendable () -> String) throws(Errno) {
    self.text = text
    self.contentType = contentType
    self.path = path
    var listeners = [try UnixSocket.listen(path, mode: 0o660)]
    do throws(Errno) {
      if let port { listeners.append(try Self.listen(port: port)) }
      self.listeners = listeners
      thread = try LoopThread(name: "vxd-metrics")
    } catch {
      for listener in listeners { close(listener) }
      throw error
    }
    let all = listeners
    thread.loop.enqueue { [self] in
      accepting = all.compactMap { listener in
        try? AcceptLoop(listener, on: thread.loop) { [unowned self] in accept($0) }
      }
    }
  }

  private static func listen(port: UInt16) throws(Errno) -> Int32 {
    let raw = socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
    guard raw >= 0 else { throw Errno.last }
    var one: Int32 = 1
    setsockopt(raw, SOL_SOCKET, SO_REUSEADDR, &one, socklen_t(MemoryLayout<Int32>.size))
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
    let bound = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(raw, $0, socklen_t(MemoryLayout<sockaddr_in>.size)) }
    }
    guard bound == 0, Glibc.listen(raw, 16) == 0 else {
      let failure = Errno.last
      close(raw)
      throw failure
    }
    return raw
  }

  private func accept(_ raw: Int32) {
    guard clients.count < Self.clientLimit else {
      close(raw)
      return
    }
    let client = Client(raw)
    client.token = try? thread.loop.add(
      raw, events: EPOLLIN.rawValue, source: ActionSource { [unowned self] _ in serve(raw) })
    guard client.token != nil else { return }
    client.timer = thread.loop.schedule(afterMilliseconds: Self.patience) { [weak self] in
      if let client = self?.clients[raw] { self?.end(client) }
    }
    clients[raw] = client
  }

  private func end(_ client: Client) {
    if let token = client.token { thread.loop.remove(token) }
    thread.loop.cancel(timer: client.timer)
    clients[client.descriptor.raw] = nil
  }

  private func serve(_ raw: Int32) {
    guard let client = clients[raw] else { return }
    if client.lingered != nil { return linger(client) }
    if client.answer.isEmpty { receive(client) }
    guard !client.answer.isEmpty else { return }
    while client.sent < client.answer.count {
      let count = client.answer.withUnsafeBytes {
        send(raw, $0.baseAddress.map { $0 + client.sent }, client.answer.count - client.sent, Int32(MSG_NOSIGNAL))
      }
      if count < 0 && errno == EINTR { continue }
      if count < 0 && errno == EAGAIN { return }
      guard count > 0 else { return end(client) }
      client.sent += count
    }
    shutdown(raw, Int32(SHUT_WR))
    client.lingered = 0
    if let token = client.token { try? thread.loop.modify(token, events: EPOLLIN.rawValue) }
    linger(client)
  }

  private func receive(_ client: Client) {
    var buffer = [UInt8](repeating: 0, count: 4096)
    let count = read(client.descriptor.raw, &buffer, buffer.count)
    if count < 0 && (errno == EAGAIN || errno == EINTR) { return }
    guard count > 0 else { return end(client) }
    for byte in buffer[..<count] {
      client.head.append(byte)
      if client.boundary.ends(with: byte) {
        client.answer = answer(client.head)
        break
      }
      guard client.head.count < MetricsRequest.limit else {
        client.answer = Self.response(
          "431 Request Header Fields Too Large", "text/plain",
          "expected a request of at most \(MetricsRequest.limit) bytes\n")
        break
      }
    }
    if !client.answer.isEmpty, let token = client.token { try? thread.loop.modify(token, events: EPOLLOUT.rawValue) }
  }

  /// Until the client has closed its side.
  private func linger(_ client: Client) {
    var buffer = [UInt8](repeating: 0, count: 4096)
    while true {
      let count = read(client.descriptor.raw, &buffer, buffer.count)
      if count < 0 && errno == EINTR { continue }
      if count < 0 && errno == EAGAIN { return }
      let total = (client.lingered ?? 0) + max(count, 0)
      client.lingered = total
      guard count > 0, total <= Self.lingerLimit else { return end(client) }
    }
  }

  private static func response(
    _ status: String, _ type: String, _ body: String, _ more: String = "", isHead: Bool = false
  ) -> [UInt8] {
    Array(
      ("HTTP/1.0 \(status)\r\nContent-Type: \(type)\r\nContent-Length: \(body.utf8.count)\r\n\(more)Connection: close\r\n\r\n"
        + (isHead ? "" : body)).utf8)
  }

  private func answer(_ head: [UInt8]) -> [UInt8] {
    guard let request = MetricsRequest(head) else {
      return Self.response("400 Bad Request", "text/plain", "not an HTTP/1 request\n")
    }
    let isHead = request.method == "HEAD"
    guard isHead || request.method == "GET" else {
      return Self.response(
        "405 Method Not Allowed", "text/plain", "method not allowed; use GET or HEAD\n", "Allow: GET, HEAD\r\n")
    }
    guard request.path == "/metrics" else {
      return Self.response("404 Not Found", "text/plain", "not found; try /metrics\n", isHead: isHead)
    }
    let openMetrics = AcceptHeader.prefersOpenMetrics(request.values("accept"))
    return Self.response(
      "200 OK", openMetrics ? contentType : PrometheusText.contentType,
      openMetrics ? text() : PrometheusText.from(openMetrics: text()), "Vary: Accept\r\n", isHead: isHead)
  }

  /// Ends the server; the socket's file is removed.
  package func stop() {
    thread.stopAndJoin()
    clients = [:]
    for listener in listeners { close(listener) }
    if let path { unlink(path) }
  }
}
