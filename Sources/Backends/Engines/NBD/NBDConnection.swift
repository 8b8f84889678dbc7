import CLinux
import Devices
import EventLoop
import Glibc

/// A connection to an NBD server, past its handshake: fixed newstyle, NBD_OPT_GO, simple replies.
///
/// Making one blocks, up to a deadline; it is not done on a thread that serves a live queue.
struct NBDConnection: ~Copyable, Sendable {
  let descriptor: OwnedDescriptor
  let capacity: UInt64
  let flags: UInt16
  let minimumBlock: UInt32
  let maximumBytes: UInt32

  /// Connects and agrees on the export; the descriptor is non-blocking.
  ///
  /// - Parameter patience: how long all of that may take. The resolution of a host's name has limits of its own.
  init(_ address: NBDAddress, _ patience: NBDPatience) throws(ImageFault) {
    let connected = OwnedDescriptor(adopting: try Self.connect(address, patience))
    var link = Handshake(socket: connected.raw, address: address, patience: patience)
    let export = try link.perform()
    descriptor = connected
    capacity = export.capacity
    flags = export.flags
    minimumBlock = export.minimumBlock
    maximumBytes = export.maximumBytes
  }

  /// The socket alone, for an engine that knows the export already.
  consuming func takeDescriptor() -> OwnedDescriptor { descriptor }

  private static func connect(_ address: NBDAddress, _ patience: NBDPatience) throws(ImageFault) -> Int32 {
    switch address.place {
    case .unix(let path):
      var target = sockaddr_un()
      target.sun_family = sa_family_t(AF_UNIX)
      withUnsafeMutableBytes(of: &target.sun_path) { room in
        for (index, byte) in path.utf8.enumerated() where index < room.count - 1 { room[index] = byte }
      }
      let result = withUnsafePointer(to: &target) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
          open(AF_UNIX, $0, socklen_t(MemoryLayout<sockaddr_un>.size), patience)
        }
      }
      return try unwrap(result, address)
    case .tcp(let host, let port):
      var hints = addrinfo()
      hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
      var list: UnsafeMutablePointer<addrinfo>?
      let failure = getaddrinfo(host, "\(port)", &hints, &list)
      guard failure == 0, let first = list else {
        throw .nbd(address.text, "the host's name cannot be resolved: \(String(cString: gai_strerror(failure)))")
      }
      defer { freeaddrinfo(first) }
      var result: Result<Int32, Errno> = .failure(Errno(EHOSTUNREACH))
      var entry: UnsafeMutablePointer<addrinfo>? = first
      while let candidate = entry {
        if let name = candidate.pointee.ai_addr {
          // One that does not answer leaves half of the time to those behind it.
          let share = candidate.pointee.ai_next == nil ? patience : patience.half
          result = open(candidate.pointee.ai_family, name, candidate.pointee.ai_addrlen, share)
          if case .success = result { break }
        }
        entry = candidate.pointee.ai_next
      }
      return try unwrap(result, address)
    }
  }

  private static func unwrap(_ result: Result<Int32, Errno>, _ address: NBDAddress) throws(ImageFault) -> Int32 {
    switch result {
    case .success(let descriptor): return descriptor
    case .failure(let errno): throw .nbd(address.text, "the server cannot be reached: \(errno)")
    }
  }

  /// A connected stream socket, non-blocking.
  private static func open(
    _ family: Int32, _ name: UnsafePointer<sockaddr>, _ length: socklen_t, _ patience: NBDPatience
  ) -> Result<Int32, Errno> {
    let raw = socket(family, Int32(SOCK_STREAM.rawValue | SOCK_NONBLOCK.rawValue) | clinux_socket_cloexec(), 0)
    guard raw >= 0 else { return .failure(Errno.last) }
    var one: Int32 = 1
    setsockopt(raw, SOL_SOCKET, SO_KEEPALIVE, &one, 4)
    if family != AF_UNIX { setsockopt(raw, Int32(IPPROTO_TCP), TCP_NODELAY, &one, 4) }
    var failure: Int32 = Glibc.connect(raw, name, length) == 0 ? 0 : errno
    if failure == EINPROGRESS || failure == EINTR {
      var size = socklen_t(MemoryLayout<Int32>.size)
      failure = ETIMEDOUT
      if patience.wait(for: raw, Int16(POLLOUT)) { getsockopt(raw, SOL_SOCKET, SO_ERROR, &failure, &size) }
    }
    guard failure == 0 else {
      close(raw)
      return .failure(Errno(failure))
    }
    return .success(raw)
  }
}

/// How long a server is waited for: until a moment, or until somebody calls it off.
struct NBDPatience: Sendable {
  /// Monotonic nanoseconds.
  private let end: UInt64
  /// Readable when the wait is called off; -1 for never. Its owner keeps it open meanwhile.
  private let callOff: Int32

  init(milliseconds: UInt64, callOff: Int32 = -1) {
    end = EventLoop.now() &+ milliseconds &* 1_000_000
    self.callOff = callOff
  }

  private init(end: UInt64, callOff: Int32) {
    self.end = end
    self.callOff = callOff
  }

  /// Half of what is left of it.
  var half: NBDPatience {
    let now = EventLoop.now()
    return NBDPatience(end: end > now ? now &+ (end &- now) / 2 : end, callOff: callOff)
  }

