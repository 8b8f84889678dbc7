import ArgumentParser
import CLinux
import ConsoleLink
import ControlAPI
import EventLoop
import Glibc

/// `vxctl console GUEST [PORT]`: the terminal of a guest.
struct Console: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "console",
    abstract: "Attach this terminal to a guest's console, or to another console port of the guest.",
    discussion: """
      Recent output (scrollback) is shown first. Ctrl-] detaches. Any number of users can watch, but only one has the keyboard. The guest \
      learns the size of the terminal.
      """)

  @OptionGroup var connection: ConnectionOptions
  @Flag(help: "Only watch; do not take the keyboard.")
  var readOnly = false
  @Flag(help: "Take over the keyboard from another user.")
  var take = false
  @Option(
    name: .customLong("console"), help: "Name of the console device (default: the guest's first).",
    transform: Value.text("the name of a console device, such as console0"))
  var device: String?
  @Option(help: "For scripts: detach after this many seconds.", transform: Value.seconds)
  var seconds: Int?
  @Option(help: "For scripts: the terminal size to tell the guest, as COLUMNSxROWS.", transform: WindowSize.value)
  var size: WindowSize?
  @Argument(help: "Name or domain number of the guest.", transform: GuestName.value)
  var guest: GuestName
  @Argument(
    help: "Name or number of the port (default: the console).", transform: Value.text("the name or number of a port"))
  var port: String?

  func validate() throws {
    guard connection.domain == nil else {
      throw ValidationError("--domain: a console can be attached to only in the domain whose vxd serves it")
    }
  }

  func run() throws {
    var path: String?
    try connection.run { client throws(ControlClient.Failure) in
      var members: [JSONValue.Member] = [
        .init(name: "guest", value: .string(try guest.known(to: client).parameter))
      ]
      if let port { members.append(.init(name: "port", value: .string(port))) }
      if let device { members.append(.init(name: "device", value: .string(device))) }
      let found = try client.call("console.find", .object(members))
      if connection.json { Output.json(found) }
      path = found["path"]?.stringValue
    }
    guard let path, !connection.json else { return }
    let session: ConsoleSession
    do throws(Errno) {
      session = ConsoleSession(try UnixSocket.connect(path))
    } catch {
      Output.complain(
        "cannot connect to '\(path)': \(error)", remedy: "run this as root, in the domain where vxd runs")
      throw ExitCode(2)
    }
    let outcome = session.run(readOnly: readOnly, takes: take, seconds: seconds, size: size)
    if let outcome {
      Output.complain(outcome)
      throw ExitCode(1)
    }
  }
}

/// Columns and rows.
struct WindowSize: CommandValue, Equatable {
  static let expected = "COLUMNSxROWS, each from 1 to 65535, for instance 80x24"

  let columns: UInt16
  let rows: UInt16

  init(columns: UInt16, rows: UInt16) {
    self.columns = columns
    self.rows = rows
  }

  init?(argument: String) {
    let parts = argument.split(separator: "x", omittingEmptySubsequences: false)
    guard parts.count == 2, let columns = UInt16(parts[0]), let rows = UInt16(parts[1]), columns > 0, rows > 0 else {
      return nil
    }
    self.init(columns: columns, rows: rows)
  }

  /// The size of the terminal on standard output.
  static var current: WindowSize? {
    var (columns, rows): (UInt16, UInt16) = (0, 0)
    guard clinux_window_size(1, &columns, &rows) == 0, columns > 0, rows > 0 else { return nil }
    return WindowSize(columns: columns, rows: rows)
  }

  var frame: ConsoleFrame {
    ConsoleFrame(.size, [columns, rows].flatMap { [UInt8($0 >> 8), UInt8($0 & 255)] })
  }
}

/// A connection to a port, and the terminal in raw mode.
private final class ConsoleSession {
  private static let escape: UInt8 = 0x1d  // Ctrl-]

  private let descriptor: Int32
  private var reader = ConsoleFrameReader()
  private var saved: termios?

  /// - Parameter descriptor: connected; taken over.
  init(_ descriptor: Int32) { self.descriptor = descriptor }

  deinit {
    restore()
    close(descriptor)
  }

  private func makeRaw() {
    var mode = termios()
    guard isatty(0) == 1, tcgetattr(0, &mode) == 0 else { return }
    saved = mode
    cfmakeraw(&mode)
    tcsetattr(0, TCSANOW, &mode)
  }

