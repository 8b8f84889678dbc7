import EventLoop
import Glibc

/// What a vxd and a simulated Xen in another process say to each other, for tests that kill the one and keep the other: packets of a
/// Unix socket, one connection for each guest.
enum RemoteOperation: UInt32 {
  // Calls, each with a reply.
  case open, create, destroy, enable, claimMemory, releaseMemory, claimPorts, releasePorts, claimFunction,
    releaseFunction, mapPage, bind,
    errors
  // Without one.
  case unmapPage, unbind, notify, unmask, interrupt, message, mapped, unmapped
  // From the simulator.
  case reply, event
}

/// A packet of fixed size; `errors` has a reply of as many bytes as pages.
struct RemotePacket {
  var operation: UInt32
  var server: UInt32 = 0
  var first: UInt64 = 0
  var second: UInt64 = 0
  /// Of a reply: 0 or an errno.
  var errno: Int64 = 0

  init(_ operation: RemoteOperation, server: UInt16 = 0, first: UInt64 = 0, second: UInt64 = 0) {
    self.operation = operation.rawValue
    self.server = UInt32(server)
    self.first = first
    self.second = second
  }

  var kind: RemoteOperation? { RemoteOperation(rawValue: operation) }

  /// Sends a packet and what goes with it; false when the other side is gone.
  func send(_ descriptor: Int32, _ payload: [UInt8] = []) -> Bool {
    var bytes = withUnsafeBytes(of: self) { Array($0) }
    bytes += payload
    while true {
      let count = Glibc.send(descriptor, bytes, bytes.count, Int32(MSG_NOSIGNAL))
      if count >= 0 { return true }
      if Glibc.errno == EAGAIN {
        var poller = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
        _ = poll(&poller, 1, 1000)
      } else if Glibc.errno != EINTR {
        return false
      }
    }
  }

  /// Takes a packet.
  ///
  /// - Returns: nil when there is none (`isOver` tells whether the other side is gone).
  static func receive(_ descriptor: Int32, wait: Bool, isOver: inout Bool) -> (RemotePacket, [UInt8])? {
    var bytes = [UInt8](repeating: 0, count: 65536)
    while true {
      let count = recv(descriptor, &bytes, bytes.count, wait ? 0 : Int32(MSG_DONTWAIT))
      if count < 0 && Glibc.errno == EINTR { continue }
      if count < 0 && Glibc.errno == EAGAIN { return nil }
      let size = MemoryLayout<RemotePacket>.size
      guard count >= size else {
        isOver = true
        return nil
      }
      return bytes.withUnsafeBytes { ($0.loadUnaligned(as: RemotePacket.self), Array($0[size..<count])) }
    }
  }

  static func makeSocket() -> Int32 {
    socket(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue | SOCK_CLOEXEC.rawValue), 0)
  }
}
