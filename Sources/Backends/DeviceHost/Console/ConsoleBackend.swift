package import Devices
import Engines
package import EventLoop
import Lifecycle
import Synchronization
import Transport
import Virtqueue

/// A running console device: all its ports on one thread.
package final class ConsoleBackend: DeviceBackend, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: immutable, or made for sharing; see the superclass.

  package let settings: ConsoleSettings
  /// The device in names of files.
  package let fileName: String
  package let board: ConsolePortBoard
  private let consoleFolder: String?
  private let worker: DeviceWorker<ConsolePump>
  /// Characters on their way to the data thread. A driver writes them one by one, and as fast as it likes.
  private let emergency = Mutex<[UInt8]>([])
  private static let emergencyLimit = 256
  private static let queueSize: UInt16 = 64

  /// Paths below `consoleFolder` where `vxctl console` finds the ports.
  package static func viewerPath(_ folder: String, _ device: String, port: Int) -> String {
    "\(folder)/\(device)-\(port).sock"
  }

  /// What a port remembers, in the same folder.
  package static func historyPath(_ folder: String, _ device: String, port: Int) -> String {
    "\(folder)/\(device)-\(port).history"
  }

  package static func start(
    _ settings: ConsoleSettings, _ context: Context,
    completion: @escaping @Sendable (Result<ConsoleBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    start(
      name: context.name, label: context.label, threads: 1,
      make: { threads throws(StartFault) in try ConsoleBackend(settings, context, threads[0]) },
      completion: completion)
  }

  private init(_ settings: ConsoleSettings, _ context: Context, _ thread: LoopThread) throws(StartFault) {
    let count = settings.ports.count
    let identity = DeviceIdentity(
      deviceID: ConsoleConfiguration.deviceID, offeredFeatures: settings.offered ?? ConsoleConfiguration.features,
      queueSizes: Array(repeating: Self.queueSize, count: 2 * count + 2))
    let state = try context.makeState?(DeviceState.Layout(unjournaled: identity))
    let counters = identity.queueSizes.indices.map { context.account.queue($0).counters }
    let configuration = ConfigurationSpace(ConsoleConfiguration.bytes(nil, ports: count))
    var channels: [ConsolePort] = []
    var parts: [ConsolePump.PortParts] = []
    for (index, port) in settings.ports.enumerated() {
      let first = index == 0 ? 0 : 2 * index + 2
      let logLine = context.logLine
      let place = ConsolePort.Place(
        loop: thread.loop, counters: counters[first + 1],
        viewerPath: context.consoleFolder.map { Self.viewerPath($0, context.fileName, port: index) },
        historyPath: context.consoleFolder.map { Self.historyPath($0, context.fileName, port: index) },
        mayAttach: context.mayAttach, logLine: { logLine("port \(index): \($0)") })
      do throws(ConsoleFault) {
        channels.append(try ConsolePort(port, place))
      } catch {
        for channel in channels { channel.close() }
        throw .resource("ports[\(index)].\(error.message)")
      }
      parts.append(
        ConsolePump.PortParts(
          channel: channels[index], name: port.name, isConsole: port.isConsole, inputCounters: counters[first],
          outputCounters: counters[first + 1]))
    }
    let speaker = Speaker()
    let made = parts
    let board = ConsolePortBoard()
    let report = context.report
    let worker = try Self.make { () throws in
      try DeviceWorker(
        ConsolePump(
          ports: made, controlCounters: (counters[2], counters[3]), source: context.source,
          rate: context.rate, notes: state?.notes, board: board,
          onSize: { size in
            configuration.update { ConsoleConfiguration.set(size, in: &$0) }
            speaker.backend?.announceConfiguration()
          },
          onOpen: { report(.portsOpen($0)) }),
        index: 0, queues: counters.map { .init(maximumSize: Self.queueSize, counters: $0) }, thread: thread,
        source: context.source, report: context.report)
    }
    for channel in channels { channel.onChange = { [weak worker] in worker?.refresh() } }
    self.settings = settings
    fileName = context.fileName
    consoleFolder = context.consoleFolder
    self.worker = worker
    self.board = board
    try super.init(
      Components(
        identity: identity, configuration: configuration, mode: "\(count) ports", threads: [thread], workers: [worker],
        routes: identity.queueSizes.indices.map { Route(worker: 0, queue: $0) }, rate: context.rate, state: state,
        counters: counters))
    speaker.backend = self
  }

  /// What the pump's closures reach the backend by, on the data thread; set there before the first of them is called.
  private final class Speaker: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: confined to the data thread.
    weak var backend: ConsoleBackend?
  }

  package override var ports: [BackendPort] {
    settings.ports.enumerated().map { index, port in
      BackendPort(name: port.name, viewerPath: consoleFolder.map { Self.viewerPath($0, fileName, port: index) })
    }
  }

  package override var facts: [Reading.Member] {
    let ports = settings.ports.enumerated().map { index, port -> [Reading.Member] in
      [
        .init("port", .value(.count(index))), .init("name", .string(port.name)),
        .init("console", .bool(port.isConsole)), .init("guestOpen", .flag(board.guest, bit: index)),
        .init("hostOpen", .flag(board.host, bit: index)), .init("overflow", .string(port.overflow.rawValue)),
        .init("pty", port.pty.map { .string($0) } ?? .null), .init("log", port.log.map { .string($0.path) } ?? .null),
      ]
    }
    return [.init("ports", .list(ports))]
  }

  package override func configurationWritten(offset: Int, bytes: [UInt8]) {
    // The first byte of the word is the character; nothing else in the space is the driver's to write.
    guard offeredFeatures.contains(.consoleEmergencyWrite), offset == ConsoleConfiguration.emergencyOffset,
      let byte = bytes.first
    else { return }
    let isFirst = emergency.withLock { waiting in
      // What comes faster than it can be taken is lost, as on a serial line.
      if waiting.count < Self.emergencyLimit { waiting.append(byte) }
      return waiting.count == 1
    }
    guard isFirst else { return }
    worker.change { [emergency = Weakly(self)] pump in
      for byte in emergency.backend?.takeEmergency() ?? [] { pump.writeEmergency(byte) }
    }
  }

  private func takeEmergency() -> [UInt8] {
    emergency.withLock { waiting in
      defer { waiting = [] }
      return waiting
    }
  }

  private struct Weakly: Sendable {
    weak let backend: ConsoleBackend?
    init(_ backend: ConsoleBackend) { self.backend = backend }
  }
}
