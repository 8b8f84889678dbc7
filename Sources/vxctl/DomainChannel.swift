import ControlAPI
import EventLoop
import Glibc
import Xen

/// A connection from dom0 to the vxd of a driver domain, through Xenstore: a stream of its own (`StoreStream`; `ToolstackRelay` is the other side),
/// joined to a socket that `ControlClient` speaks on. Neither a network nor anything else of the domain is needed.
final class DomainChannel: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: what is not constant is touched on the thread only, until it is joined.

  /// The socket to speak on. Whoever takes it closes it.
  let socket: Int32
  private let thread: LoopThread
  private let xenstore: XenStore
  private let requests: String
  private let answers: String
  private var stream: StoreStream?
  private var beats = 0
  /// Why the stream is over, as the other side said; nil while it is not.
  private var reason: String?

  /// Milliseconds between the signs of life that the relay wants.
  private static let beat: UInt64 = 20_000

  /// - Parameters:
  ///   - domain: another one.
  ///   - xenstore: a connection for this channel alone.
  init(_ domain: DomainID, _ xenstore: XenStore) throws(XenError) {
    let home = "/local/domain/\(domain)"
    // Of 64 bits, so that no two clients have the same.
    let identifier = String(UInt64.random(in: 1 ... .max), radix: 16)
    self.xenstore = xenstore
    (requests, answers) = ("\(home)/vxd/control/\(identifier)", "\(home)/data/vxd-control/\(identifier)")
    Self.removeEnded(home, xenstore)
    // Below vxd dom0 alone may write, and the domain reads.
    for path in ["\(home)/vxd", "\(home)/vxd/control"] where xenstore.read(path) == nil {
      try xenstore.makeDirectory(path, owner: 0, reader: domain, in: 0)
    }
    try xenstore.watch(answers, token: "answers")
    var pair: [Int32] = [-1, -1]
    guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0 else {
      throw XenError("socketpair", Errno.last)
    }
    socket = pair[0]
    let other = pair[1]
    do throws(Errno) { thread = try LoopThread(name: "vxctl-channel") } catch {
      Glibc.close(pair[0])
      Glibc.close(other)
      throw XenError("a thread", error)
    }
    thread.loop.enqueue { [self] in start(OwnedDescriptor(adopting: other)) }
  }

  private func start(_ socket: consuming OwnedDescriptor) {
    let stream = StoreStream(
      xenstore, own: requests, other: answers, socket: socket, loop: thread.loop,
      // Not from within the stream's own step.
      onEnd: { [unowned self] in thread.loop.enqueue { [self] in end() } })
    self.stream = stream
    _ = try? thread.loop.onReadable(xenstore.eventDescriptor) { [unowned self] in
      while xenstore.nextEvent() != nil {}
      self.stream?.step()
    }
    stream.step()
    liveOn()
  }

  /// Says that the client is there. A domain that is gone takes all of it along, which no watch is certain to tell.
  private func liveOn() {
    thread.loop.schedule(afterMilliseconds: Self.beat / 10) { [weak self] in
      guard let self, stream != nil else { return }
      beats += 1
      guard xenstore.read(requests + "/out") != nil || beats == 1 else {
        reason = "the domain is gone"
        return end()
      }
      if beats % 10 == 0 { try? xenstore.write("\(requests)/beat", "\(beats)") }
      stream?.step()
      liveOn()
    }
  }

  /// Closes this side of the socket, by which the client learns of it.
  private func end() {
    reason = reason ?? stream?.end
    stream = nil
  }

  /// Ends the channel.
  ///
  /// - Returns: why the other side had ended it before; nil if it had not.
  func close() -> String? {
    thread.perform { [self] in
      end()
      try? xenstore.remove(requests)
    }
    thread.stopAndJoin()
    return reason
  }

  /// What clients that were killed have left, once the domain has given them up.
  private static func removeEnded(_ home: String, _ xenstore: XenStore) {
    for identifier in xenstore.list("\(home)/vxd/control") ?? []
    where xenstore.read("\(home)/data/vxd-control/\(identifier)/end") != nil {
      try? xenstore.remove("\(home)/vxd/control/\(identifier)")
    }
  }
}

extension ConnectionOptions {
  /// Connects to the vxd that the options name.
  func connect() throws(ControlClient.Failure) -> (ControlClient, DomainChannel?) {
    guard let domain else { return (try ControlClient(path: socket), nil) }
    func fault(_ reason: String) -> ControlClient.Failure { .domainUnreachable(domain: domain.plain, reason: reason) }
    let channel: DomainChannel
    do {
      let xenstore = try XenStore(socketPath: getenv("XENSTORED_PATH").map { String(cString: $0) })
      let number = try domain.domain(in: xenstore)
      guard "\(number)" != xenstore.read("domid") else { throw fault("this is the domain itself") }
      channel = try DomainChannel(number, xenstore)
    } catch let error as ToolstackDevice.Fault {
      throw fault(error.message)
    } catch let error as XenError {
      throw fault("\(error); run this in dom0, as root")
    } catch {
      throw error as? ControlClient.Failure ?? fault("\(error)")
    }
    return (ControlClient(adopting: channel.socket), channel)
  }
}
