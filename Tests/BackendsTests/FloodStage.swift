import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import SimulatedXen
import Synchronization
import TestSupport
import Transport
import Virtqueue

/// What a driver floods its device with: each queue of each type that a driver can keep filled.
enum FloodKind: CaseIterable, Sendable {
  case diskDirect, diskBuffered, diskPacked, diskFlushes, diskNonsense
  case packetsSent, packetsRefused, packetsReceived, networkCommands
  case consoleOutput, consoleMessages, entropy

  var isNetwork: Bool { [.packetsSent, .packetsRefused, .packetsReceived, .networkCommands].contains(self) }
  var isDisk: Bool { [.diskDirect, .diskBuffered, .diskPacked, .diskFlushes, .diskNonsense].contains(self) }
  /// Answers that show that it is a flood: commands of a network device have a rate of their own.
  var enough: Int { self == .networkCommands ? 20 : 1000 }
}

/// A device of any type under a driver that never lets one of its queues run dry.
final class FloodStage: CustomReflectable {
  static let queueSize: UInt16 = 64
  /// Chains that a device may answer before what is asked of its thread is done: the run under way, one more of those that come with
  /// jobs, and what the driver's thread has not seen yet.
  static let patience = RunBudget.chains + 4 * RunBudget.chainsBesideJobs + 4 * Int(queueSize)

  let kind: FloodKind
  let fixture: DeviceFixture
  let flood: Flood
  private let queue: Int
  private let wire: Wire
  private let folder = TemporaryFolder()

  /// The host's end of a tap, which sends without end where it is to.
  final class Wire: Sendable {
    let near: Int32
    private let far: Int32
    private let isSending = Atomic<Bool>(false)
    private let hasStopped = Latch()

    init() {
      var pair: [Int32] = [-1, -1]
      guard
        socketpair(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_NONBLOCK.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0
      else { fatalError("no socket pair: \(Errno.last)") }
      (near, far) = (pair[0], pair[1])
    }

    deinit {
      close(near)
      close(far)
    }

    func send(_ packet: [UInt8]) { _ = write(far, packet, packet.count) }

    func receive() -> [UInt8]? {
      var wait = pollfd(fd: far, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, 30_000) == 1 else { return nil }
      var bytes = [UInt8](repeating: 0, count: 70_000)
      let count = read(far, &bytes, bytes.count)
      return count > 0 ? Array(bytes[..<count]) : nil
    }

    func start(_ packet: [UInt8]) {
      isSending.store(true, ordering: .releasing)
      let far = far
      var thread = pthread_t()
      let context = Unmanaged.passRetained(Sender(wire: self, far: far, packet: packet))
      let result = pthread_create(
        &thread, nil,
        { context in
          guard let context else { return nil }
          Unmanaged<Sender>.fromOpaque(context).takeRetainedValue().run()
          return nil
        }, context.toOpaque())
      precondition(result == 0)
      pthread_detach(thread)
    }

    func stop() {
      guard isSending.exchange(false, ordering: .acquiringAndReleasing) else { return }
      hasStopped.wait()
    }

    private final class Sender: Sendable {
      let wire: Wire
      let far: Int32
      let packet: [UInt8]

      init(wire: Wire, far: Int32, packet: [UInt8]) { (self.wire, self.far, self.packet) = (wire, far, packet) }

      func run() {
        while wire.isSending.load(ordering: .acquiring) {
          if write(far, packet, packet.count) != packet.count { yieldThread() }
        }
        wire.hasStopped.open()
      }
    }
  }

  init(_ kind: FloodKind) throws {
    self.kind = kind
    let wire = Wire()
    self.wire = wire
    let place: (queue: Int, chain: [SimulatedDriver.Buffer])
    switch kind {
    case .diskDirect, .diskBuffered, .diskPacked, .diskFlushes, .diskNonsense:
      fixture = try Self.disk(kind, folder.file("disk.img", bytes: 1 << 20))
      place = Self.diskChain(kind, fixture)
    case .packetsSent, .packetsRefused, .packetsReceived, .networkCommands:
      fixture = try Self.network(wire)
      place = Self.networkChain(kind, fixture)
      if kind == .packetsReceived { wire.start(Self.frame(from: [2, 0, 0, 0, 0, 9])) }
    case .consoleOutput, .consoleMessages:
      fixture = try Self.console(folder.path, hasControl: kind == .consoleMessages)
      // PORT_READY without end, which asks for answers.
      fixture.put([0, 0, 0, 0, 3, 0, 1, 0] + [UInt8](repeating: 65, count: 56), at: fixture.buffers)
      let isOutput = kind == .consoleOutput
      place = (isOutput ? 1 : 3, [.init(fixture.buffers, isOutput ? 64 : 8, writable: false)])
    case .entropy:
      fixture = try DeviceFixture(deviceID: 4, queueSize: Self.queueSize, queueCount: 1) { context, completion in
        EntropyBackend.start(EntropySettings(), context) { completion($0.map { $0 }) }
      }
      place = (0, [.init(fixture.buffers, 64, writable: true)])
    }
    queue = place.queue
    let (registers, queue) = (fixture.transport, place.queue)
    // As the guest's other vCPU: a notification is a call of the backend that is there, by way of the guest's thread.
    let bell = Bell(registers, queue)
    self.bell = bell
    flood = Flood(fixture.driver.rings[queue], place.chain) { bell.ring() }
    fixture.driver.notify(queue: queue)
  }

