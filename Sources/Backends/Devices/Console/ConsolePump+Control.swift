import Transport
import Virtqueue

/// The control queues (virtio 1.2, 5.3.6.2): which ports there are, what they are, and who has them open.
extension ConsolePump {
  private enum Event {
    static let deviceReady: UInt16 = 0
    static let deviceAdd: UInt16 = 1
    static let portReady: UInt16 = 3
    static let consolePort: UInt16 = 4
    static let resize: UInt16 = 5
    static let portOpen: UInt16 = 6
    static let portName: UInt16 = 7
  }

  /// Messages that wait for the driver at most: a driver that asks without reading the answers is not answered.
  private static var messageLimit: Int { 512 }

  /// What a driver was told, or has asked to be told, is kept: its messages are over when they are used, and the answers may still be in
  /// memory of this process when that dies. Each word has a bit for each port.
  private enum Note: Int {
    case open = 0
    /// The driver has its DEVICE_ADD.
    case added
    /// It said PORT_READY, and it has what follows from that.
    case ready, answered
    /// Bit 0: it said DEVICE_READY.
    case asked
  }

  private func note(_ note: Note) -> UInt64 {
    guard let notes, notes.count >= 40 else { return 0 }
    return notes.load(fromByteOffset: 8 * note.rawValue, as: UInt64.self)
  }

  private func set(_ note: Note, _ word: UInt64) {
    guard let notes, notes.count >= 40 else { return }
    notes.storeBytes(of: word, toByteOffset: 8 * note.rawValue, as: UInt64.self)
  }

  /// A message to the driver.
  struct Message {
    var bytes: [UInt8]
    /// Ports that are announced, or whose PORT_READY is answered, when the driver has it.
    var adds: UInt64 = 0
    var answers: UInt64 = 0
  }

  /// - Returns: whether there is more to do at once.
  mutating func serveControl(
    _ signals: borrowing [any TransportSignals], _ invalidations: UInt64
  ) throws(VirtqueueFault) -> Bool {
    guard fromDriver.isActive else { return false }
    defer { fromDriver.publish(signals[3]) }
    for _ in 0..<Self.batchLimit {
      guard let chain = try fromDriver.next(&memory, &budget) else { break }
      var cursor = ChainCursor(chain.buffers, count: chain.readableCount)
      var message: (UInt32, UInt16, UInt16) = (0, 0, 0)
      let count = withUnsafeMutableBytes(of: &message) { bytes -> Int in
        guard let start = bytes.baseAddress else { return 0 }
        return (try? cursor.read(&memory, to: start, count: 8)) ?? 0
      }
      if count == 8 {
        let (port, event) = (UInt32(littleEndian: message.0), UInt16(littleEndian: message.1))
        let value = UInt16(littleEndian: message.2)
        if event == Event.portOpen, value == 0, port < UInt32(portCount),
          try !drain(Int(port), signals[Self.queue(Int(port)) + 1], invalidations)
        {
          // Again from here, the next time: what the guest says behind it is of later.
          fromDriver.putBack(chain.ticket)
          return true
        }
        perform(port: port, event: event, value: value)
      } else {
        fromDriver.counters.unsupported.add(1)
      }
      fromDriver.counters.others.add(1)
      fromDriver.use(chain.ticket, length: 0)
    }
    return false
  }

  private mutating func perform(port: UInt32, event: UInt16, value: UInt16) {
    if event == Event.deviceReady {
      guard value == 1 else { return }
      set(.asked, 1)
      return addPorts()
    }
    guard port < UInt32(portCount) else { return fromDriver.counters.unsupported.add(1) }
    let index = Int(port)
    switch event {
    case Event.portReady:
      guard value == 1 else { return }
      set(.ready, note(.ready) | 1 << UInt64(index))
      set(.answered, note(.answered) & ~(1 << UInt64(index)))
      ports[index].isReady = true
      ports[index].toldOpen = false
      ports[index].toldSize = nil
      describe(index)
    case Event.portOpen: setOpen(index, value != 0)
    default: fromDriver.counters.unsupported.add(1)
    }
  }

  /// Announces the ports that the driver does not have: none of them twice (virtio 1.2, 5.3.6.2.1).
  private mutating func addPorts() {
    for index in 0..<portCount where announced & 1 << UInt64(index) == 0 {
      announced |= 1 << UInt64(index)
      say(index, Event.deviceAdd, 1)
      if !messages.isEmpty { messages[messages.count - 1].adds = 1 << UInt64(index) }
    }
  }