  /// Waits until a descriptor is ready; false when the time is over first, or the wait is called off.
  func wait(for descriptor: Int32, _ events: Int16) -> Bool {
    while true {
      let now = EventLoop.now()
      guard now < end else { return false }
      var descriptors = [
        pollfd(fd: descriptor, events: events, revents: 0), pollfd(fd: callOff, events: Int16(POLLIN), revents: 0),
      ]
      let count = poll(&descriptors, 2, Int32(clamping: (end &- now) / 1_000_000 &+ 1))
      if count < 0 && errno != EINTR { return false }
      if count > 0 { return descriptors[1].revents == 0 }
    }
  }
}

/// The conversation before the transmission phase.
private struct Handshake {
  struct Export {
    var capacity: UInt64 = 0
    var flags: UInt16 = 0
    var minimumBlock: UInt32 = 1
    var maximumBytes: UInt32 = 32 << 20
  }

  /// The longest reply to an option that is looked at.
  private static let replyLimit = 65536
  /// Of what a server says to people.
  private static let wordsLimit = 256

  let socket: Int32
  let address: NBDAddress
  let patience: NBDPatience

  init(socket: Int32, address: NBDAddress, patience: NBDPatience) {
    self.socket = socket
    self.address = address
    self.patience = patience
  }

  mutating func perform() throws(ImageFault) -> Export {
    let greeting = try receive(18)
    guard number(greeting, 0, 8) == NBDProtocol.initialMagic, number(greeting, 8, 8) == NBDProtocol.optionMagic else {
      throw fault("the server does not speak NBD, or only its old style")
    }
    let serverFlags = UInt16(truncatingIfNeeded: number(greeting, 16, 2))
    guard serverFlags & NBDProtocol.fixedNewstyle != 0 else { throw fault("the server is too old (no fixed newstyle)") }
    var message = bytes(UInt64(serverFlags & (NBDProtocol.fixedNewstyle | NBDProtocol.noZeroes)), 4)
    let name = Array(address.export.utf8)
    message += bytes(NBDProtocol.optionMagic, 8) + bytes(UInt64(NBDProtocol.optionGo), 4)
    message += bytes(UInt64(name.count + 8), 4) + bytes(UInt64(name.count), 4) + name
    message += bytes(1, 2) + bytes(UInt64(NBDProtocol.informationBlockSize), 2)
    try send(message)
    return try receiveExport()
  }

  private func receiveExport() throws(ImageFault) -> Export {
    var export: Export?
    // A server sends a handful of replies; one that never ends is none.
    for _ in 0..<64 {
      let head = try receive(20)
      guard number(head, 0, 8) == NBDProtocol.optionReplyMagic else { throw fault("the server's reply is malformed") }
      let type = UInt32(truncatingIfNeeded: number(head, 12, 4))
      let length = number(head, 16, 4)
      guard length <= Self.replyLimit else { throw fault("the server's reply is too long") }
      let data = try receive(Int(length))
      if type == NBDProtocol.replyAcknowledged {
        guard let export else { throw fault("the server does not tell the export's size") }
        return export
      }
      if type & NBDProtocol.replyIsError != 0 {
        let words = String(decoding: data.filter { $0 >= 32 && $0 < 127 }.prefix(Self.wordsLimit), as: UTF8.self)
        let reason =
          type & 0xffff == 6 ? "there is no export '\(address.export)'" : "the server refuses (\(type & 0xffff))"
        throw fault(words.isEmpty ? reason : "\(reason): \(words)")
      }
      guard type == NBDProtocol.replyInformation, data.count >= 2 else { continue }
      switch UInt16(truncatingIfNeeded: number(data, 0, 2)) {
      case NBDProtocol.informationExport where data.count >= 12:
        var known = export ?? Export()
        known.capacity = number(data, 2, 8)
        known.flags = UInt16(truncatingIfNeeded: number(data, 10, 2))
        export = known
      case NBDProtocol.informationBlockSize where data.count >= 14:
        var known = export ?? Export()
        known.minimumBlock = UInt32(truncatingIfNeeded: number(data, 2, 4))
        known.maximumBytes = UInt32(truncatingIfNeeded: number(data, 10, 4))
        export = known
      default: break
      }
    }
    throw fault("the server's handshake does not end")
  }

  private func fault(_ reason: String) -> ImageFault { .nbd(address.text, reason) }

  private func number(_ data: [UInt8], _ offset: Int, _ width: Int) -> UInt64 {
    data[offset..<offset + width].reduce(0) { $0 << 8 | UInt64($1) }
  }

  private func bytes(_ value: UInt64, _ width: Int) -> [UInt8] {
    (0..<width).reversed().map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) }
  }

  private var tooLate: ImageFault { fault("the server does not answer within the time for a handshake") }

  private func receive(_ count: Int) throws(ImageFault) -> [UInt8] {
    var data = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
      guard patience.wait(for: socket, Int16(POLLIN)) else { throw tooLate }
      let got = data.withUnsafeMutableBytes { recv(socket, $0.baseAddress.map { $0 + done }, count - done, 0) }
      if got < 0 && (errno == EINTR || errno == EAGAIN) { continue }
      guard got > 0 else { throw fault(got == 0 ? "the server hung up" : "the connection broke: \(Errno.last)") }
      done += got
    }
    return data
  }

  private func send(_ data: [UInt8]) throws(ImageFault) {
    var done = 0
    while done < data.count {
      guard patience.wait(for: socket, Int16(POLLOUT)) else { throw tooLate }
      let sent = data.withUnsafeBytes {
        Glibc.send(socket, $0.baseAddress.map { $0 + done }, data.count - done, Int32(MSG_NOSIGNAL))
      }
      if sent < 0 && (errno == EINTR || errno == EAGAIN) { continue }
      guard sent > 0 else { throw fault("the server does not listen: \(Errno.last)") }
      done += sent
    }
  }
}