  private let bell: Bell

  /// Notifications of the flood. The transport belongs to one thread at a time, which a lock sees to here.
  private final class Bell: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: the transport is used under the lock.
    private let transport: MMIOTransport
    private let queue: Int
    private let lock = Mutex<Bool>(false)

    init(_ transport: MMIOTransport, _ queue: Int) {
      self.transport = transport
      self.queue = queue
    }

    func ring() {
      lock.withLock { isMuted in if !isMuted { transport.write(offset: 0x050, width: 4, value: UInt64(queue)) } }
    }

    func perform<Result>(_ body: () throws -> Result) rethrows -> Result { try lock.withLock { _ in try body() } }
  }

  /// For the message of a failed expectation, see `DeviceFixture`.
  var customMirror: Mirror { Mirror(self, children: []) }

  /// Runs what the guest's thread does: no notification meanwhile.
  func onTheGuestsThread<Result>(_ body: () throws -> Result) rethrows -> Result { try bell.perform(body) }

  /// Whether so many more chains are answered.
  func goesOn() -> Bool {
    let before = flood.answered
    return eventually { flood.answered >= before + kind.enough }
  }

  /// Chains that are answered while something is done.
  func chains(during body: () throws -> Void) rethrows -> Int {
    let before = flood.answered
    try body()
    return flood.answered - before
  }

  /// No more packets come from the host.
  func quietenHost() { wire.stop() }

  /// The flood ends; its device is left as it is.
  func stopFlood() {
    wire.stop()
    flood.stop()
  }

  /// The queue's rings as they are in the guest's memory.
  var rings: [UInt8] {
    let ring = fixture.driver.rings[queue]
    return fixture.bytes(at: ring.descriptorArea, count: Int(ring.end - ring.descriptorArea))
  }

  // MARK: Devices

  private static let mac = MACAddress(value: 0x0016_3e00_0001)

  private static func frame(from source: [UInt8]) -> [UInt8] {
    [UInt8](repeating: 0, count: 12) + [UInt8](repeating: 0xff, count: 6) + source + [8, 0, 1, 2, 3, 4]
  }

  private static func disk(_ kind: FloodKind, _ path: String) throws -> DeviceFixture {
    var settings = BlockSettings(path: path, readOnly: false, discard: false, serial: "flood")
    settings.direct = kind == .diskDirect
    settings.packed = kind == .diskPacked
    let final = settings
    return try DeviceFixture(deviceID: 2, queueSize: queueSize, queueCount: 1) { context, completion in
      BlockBackend.start(final, context) { completion($0.map { $0 }) }
    }
  }

  private static func diskChain(_ kind: FloodKind, _ fixture: DeviceFixture) -> (Int, [SimulatedDriver.Buffer]) {
    // A read, a flush, or what no device knows.
    let type: UInt8 = kind == .diskFlushes ? 4 : kind == .diskNonsense ? 99 : 0
    fixture.put([type] + [UInt8](repeating: 0, count: 15), at: fixture.buffers)
    let data: [SimulatedDriver.Buffer] = type == 0 ? [.init(fixture.buffers + 4096, 512, writable: true)] : []
    return (
      0, [.init(fixture.buffers, 16, writable: false)] + data + [.init(fixture.buffers + 8192, 1, writable: true)]
    )
  }

  private static func network(_ wire: Wire) throws -> DeviceFixture {
    let settings = NetSettings(attachment: .created(bridge: nil), tapName: "none", mac: mac)
    return try DeviceFixture(deviceID: 1, queueSize: queueSize, queueCount: 3) { context, completion in
      // Each backend has a descriptor of its own, as each opens the tap anew.
      NetBackend.start(
        settings, context,
        openTap: { _ throws(TapFault) in TapDevice(name: "none", queues: [fcntl(wire.near, F_DUPFD_CLOEXEC, 0)]) }
      ) { completion($0.map { $0 }) }
    }
  }

  private static func networkChain(_ kind: FloodKind, _ fixture: DeviceFixture) -> (Int, [SimulatedDriver.Buffer]) {
    switch kind {
    case .packetsSent, .packetsRefused:
      let frame = frame(from: kind == .packetsSent ? mac.bytes : [2, 0, 0, 0, 0, 9])
      fixture.put(frame, at: fixture.buffers)
      return (1, [.init(fixture.buffers, UInt32(frame.count), writable: false)])
    case .packetsReceived: return (0, [.init(fixture.buffers, 2048, writable: true)])
    default:
      // VLAN 7 is added, over and over.
      fixture.put([2, 0, 7, 0], at: fixture.buffers)
      return (2, [.init(fixture.buffers, 4, writable: false), .init(fixture.buffers + 64, 1, writable: true)])
    }
  }

  private static func console(_ folder: String, hasControl: Bool) throws -> DeviceFixture {
    let settings = ConsoleSettings(ports: [ConsolePortSettings(name: "", isConsole: true)])
    return try DeviceFixture(
      deviceID: 3, wanted: hasControl ? nil : [], queueSize: queueSize, queueCount: hasControl ? 4 : 2,
      consoleFolder: folder
    ) { context, completion in
      ConsoleBackend.start(settings, context) { completion($0.map { $0 }) }
    }
  }
}