  private mutating func describe(_ index: Int) {
    let before = messages.count
    if ports[index].isConsole { say(index, Event.consolePort, 1) }
    if !ports[index].name.isEmpty { say(index, Event.portName, 1, Array(ports[index].name.utf8)) }
    if messages.count > before {
      messages[messages.count - 1].answers = 1 << UInt64(index)
    } else {
      set(.answered, note(.answered) | 1 << UInt64(index))
    }
  }

  func isGuestOpen(_ index: Int) -> Bool { ConsolePortBoard.bit(guestOpen, index) }

  /// - Parameter resumes: the guest had it open before this backend began.
  mutating func setOpen(_ index: Int, _ isOpen: Bool, resumes: Bool = false) {
    guard isGuestOpen(index) != isOpen else { return }
    guestOpen ^= 1 << UInt64(index)
    ports[index].channel.guest(isOpen: isOpen, resumes: resumes)
    board.set(guest: guestOpen)
    set(.open, guestOpen)
  }

  /// The driver of an earlier backend knows its ports, and does not speak of them again. What that one still owed it is said now.
  mutating func rememberPorts() {
    guard isMultiport, !hasRemembered else { return }
    hasRemembered = true
    let (open, ready, answered) = (note(.open), note(.ready), note(.answered))
    announced = note(.added)
    if note(.asked) != 0 { addPorts() }
    for index in 0..<portCount where ready & 1 << UInt64(index) != 0 {
      ports[index].isReady = true
      // Whether the host's end is as the driver was told is not known: it is said once more.
      ports[index].toldOpen = nil
      if answered & 1 << UInt64(index) == 0 { describe(index) }
      if open & 1 << UInt64(index) != 0 { setOpen(index, true, resumes: true) }
    }
  }

  /// Tells the driver what has changed of a port.
  ///
  mutating func tell(_ index: Int) {
    let isOpen = ports[index].channel.isOpen
    let size = ports[index].channel.size
    if index == 0, let size, size != ports[0].toldSize, !isMultiport || ports[0].isReady {
      ports[0].toldSize = size
      onSize(size)
      if isMultiport {
        // Columns first (virtio 1.2, 5.3.6.2.2); Linux before 6.16 and its stable branches read it the other way round.
        let bytes = [size.columns, size.rows].flatMap { [UInt8($0 & 255), UInt8($0 >> 8)] }
        say(index, Event.resize, 1, bytes)
      }
    }
    guard isMultiport, ports[index].isReady, isOpen != ports[index].toldOpen else { return }
    ports[index].toldOpen = isOpen
    say(index, Event.portOpen, isOpen ? 1 : 0)
  }

  private mutating func say(_ index: Int, _ event: UInt16, _ value: UInt16, _ more: [UInt8] = []) {
    guard isMultiport, messages.count < Self.messageLimit else { return }
    let head: [UInt8] = [
      UInt8(truncatingIfNeeded: index), 0, 0, 0, UInt8(event), 0, UInt8(value), 0,
    ]
    messages.append(Message(bytes: head + more))
  }

  /// - Returns: whether messages wait for the driver's buffers.
  mutating func sendMessages(_ signals: any TransportSignals) throws(VirtqueueFault) -> Bool {
    guard toDriver.isActive else { return false }
    var sent = 0
    while sent < messages.count, let chain = try toDriver.next(&memory, &budget) {
      var cursor = ChainCursor(chain.writable, count: chain.writableCount)
      let done = messages[sent].bytes.withUnsafeBytes { bytes -> Int in
        guard let start = bytes.baseAddress else { return 0 }
        return (try? cursor.write(&memory, from: start, count: bytes.count)) ?? 0
      }
      toDriver.use(chain.ticket, length: UInt32(done))
      sent += 1
    }
    toDriver.publish(signals)
    // Behind it: what a death comes before is said once more, which a driver takes better than what is never said.
    let (adds, answers) = messages[..<sent].reduce((UInt64(0), UInt64(0))) { ($0.0 | $1.adds, $0.1 | $1.answers) }
    if adds != 0 { set(.added, note(.added) | adds) }
    if answers != 0 { set(.answered, note(.answered) | answers) }
    messages.removeFirst(sent)
    return !messages.isEmpty
  }
}