  private func restore() {
    guard var mode = saved else { return }
    tcsetattr(0, TCSANOW, &mode)
    saved = nil
  }

  private func send(_ frame: ConsoleFrame) -> Bool {
    let bytes = frame.encoded
    var done = 0
    while done < bytes.count {
      // Without SIGPIPE, whose default would leave the terminal as it is.
      let count = bytes.withUnsafeBytes {
        Glibc.send(descriptor, $0.baseAddress.map { $0 + done }, bytes.count - done, Int32(MSG_NOSIGNAL))
      }
      if count > 0 { done += count } else if errno != EINTR { return false }
    }
    return true
  }

  /// - Returns: what went wrong; nil when the user, the time or the guest's end ended it.
  func run(readOnly: Bool, takes: Bool, seconds: Int?, size: WindowSize?) -> String? {
    // A change of the window interrupts `poll`; nothing else is to be done there.
    signal(SIGWINCH) { _ in }
    for number in [SIGTERM, SIGHUP] { signal(number) { _ in interrupted = 1 } }
    if !readOnly {
      guard send(ConsoleFrame(.write, [takes ? 1 : 0])) else { return lastWords() }
      makeRaw()
      if saved != nil { Output.write(2, "Connected; Ctrl-] detaches.\r\n") }
    }
    let end = seconds.map { EventLoop.now() + UInt64($0) * 1_000_000_000 }
    var shown: WindowSize?
    var hasInput = !readOnly
    while interrupted == 0 {
      if !readOnly, let now = size ?? WindowSize.current, now != shown {
        shown = now
        guard send(now.frame) else { return lastWords() }
      }
      var timeout: Int32 = -1
      if let end {
        let now = EventLoop.now()
        guard now < end else { return nil }
        timeout = Int32(clamping: (end - now) / 1_000_000 + 1)
      }
      var waits = [
        pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
        pollfd(fd: hasInput ? 0 : -1, events: Int16(POLLIN), revents: 0),
      ]
      guard poll(&waits, 2, timeout) >= 0 else {
        if errno == EINTR { continue }
        return "\(Errno.last)"
      }
      if waits[0].revents != 0 {
        guard let words = receive() else { continue }
        restore()
        return words.isEmpty ? nil : words
      }
      if waits[1].revents != 0 {
        switch readKeys() {
        case .some(true): break
        case .some(false): return nil
        // A script that pipes its input in still wants to see the answer.
        case nil: hasInput = false
        }
      }
    }
    return nil
  }

  /// Why vxd has closed the connection, as far as it said so.
  private func lastWords() -> String {
    restore()
    let words = receive() ?? ""
    return words.isEmpty ? "vxd has closed the connection" : words
  }

  /// - Returns: nil to continue; else why not, empty for no reason at all.
  private func receive() -> String? {
    var bytes = [UInt8](repeating: 0, count: 8192)
    let count = read(descriptor, &bytes, bytes.count)
    guard count > 0 else { return count == 0 ? "" : "\(Errno.last)" }
    reader.append(bytes[..<count])
    do throws(ConsoleFrameReader.Malformed) {
      while let frame = try reader.next() {
        switch frame.kind {
        case .data: frame.bytes.withUnsafeBytes { _ = write(1, $0.baseAddress, $0.count) }
        case .mode where frame.bytes.first == 0:
          Output.write(2, "vxctl: another user has the keyboard; --take takes it over\r\n")
        case .mode where frame.bytes.first == 2:
          return
            "permission denied: run this as root, or as a member of a group that vxd has been given with --operate-group"
        default: break
        }
      }
    } catch {
      return "vxd's answer is not understood: are vxd and vxctl of the same version?"
    }
    return nil
  }

  /// - Returns: whether to continue; nil at the end of the input.
  private func readKeys() -> Bool? {
    var bytes = [UInt8](repeating: 0, count: 1024)
    let count = read(0, &bytes, bytes.count)
    guard count > 0 else { return nil }
    let keys = bytes[..<count]
    // Only a terminal has an escape key: piped input is passed through unchanged.
    if saved != nil, let place = keys.firstIndex(of: Self.escape) {
      _ = send(ConsoleFrame(.data, Array(keys[..<place])))
      return false
    }
    return send(ConsoleFrame(.data, Array(keys)))
  }
}

/// Set by signals that end the program.
nonisolated(unsafe) private var interrupted: sig_atomic_t = 0
