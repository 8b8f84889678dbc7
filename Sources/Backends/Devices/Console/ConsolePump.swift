package import Transport
package import Virtqueue

/// The data path of a console device: every port of it, and the control queues (virtio 1.2, 5.3), on one thread.
///
/// Queue numbers are the device's: 0 and 1 of port 0, 2 and 3 control, from 4 on two for each further port; the even ones go to the guest.
package struct ConsolePump: DevicePump, ~Copyable {
  /// Chains of each queue before others have their turn.
  static var batchLimit: Int { 64 }
  private static var chainLimit: Int { 64 }
  private static var pieceBytes: Int { 4096 }
  /// Bytes of one port's output before others have their turn: chains may be far longer.
  private static var outputBytes: Int { 65536 }

  /// One port.
  struct Port: ~Copyable {
    let channel: any ConsoleChannel
    let name: String
    let isConsole: Bool
    var input: SerialQueue
    var output: SerialQueue
    /// Bytes of the oldest output chain that the channel has already.
    var outputDone = 0
    /// What the driver has said, and what it has been told.
    var isReady = false
    var toldOpen: Bool? = false
    var toldSize: TerminalSize?
  }

  /// What a port is made of.
  package struct PortParts {
    package var channel: any ConsoleChannel
    package var name: String
    package var isConsole: Bool
    package var inputCounters: QueueCounters
    package var outputCounters: QueueCounters

    package init(
      channel: any ConsoleChannel, name: String, isConsole: Bool, inputCounters: QueueCounters,
      outputCounters: QueueCounters
    ) {
      self.channel = channel
      self.name = name
      self.isConsole = isConsole
      self.inputCounters = inputCounters
      self.outputCounters = outputCounters
    }
  }

  let ports: UnsafeMutablePointer<Port>
  let portCount: Int
  var memory: GuestMemoryView
  var toDriver: SerialQueue
  var fromDriver: SerialQueue
  /// Messages that wait for a buffer of the driver, oldest first.
  var messages: [Message] = []
  /// Ports that the driver was told of, or is about to be.
  var announced: UInt64 = 0
  var hasRemembered = false
  var features: FeatureBits = []
  private let rate: RateNode
  private let piece: UnsafeMutableRawPointer
  /// Keeps which ports the guest has open.
  let notes: UnsafeMutableRawBufferPointer?
  /// The terminal of port 0 has another size.
  let onSize: @Sendable (TerminalSize) -> Void
  /// Which ports are open.
  let board: ConsolePortBoard
  /// What the guest has open: bit n is port n.
  var guestOpen: UInt64 = 0
  private var firstPort = 0
  private var toldGuestOpen: UInt64 = 0
  private var toldTime: UInt64 = 0
  /// The guest has opened or closed ports: all that it has open now, as a mask. Not more often than each `tellPause`.
  private let onOpen: @Sendable (UInt64) -> Void
  private static var tellPause: UInt64 { 100_000_000 }
  package private(set) var nextTime: UInt64 = 0
  private var now: UInt64 = 0
  var budget = RunBudget()

  package init(
    ports parts: [PortParts], controlCounters: (QueueCounters, QueueCounters), source: any GuestMemorySource,
    rate: RateNode, notes: UnsafeMutableRawBufferPointer?, board: ConsolePortBoard,
    onSize: @escaping @Sendable (TerminalSize) -> Void, onOpen: @escaping @Sendable (UInt64) -> Void
  ) {
    memory = GuestMemoryView(source: source)
    toDriver = SerialQueue(chainLimit: Self.chainLimit, counters: controlCounters.0)
    fromDriver = SerialQueue(chainLimit: Self.chainLimit, counters: controlCounters.1)
    self.rate = rate
    self.notes = notes
    self.onSize = onSize
    self.board = board
    self.onOpen = onOpen
    piece = .allocate(byteCount: Self.pieceBytes, alignment: 16)
    ports = .allocate(capacity: parts.count)
    for (index, part) in parts.enumerated() {
      (ports + index).initialize(
        to: Port(
          channel: part.channel, name: part.name, isConsole: part.isConsole,
          input: SerialQueue(chainLimit: Self.chainLimit, counters: part.inputCounters),
          output: SerialQueue(chainLimit: Self.chainLimit, counters: part.outputCounters)))
    }
    portCount = parts.count
  }

  deinit {
    ports.deinitialize(count: portCount)
    ports.deallocate()
    piece.deallocate()
  }

  // MARK: Life

  package mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault) {
    features = activation.features
    if activation.adopts { rememberPorts() }
    switch queue {
    case 2: try toDriver.activate(activation)
    case 3: try fromDriver.activate(activation)
    default:
      let port = ports + Self.port(of: queue)
      if queue & 1 == 0 {
        try port.pointee.input.activate(activation)
      } else {
        try port.pointee.output.activate(activation)
      }
      // Without the control queues both ends are open as soon as the driver is there.
      if !isMultiport { setOpen(0, true, resumes: activation.adopts) }
    }
  }

  package mutating func deactivate(_ queue: Int) {
    switch queue {
    case 2:
      toDriver.deactivate()
      messages = []
    case 3: fromDriver.deactivate()
    default:
      let port = ports + Self.port(of: queue)
      if queue & 1 == 0 {
        port.pointee.input.deactivate()
      } else {
        port.pointee.output.deactivate()
        port.pointee.outputDone = 0
      }
    }
    nextTime = 0
  }

  /// The driver is gone: whatever it had open is closed.
  package mutating func end(_ queue: Int) {
    if queue == 3 { announced = 0 }
    let index = queue < 2 ? 0 : queue < 4 ? nil : Self.port(of: queue)
    guard let index, index < portCount else { return }
    ports[index].isReady = false
    ports[index].toldOpen = false
    ports[index].toldSize = nil
    setOpen(index, false)
  }

  var isMultiport: Bool { features.contains(.consoleMultiport) }

  private static func port(of queue: Int) -> Int { queue < 2 ? 0 : queue / 2 - 1 }

  // MARK: A batch

  package mutating func run(
    _ signals: borrowing [any TransportSignals], _ budget: inout RunBudget
  ) throws(DeviceFault) -> PumpOutcome {
    self.budget = budget
    defer { budget = self.budget }
    now = MonotonicClock.now
    ports[0].output.counters.batchSince.store(now, ordering: .relaxed)
    nextTime = 0
    let invalidations = memory.enter()
    defer {
      ports[0].output.counters.settle(&memory)
      memory.leave()
      ports[0].output.counters.batchSince.store(0, ordering: .relaxed)
    }
    do throws(VirtqueueFault) {
      try toDriver.prepare(invalidations)
      try fromDriver.prepare(invalidations)
      var hasMore = try serveControl(signals, invalidations)
      var hostOpen: UInt64 = 0
      for step in 0..<portCount {
        // Another port is first each time: a budget that is spent early does not always leave out the same ones.
        let index = (firstPort &+ step) % portCount
        try ports[index].input.prepare(invalidations)
        try ports[index].output.prepare(invalidations)
        hasMore = try output(index, signals[Self.queue(index) + 1]) || hasMore
        hasMore = try input(index, signals[Self.queue(index)]) || hasMore
        tell(index)
        if ports[index].channel.isConnected { hostOpen |= 1 << UInt64(index) }
      }
      firstPort = (firstPort &+ 1) % portCount
      board.set(host: hostOpen)
      reportOpen()
      let isBlocked = try sendMessages(signals[2])
      hasMore = fromDriver.enableNotifications() || hasMore
      if isBlocked { hasMore = toDriver.enableNotifications() || hasMore }
      return hasMore ? .more : .idle
    } catch {
      throw .virtqueue(error)
    }
  }

  /// A guest may open and close as fast as it likes; who is told of it may take longer.
  private mutating func reportOpen() {
    guard guestOpen != toldGuestOpen else { return }
    let due = toldTime &+ Self.tellPause
    guard now >= due || toldTime == 0 else {
      nextTime = nextTime == 0 ? due : min(nextTime, due)
      return
    }
    toldGuestOpen = guestOpen
    toldTime = now
    onOpen(guestOpen)
  }

  static func queue(_ port: Int) -> Int { port == 0 ? 0 : 2 * port + 2 }

  // MARK: Output

  /// - Returns: whether there is more to do at once.
  private mutating func output(_ index: Int, _ signals: any TransportSignals) throws(VirtqueueFault) -> Bool {
    // By a pointer of its own: under ThreadSanitizer Swift 6.3 takes an access by `ports` for one to all of `self`.
    let port = ports + index
    guard port.pointee.output.isActive else { return false }
    var left = Self.outputBytes
    for _ in 0..<Self.batchLimit {
      guard let chain = try port.pointee.output.next(&memory, &budget) else {
        port.pointee.output.publish(signals)
        return budget.isSpent || port.pointee.output.enableNotifications()
      }
      guard write(chain, index, &left) else {
        port.pointee.output.putBack(chain.ticket)
        port.pointee.output.publish(signals)
        return left <= 0
      }
      port.pointee.output.use(chain.ticket, length: 0)
    }
    port.pointee.output.publish(signals)
    return true
  }

  /// - Returns: false when part of the chain has to wait.
  private mutating func write(_ chain: DescriptorChain, _ index: Int, _ left: inout Int) -> Bool {
    let port = ports + index
    let counters = port.pointee.output.counters
    var cursor = ChainCursor(chain.buffers, count: chain.readableCount)
    cursor.skip(UInt64(port.pointee.outputDone))
    while true {
      // What is done of the chain is remembered; the next run goes on behind it.
      guard left > 0 else { return false }
      let time = rate.delay(isWrite: true, at: now)
      guard let count = try? cursor.read(&memory, to: piece, count: Self.pieceBytes) else {
        counters.drops(.badBuffer).add(1)
        break
      }
      guard count > 0 else { break }
      left &-= count
      budget.pay(bytes: UInt64(count))
      if time != 0 {
        guard port.pointee.channel.dropsOutput else {
          nextTime = nextTime == 0 ? time : min(nextTime, time)
          return false
        }
        counters.drops(.rate).add(UInt64(count))
        port.pointee.outputDone &+= count
        continue
      }
      let taken = port.pointee.channel.take(UnsafeRawBufferPointer(start: piece, count: count))
      port.pointee.outputDone &+= taken
      counters.writtenBytes.add(UInt64(taken))
      rate.pay(isWrite: true, bytes: UInt64(taken), at: now)
      guard taken == count else { return false }
    }
    counters.writes.add(1)
    port.pointee.outputDone = 0
    return true
  }

  /// The guest is about to close a port. What it wrote before goes as far as somebody takes it now, and the rest is dropped: nobody who is connected
  /// later is to get the end of it.
  ///
  /// - Returns: false when the run is over before that is done.
  mutating func drain(
    _ index: Int, _ signals: any TransportSignals, _ invalidations: UInt64
  ) throws(VirtqueueFault) -> Bool {
    let port = ports + index
    guard isGuestOpen(index), port.pointee.channel.followsGuest, port.pointee.output.isActive else { return true }
    try port.pointee.output.prepare(invalidations)
    defer { port.pointee.output.publish(signals) }
    // No more than there can have been.
    for _ in 0..<port.pointee.output.size {
      guard let chain = try port.pointee.output.next(&memory, &budget) else { return !budget.isSpent }
      var left = Self.outputBytes
      if !write(chain, index, &left) {
        guard left > 0 else {
          port.pointee.output.putBack(chain.ticket)
          return false
        }
        let done = UInt64(port.pointee.outputDone)
        port.pointee.output.counters.drops(.linkDown).add(chain.readableBytes - min(done, chain.readableBytes))
        port.pointee.outputDone = 0
      }
      port.pointee.output.use(chain.ticket, length: 0)
    }
    return true
  }

  /// A character of a driver that has no queue (virtio 1.2, 5.3.4: emerg_wr).
  package mutating func writeEmergency(_ byte: UInt8) {
    var byte = byte
    _ = withUnsafeBytes(of: &byte) { ports[0].channel.take($0) }
  }

  // MARK: Input

  private mutating func input(_ index: Int, _ signals: any TransportSignals) throws(VirtqueueFault) -> Bool {
    let port = ports + index
    guard port.pointee.input.isActive, isGuestOpen(index) else { return false }
    for _ in 0..<Self.batchLimit {
      guard port.pointee.channel.hasInput else {
        port.pointee.input.publish(signals)
        return false
      }
      guard let chain = try port.pointee.input.next(&memory, &budget) else {
        port.pointee.input.publish(signals)
        return budget.isSpent || port.pointee.input.enableNotifications()
      }
      let room = min(Int(clamping: chain.writableBytes), Self.pieceBytes)
      let count = port.pointee.channel.give(UnsafeMutableRawBufferPointer(start: piece, count: room))
      var cursor = ChainCursor(chain.writable, count: chain.writableCount)
      let done = (try? cursor.write(&memory, from: piece, count: count)) ?? 0
      if done < count { port.pointee.input.counters.drops(.badBuffer).add(UInt64(count - done)) }
      port.pointee.input.counters.reads.add(1)
      port.pointee.input.counters.readBytes.add(UInt64(done))
      port.pointee.input.use(chain.ticket, length: UInt32(done))
    }
    port.pointee.input.publish(signals)
    return true
  }

  package mutating func close() { for index in 0..<portCount { ports[index].channel.close() } }
}
