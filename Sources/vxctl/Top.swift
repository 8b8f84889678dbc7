import ArgumentParser
import ControlAPI
import Glibc

/// `vxctl top`: what the devices do, refreshed all the time, on the whole screen.
struct Top: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show a live view of the activity of all devices.",
    discussion:
      "Keys: q quits; r, w, b, f and n sort by reads, writes, bytes, requests in flight and name; space refreshes immediately."
  )

  enum Order: String, CommandValue, CaseIterable {
    case reads, writes, bytes, inflight, name
  }

  @OptionGroup var connection: ConnectionOptions
  @Option(help: "Seconds between refreshes, 0.1 to 3600 (default: 2).", transform: Value.pause)
  var interval = 2.0
  @Option(
    help: "What to sort by: \(Order.expected) (default: bytes).", completion: .list(Order.allCases.map(\.rawValue)),
    transform: Order.value)
  var sort = Order.bytes
  @Option(
    help: "Exit after this many refreshes (default: 1 if standard output is not a terminal).",
    transform: Value.number(1...Int.max)
  )
  var count: Int?

  func validate() throws {
    guard !connection.json else { throw ValidationError("--json: 'top' has no JSON form; use 'vxctl list --json'") }
  }

  struct Row {
    var name: String
    var state: String
    var reads: Int64
    var writes: Int64
    var readBytes: Int64
    var writtenBytes: Int64
    var inFlight: Int64
    var restarts: Int64
  }

  private static func rows(_ client: ControlClient) throws(ControlClient.Failure) -> [Row] {
    (try client.call("device.list").arrayValue ?? []).map { device in
      func number(_ name: String) -> Int64 { device[name]?.integerValue ?? 0 }
      return Row(
        name: "\(device.cell("guest"))/\(device.cell("device"))", state: device.cell("state"), reads: number("reads"),
        writes: number("writes"), readBytes: number("readBytes"), writtenBytes: number("writtenBytes"),
        inFlight: number("inFlight"), restarts: number("restarts"))
    }
  }

  func run() throws {
    let isTerminal = isatty(0) == 1 && isatty(1) == 1
    var order = sort
    var looks = 0
    try connection.run { client throws(ControlClient.Failure) in
      // Given back before a failure is reported, which would be lost with the alternate screen.
      let terminal = isTerminal ? Terminal() : nil
      defer { terminal?.restore() }
      var old: [String: Row] = [:]
      var oldTime = now()
      while true {
        let rows = try Self.rows(client)
        let info = try client.call("system.info")
        let time = now()
        let elapsed = max(time - oldTime, 0.001)
        let rates = rows.map { row in Self.rate(row, old[row.name], looks == 0 ? 0 : elapsed) }
        let lines = Self.lines(rates, info, order, terminal?.size ?? (80, 1000))
        if let terminal { terminal.show(lines) } else { Output.line(lines.joined(separator: "\n")) }
        old = Dictionary(rows.map { ($0.name, $0) }, uniquingKeysWith: { $1 })
        oldTime = time
        looks += 1
        if looks >= count ?? (isTerminal ? .max : 1) { return }
        guard let key = terminal?.key(waiting: interval) ?? pause() else { continue }
        switch key {
        case "q", "\u{3}", "\u{4}": return
        case "r": order = .reads
        case "w": order = .writes
        case "b": order = .bytes
        case "f": order = .inflight
        case "n": order = .name
        default: break
        }
      }
    }
  }

  private func pause() -> Character? {
    usleep(UInt32(interval * 1_000_000))
    return nil
  }

  private func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
  }

  /// Counts per second; all 0 at first.
  private static func rate(_ row: Row, _ old: Row?, _ seconds: Double) -> Row {
    func by(_ path: WritableKeyPath<Row, Int64>) -> Int64 {
      guard let old, seconds > 0 else { return 0 }
      // The daemon's numbers are taken for what they are: a difference may overflow, a rate too.
      let (difference, overflow) = row[keyPath: path].subtractingReportingOverflow(old[keyPath: path])
      return overflow ? 0 : Int64(exactly: (Double(max(0, difference)) / seconds).rounded()) ?? .max
    }
    var rate = row
    for path in [\Row.reads, \Row.writes, \Row.readBytes, \Row.writtenBytes] { rate[keyPath: path] = by(path) }
    return rate
  }

  private static func lines(_ rows: [Row], _ info: JSONValue, _ order: Order, _ size: (Int, Int)) -> [String] {
    let sorted = rows.sorted { left, right in
      let values: (Int64, Int64) =
        switch order {
        case .reads: (left.reads, right.reads)
        case .writes: (left.writes, right.writes)
        case .bytes: (left.readBytes &+ left.writtenBytes, right.readBytes &+ right.writtenBytes)
        case .inflight: (left.inFlight, right.inFlight)
        case .name: (0, 0)
        }
      return values.0 != values.1 ? values.0 > values.1 : left.name < right.name
    }
    var table = Table("DEVICE", "STATE", "READS/S", "WRITES/S", "READ/S", "WRITTEN/S", "IN-FLIGHT", "RESTARTS")
    for row in sorted.prefix(max(1, size.1 - 4)) {
      table.add(
        row.name, row.state, "\(row.reads)", "\(row.writes)", bytes(row.readBytes), bytes(row.writtenBytes),
        "\(row.inFlight)", "\(row.restarts)")
    }
    let head =
      "vxd \(info.cell("version")), up \(info.cell("uptimeSeconds")) s: \(info.cell("guests")) guests, \(info.cell("devices")) devices "
      + "(\(info.cell("devicesInTrouble")) in trouble), by \(order.rawValue)"
    return ([head, ""] + table.text.split(separator: "\n").map(String.init)).map { String($0.prefix(size.0)) }
  }

  private static func bytes(_ count: Int64) -> String {
    var value = Double(count)
    for unit in ["B", "K", "M"] {
      if value < 1000 { return unit == "B" ? "\(count)" : "\(Double(Int(value * 10)) / 10)\(unit)" }
      value /= 1024
    }
    return "\(Double(Int(value * 10)) / 10)G"
  }
}

