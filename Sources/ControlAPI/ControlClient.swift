import EventLoop
import Glibc

/// A client of the control socket: one call at a time, each with a deadline.
package final class ControlClient {
  /// Why a call has no result.
  package enum Failure: Error {
    /// The socket has no listener.
    case unreachable(path: String, reason: String)
    /// The vxd of a driver domain cannot be reached from here.
    case domainUnreachable(domain: String, reason: String)
    /// No answer in time, or an answer that is not JSON-RPC.
    case protocolBroken(String)
    /// The daemon refused.
    case refused(ControlFault)

    package var message: String {
      switch self {
      case .unreachable(let path, let reason):
        "cannot connect to vxd on \(path): \(reason). Is it running (systemctl status vxd)? Is --socket right?"
      case .domainUnreachable(let domain, let reason): "cannot reach vxd in domain '\(domain)': \(reason)"
      case .protocolBroken(let what): "no usable answer from vxd: \(what)"
      case .refused(let fault): fault.message
      }
    }
  }

  private let descriptor: OwnedDescriptor
  private var reader = FrameReader()
  private var items: [FrameReader.Item] = []
  private var nextID: Int64 = 1
  private let timeoutMilliseconds: Int32

  /// - Parameter timeoutMilliseconds: for the connection, for each piece of a request that is sent, and for each answer of `call`.
  package init(path: String, timeoutMilliseconds: Int32 = 10_000) throws(Failure) {
    self.timeoutMilliseconds = timeoutMilliseconds
    do throws(Errno) {
      descriptor = OwnedDescriptor(
        adopting: try UnixSocket.connect(path, timeoutMilliseconds: timeoutMilliseconds))
    } catch {
      throw .unreachable(path: path, reason: "\(error)")
    }
  }

  /// Takes over a connected socket.
  package init(adopting raw: Int32, timeoutMilliseconds: Int32 = 10_000) {
    self.timeoutMilliseconds = timeoutMilliseconds
    descriptor = OwnedDescriptor(adopting: raw)
  }

  /// Calls a method.
  package func call(_ method: String, _ parameters: JSONValue = .object([])) throws(Failure) -> JSONValue {
    let id = nextID
    nextID += 1
    let request: JSONValue = [
      "jsonrpc": "2.0", "id": .integer(id), "method": .string(method), "params": parameters,
    ]
    try send(Array(JSONText.text(request).utf8))
    // One limit for all that comes meanwhile: a peer that is not trusted must not be able to keep a caller.
    let end = EventLoop.now() + UInt64(max(0, timeoutMilliseconds)) * 1_000_000
    while true {
      let now = EventLoop.now()
      guard now < end else { throw .protocolBroken("no answer within \(timeoutMilliseconds / 1000) s") }
      let reply = try receive(Int32(clamping: (end - now + 999_999) / 1_000_000))
      guard reply["id"]?.integerValue == id || reply["id"] == .null else { continue }
      if let error = reply["error"] {
        throw .refused(
          ControlFault(
            code: error["code"]?.integerValue ?? 0,
            message: error["message"]?.stringValue ?? "an error without a message",
            data: error["data"] ?? .null))
      }
      guard let result = reply["result"] else { throw .protocolBroken("neither result nor error") }
      return result
    }
  }

  /// Sends a line as it is.
  package func send(_ line: [UInt8]) throws(Failure) {
    let bytes = line + [0x0a]
    var sent = 0
    while sent < bytes.count {
      let count = bytes.withUnsafeBytes {
        Glibc.send(descriptor.raw, $0.baseAddress.map { $0 + sent }, bytes.count - sent, Int32(MSG_NOSIGNAL))
      }
      if count < 0 && errno == EINTR { continue }
      guard count > 0 else { throw .protocolBroken("the connection broke: \(Errno.last)") }
      sent += count
    }
  }

  /// The next message, also an event.
  ///
  /// - Parameter timeout: milliseconds until it is there as a whole, however it comes; negative waits for ever.
  package func receive(_ timeout: Int32) throws(Failure) -> JSONValue {
    let end = EventLoop.now() + UInt64(max(0, timeout)) * 1_000_000
    var left = timeout
    while items.isEmpty {
      var poller = pollfd(fd: descriptor.raw, events: Int16(POLLIN), revents: 0)
      let ready = left == 0 && timeout > 0 ? 0 : poll(&poller, 1, left)
      if timeout > 0 {
        let now = EventLoop.now()
        left = now < end ? Int32(clamping: (end - now + 999_999) / 1_000_000) : 0
      }
      if ready < 0 && errno == EINTR { continue }
      guard ready > 0 else { throw .protocolBroken("no answer within \(timeout / 1000) s") }
      var buffer = [UInt8](repeating: 0, count: 65536)
      let count = read(descriptor.raw, &buffer, buffer.count)
      if count < 0 && errno == EINTR { continue }
      guard count > 0 else { throw .protocolBroken("vxd closed the connection") }
      items = reader.append(buffer[..<count])
    }
    guard case .message(let message) = items.removeFirst() else { throw .protocolBroken("a message of over 1 MiB") }
    do throws(JSONText.Fault) {
      return try JSONText.parse(message)
    } catch {
      throw .protocolBroken("not JSON: \(error.message)")
    }
  }
}
