import CLinux
package import Devices
package import EventLoop
import Glibc

/// A port's ends on this host: a Unix socket, a pty, a log, the daemon's log, and `vxctl console` clients, all of them at once. Everything
/// happens on the device's thread.
package final class ConsolePort: ConsoleChannel, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: used on the device's thread only, on which it is made and closed.

  /// What it needs of its device.
  package struct Place {
    package var loop: EventLoop
    package var counters: QueueCounters
    /// Path of a socket for `vxctl console`, and of the file with what is remembered; nil for none.
    package var viewerPath: String?
    package var historyPath: String?
    /// Whether the peer of a socket may be a client of `vxctl console`, and of a socket that listens.
    package var mayAttach: @Sendable (Int32) -> Bool
    /// Takes a line of output for the daemon's log.
    package var logLine: @Sendable (String) -> Void

    package init(
      loop: EventLoop, counters: QueueCounters, viewerPath: String?, historyPath: String?,
      mayAttach: @escaping @Sendable (Int32) -> Bool, logLine: @escaping @Sendable (String) -> Void
    ) {
      self.loop = loop
      self.counters = counters
      self.viewerPath = viewerPath
      self.historyPath = historyPath
      self.mayAttach = mayAttach
      self.logLine = logLine
    }
  }

  private static let inputLimit = 64 << 10
  private static let lineLimit = 2048

  private let settings: ConsolePortSettings
  private let place: Place
  private let log: ConsoleLog?
  private let history: ConsoleHistory?
  private var viewers: ConsoleViewers?
  private var listener: ConsoleListener?
  private var stream: ConsoleStream?
  private var connection = PortConnection()
  private var pty: ConsoleStream?
  private var ptySlave: Int32 = -1
  private var input: [UInt8] = []
  private var line: [UInt8] = []
  private var timer: UInt64 = 0
  private var isClosed = false
  /// The pump is to look at the port again.
  package var onChange: () -> Void = {}
  package private(set) var size: TerminalSize?

  /// Opens every end.
  package init(_ settings: ConsolePortSettings, _ place: Place) throws(ConsoleFault) {
    self.settings = settings
    self.place = place
    do throws(ConsoleFault) {
      log = try settings.log.map { settings throws(ConsoleFault) in try ConsoleLog(settings) }
    } catch {
      throw ConsoleFault(message: "log.path: cannot open '\(settings.log?.path ?? "")': \(error.message)")
    }
    do throws(Errno) {
      history =
        settings.historyBytes > 0
        ? try ConsoleHistory(path: place.historyPath, capacity: settings.historyBytes) : nil
    } catch {
      throw ConsoleFault(message: "historyBytes: no memory for the scrollback: \(error)")
    }
    if let path = settings.pty { try openPTY(path) }
    switch settings.socket {
    case .listen(let path):
      do throws(ConsoleFault) {
        listener = try ConsoleListener(path: path, loop: place.loop) { [weak self] in self?.accept($0) }
      } catch {
        throw ConsoleFault(message: "socket: cannot listen on '\(path)': \(error.message)")
      }
    case .connect(_, let whenOpen): if !whenOpen { handle(.opened) }
    case nil: break
    }
    guard let path = place.viewerPath else { return }
    do throws(ConsoleFault) {
      viewers = try ConsoleViewers(path: path, loop: place.loop, port: self, mayAttach: place.mayAttach)
    } catch {
      throw ConsoleFault(message: "cannot create the socket for 'vxctl console', '\(path)': \(error.message)")
    }
  }

  // MARK: ConsoleChannel

  package var dropsOutput: Bool { settings.overflow == .drop }

  /// A console has somebody at its other end always: what it remembers is for whoever comes.
  package var isOpen: Bool { isConnected || followsGuest && connection.isOpen }

  package var isConnected: Bool {
    settings.isConsole || stream != nil || pty != nil || viewers?.hasClients == true || log != nil
      || settings.logsLines
  }

  package var followsGuest: Bool {
    if case .connect(_, whenOpen: true) = settings.socket { true } else { false }
  }

  package func guest(isOpen: Bool, resumes: Bool) {
    guard followsGuest else { return }
    handle(isOpen ? resumes ? .resumed : .opened : .closed)
  }

  /// Takes until nobody has room: an end whose reader was quick may have some again, and would then have nothing to say later.
  package func take(_ bytes: UnsafeRawBufferPointer) -> Int {
    var done = 0
    while done < bytes.count {
      let count = takeOnce(UnsafeRawBufferPointer(rebasing: bytes[done...]))
      guard count > 0 else { break }
      done += count
    }
    return done
  }

  private func takeOnce(_ bytes: UnsafeRawBufferPointer) -> Int {
    var count = bytes.count
    let streams = [stream, pty].compactMap { $0 }
    if settings.overflow == .wait {
      // It stays with the guest until there is somebody.
      if followsGuest, stream == nil { return 0 }
      for stream in streams { count = min(count, stream.room) }
    }
    guard count > 0 else { return 0 }
    let part = UnsafeRawBufferPointer(rebasing: bytes[..<count])
    var isLost = streams.isEmpty && !settings.isConsole
    for stream in streams {
      let taken = stream.write(part)
      if taken < count { place.counters.drops(.host).add(UInt64(count - taken)) }
      isLost = false
    }
    history?.append(part)
    if let log {
      log.write(part)
      isLost = false
    }
    if settings.logsLines {
      addLines(part)
      isLost = false
    }
    if viewers?.write(part) == true { isLost = false }
    if isLost { place.counters.drops(.linkDown).add(UInt64(count)) }
    return count
  }

  package var hasInput: Bool { !input.isEmpty }

  package func give(_ buffer: UnsafeMutableRawBufferPointer) -> Int {
    let count = min(buffer.count, input.count)
    guard count > 0 else { return 0 }
    buffer.copyBytes(from: input[..<count])
    input.removeFirst(count)
    listenAgain()
    return count
  }

  package func close() {
    guard !isClosed else { return }
    isClosed = true
    if !line.isEmpty { place.logLine(String(decoding: line, as: UTF8.self)) }
    handle(.ended)
    listener?.close()
    viewers?.close()
    stream?.close()
    pty?.close()
    (listener, viewers, stream, pty) = (nil, nil, nil, nil)
    if ptySlave >= 0 { Glibc.close(ptySlave) }
    if let path = settings.pty { try? TrustedPath(path, followsLast: false).remove(type: S_IFLNK) }
  }

  // MARK: Ends

  /// What has come from somebody who may write.
  func add(input bytes: [UInt8]) {
    input += bytes
    listenAgain()
    onChange()
  }

  /// Bytes that there is room for; who has more keeps it.
  var inputRoom: Int { max(0, Self.inputLimit - input.count) }

  func set(size: TerminalSize) {
    self.size = size
    onChange()
  }

  /// What a new client is shown first.
  var remembered: [UInt8] { history?.bytes ?? [] }

  private func listenAgain() {
    let hasRoom = inputRoom > 0
    stream?.listen(hasRoom)
    pty?.listen(hasRoom)
    viewers?.listen(hasRoom)
  }

  private func makeStream(_ raw: Int32, onEnd: @escaping (ConsoleStream) -> Void) throws(Errno) -> ConsoleStream {
    try ConsoleStream(
      adopting: raw, loop: place.loop,
      onInput: { [weak self] stream in
        guard let self else { return }
        let bytes = stream.read(min(inputRoom, 4096))
        if !bytes.isEmpty { add(input: bytes) }
      }, onRoom: { [weak self] in self?.onChange() }, onEnd: onEnd)
  }

  /// A client of the socket; one at a time, and a second is turned away. A guest agent does what it is told: who may only look on the
  /// control socket, whose group the file has, is turned away too.
  private func accept(_ raw: Int32) {
    guard stream == nil, place.mayAttach(raw) else {
      Glibc.close(raw)
      return
    }
    stream = try? makeStream(raw) { [weak self] _ in
      self?.stream = nil
      self?.onChange()
    }
    onChange()
  }

  private func handle(_ event: PortConnection.Event) {
    for effect in connection.handle(event, at: EventLoop.now()) {
      switch effect {
      case .connect: connect()
      case .disconnect:
        stream?.close()
        stream = nil
      case .wake(let time): wake(at: time)
      case .sleep:
        place.loop.cancel(timer: timer)
        timer = 0
      case .forget:
        input = []
        listenAgain()
      }
    }
  }

  private func wake(at time: UInt64) {
    if timer != 0 { place.loop.cancel(timer: timer) }
    let now = EventLoop.now()
    let milliseconds = time > now ? (time - now + 999_999) / 1_000_000 : 0
    timer = place.loop.schedule(afterMilliseconds: milliseconds) { [weak self] in
      self?.timer = 0
      self?.handle(.due)
    }
  }

  private func connect() {
    guard case .connect(let path, _) = settings.socket else { return }
    stream = (try? UnixSocket.connect(trusted: path)).flatMap {
      try? makeStream($0) { [weak self] _ in
        self?.stream = nil
        self?.handle(.lost)
        self?.onChange()
      }
    }
    handle(stream == nil ? .refused : .connected)
    onChange()
  }

  private func openPTY(_ link: String) throws(ConsoleFault) {
    var name = [CChar](repeating: 0, count: 64)
    let master = clinux_open_pty(&name, 64)
    guard master >= 0 else { throw ConsoleFault(message: "pty: cannot create one: \(Errno(-master))") }
    // One open other side: else the master is at its end whenever nobody has it open.
    ptySlave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC)
    var raw = termios()
    tcgetattr(ptySlave, &raw)
    cfmakeraw(&raw)
    tcsetattr(ptySlave, TCSANOW, &raw)
    let path = String(decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    do {
      let place = try TrustedPath(link, followsLast: false)
      try place.remove(type: S_IFLNK)
      guard symlinkat(path, place.folder.raw, place.name) == 0 else { throw Errno.last }
    } catch {
      let failure = "\(error)"
      Glibc.close(ptySlave)
      ptySlave = -1
      Glibc.close(master)
      throw ConsoleFault(message: "pty: cannot create the link '\(link)': \(failure)")
    }
    pty = try? makeStream(master) { [weak self] _ in self?.pty = nil }
  }

  private func addLines(_ bytes: UnsafeRawBufferPointer) {
    for byte in bytes where byte != 13 {
      if byte != 10 { line.append(byte) }
      guard byte == 10 || line.count >= Self.lineLimit else { continue }
      place.logLine(String(decoding: line, as: UTF8.self))
      line = []
    }
  }
}

/// Why a console port cannot have an end.
package struct ConsoleFault: Error {
  package var message: String
}