/// The terminal in raw mode with the alternate screen, until `restore`.
final class Terminal {
  private var saved = termios()

  init() {
    tcgetattr(0, &saved)
    var raw = saved
    cfmakeraw(&raw)
    tcsetattr(0, TCSANOW, &raw)
    put("\u{1b}[?1049h\u{1b}[?25l")
  }

  func restore() {
    put("\u{1b}[?25h\u{1b}[?1049l")
    tcsetattr(0, TCSANOW, &saved)
  }

  /// Columns and lines, as they are now.
  var size: (Int, Int) {
    var size = winsize()
    guard ioctl(1, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0, size.ws_row > 0 else { return (80, 24) }
    return (Int(size.ws_col), Int(size.ws_row))
  }

  func show(_ lines: [String]) {
    var text = "\u{1b}[H"
    for (index, line) in lines.enumerated() {
      let isTitle = index == 2
      text += (isTitle ? "\u{1b}[7m" : "") + line + (isTitle ? "\u{1b}[0m" : "") + "\u{1b}[K"
      if index < lines.count - 1 { text += "\r\n" }
    }
    put(text + "\u{1b}[J")
  }

  /// The key that is pressed within a time, also when the window's size changes meanwhile; nil for none.
  func key(waiting seconds: Double) -> Character? {
    var poller = pollfd(fd: 0, events: Int16(POLLIN), revents: 0)
    guard poll(&poller, 1, Int32(seconds * 1000)) > 0 else { return nil }
    var byte: UInt8 = 0
    return read(0, &byte, 1) == 1 ? Character(UnicodeScalar(byte)) : "q"
  }

  private func put(_ text: String) {
    Output.write(1, text)
  }
}
