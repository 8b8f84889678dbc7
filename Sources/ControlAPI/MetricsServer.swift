import CLinux
package import EventLoop
import Glibc

/// Answers HTTP GET /metrics with a text: on a Unix socket and, where wanted, on a TCP port of the loopback. One request a connection
/// (RFC 9110's least: HTTP/1.0 with Connection: close, which scrapers and curl take).
package final class MetricsServer: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but the immutable parts is touched on the server's thread only.

  private static let requestLimit = 8192
  private static let clientLimit = 64
  /// A client that has not sent its request, or taken its answer, by then is dropped.
  private static let patience: UInt64 = 10_000

  private final class Client {
    let descriptor: OwnedDescriptor
    var token: EventLoop.Token?
    var timer: UInt64 = 0
    var request: [UInt8] = []
    var answer: [UInt8] = []
    var sent = 0

    init(_ raw: Int32) { descriptor = OwnedDescriptor(adopting: raw) }
  }

  private let thread: LoopThread
  private let text: @Sendable () -> String
  private let contentType: String
  private let listeners: [Int32]
  private let path: String?
  private var clients: [Int32: Client] = [:]

  /// - Parameters:
  ///   - path: of the Unix socket.
  ///   - port: of 127.0.0.1; nil for none.
  ///   - text: makes the answer, on the server's thread.
  /// - Throws: EADDRINUSE when somebody else listens there.
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
      for listener in all {
        _ = try? thread.loop.onReadable(listener) { [unowned self] in accept(listener) }
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

  private func accept(_ listener: Int32) {
    while true {
      let raw = clinux_accept(listener)
      guard raw >= 0 else { return }
      guard clients.count < Self.clientLimit else {
        close(raw)
        continue
      }
      let client = Client(raw)
      client.token = try? thread.loop.add(
        raw, events: EPOLLIN.rawValue, source: ActionSource { [unowned self] _ in serve(raw) })
      guard client.token != nil else { continue }
      client.timer = thread.loop.schedule(afterMilliseconds: Self.patience) { [weak self] in
        if let client = self?.clients[raw] { self?.end(client) }
      }
      clients[raw] = client
    }
  }

  private func end(_ client: Client) {
    if let token = client.token { thread.loop.remove(token) }
    thread.loop.cancel(timer: client.timer)
    clients[client.descriptor.raw] = nil
  }

  private func serve(_ raw: Int32) {
    guard let client = clients[raw] else { return }
    if client.answer.isEmpty {
      var buffer = [UInt8](repeating: 0, count: 4096)
      let count = read(raw, &buffer, buffer.count)
      if count < 0 && (errno == EAGAIN || errno == EINTR) { return }
      guard count > 0 else { return end(client) }
      client.request += buffer[..<count]
      guard let end = Self.endOfHead(client.request) else {
        if client.request.count > Self.requestLimit { self.end(client) }
        return
      }
      client.answer = answer(String(decoding: client.request[..<end], as: UTF8.self))
      if let token = client.token { try? thread.loop.modify(token, events: EPOLLOUT.rawValue) }
    }
    while client.sent < client.answer.count {
      let count = client.answer.withUnsafeBytes {
        send(raw, $0.baseAddress.map { $0 + client.sent }, client.answer.count - client.sent, Int32(MSG_NOSIGNAL))
      }
      if count < 0 && errno == EINTR { continue }
      if count < 0 && errno == EAGAIN { return }
      guard count > 0 else { break }
      client.sent += count
    }
    end(client)
  }

  private static func endOfHead(_ bytes: [UInt8]) -> Int? {
    guard bytes.count >= 4 else { return nil }
    return (0...(bytes.count - 4)).first { Array(bytes[$0..<($0 + 4)]) == [13, 10, 13, 10] }
  }

  private func answer(_ head: String) -> [UInt8] {
    let words = head.prefix { $0 != "\r\n" && $0 != "\r" }.split(separator: " ")
    func response(_ status: String, _ type: String, _ body: String) -> [UInt8] {
      Array(
        "HTTP/1.0 \(status)\r\nContent-Type: \(type)\r\nContent-Length: \(body.utf8.count)\r\nConnection: close\r\n\r\n\(body)"
          .utf8)
    }
    guard words.count == 3, words[2].hasPrefix("HTTP/1.") else {
      return response("400 Bad Request", "text/plain", "not an HTTP request\n")
    }
    guard words[0] == "GET" else {
      return response("405 Method Not Allowed", "text/plain", "method not allowed; use GET\n")
    }
    guard words[1] == "/metrics" || words[1].hasPrefix("/metrics?") else {
      return response("404 Not Found", "text/plain", "not found; try /metrics\n")
    }
    return response("200 OK", contentType, text())
  }

  /// Ends the server; the socket's file is removed.
  package func stop() {
    thread.stopAndJoin()
    clients = [:]
    for listener in listeners { close(listener) }
    if let path { unlink(path) }
  }
}
