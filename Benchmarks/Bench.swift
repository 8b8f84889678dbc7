import EventLoop
import Glibc

/// Ratios of vxd's block backend to bare libaio, side by side in one run: `vxd-bench [FILE]`.
///
/// Each figure is the median of several rounds, in which bare libaio, vxd by libaio without and with bounce buffers, and vxd by io_uring take
/// turns.
@main
enum Bench {
  static let fileBytes: UInt64 = 256 << 20
  static let rounds = 5
  static let seconds = 0.5

  static func main() throws {
    if CommandLine.arguments.dropFirst().first == "profile" {
      return try Profile.run(Array(CommandLine.arguments.dropFirst(2)))
    }
    if CommandLine.arguments.dropFirst().first == "packets" {
      return try PacketProfile.run(Array(CommandLine.arguments.dropFirst(2)))
    }
    if CommandLine.arguments.dropFirst().first == "alone" {
      return try alone(Array(CommandLine.arguments.dropFirst(2)))
    }
    let isRates = CommandLine.arguments.dropFirst().first == "rates"
    let arguments = CommandLine.arguments.dropFirst(isRates ? 2 : 1)
    let path = arguments.first ?? "/dev/shm/vxd-bench-\(getpid()).img"
    let isOwn = arguments.isEmpty
    if isOwn { try makeFile(path) }
    defer { if isOwn { unlink(path) } }
    if isRates { return try Rates.run(path) }

    print("file \(path)\(isOwn ? " (in memory)" : ""), \(rounds) rounds of \(seconds) s each, medians\n")
    for inline in [true, false] {
      print(
        inline
          ? "backend and guest on one thread: the backend's own cost"
          : "\nbackend on its own thread, woken by notifications, waking by interrupts")
      try compareAll(path, inline)
    }
    print(
      "\nby libaio, direct: data moves between the guest's memory and the file; bounced: it is copied through aligned buffers."
    )
    print("by io_uring: it is copied through buffers that are registered with the kernel.")
    print("maps, kicks (notifications), irqs (interrupts): per request by io_uring, in steady state.")
  }

  /// One load on a backend with a thread of its own, for strace or perf to look at that: `vxd-bench alone ENGINE read|write DEPTH SECONDS [FILE]`.
  private static func alone(_ arguments: [String]) throws {
    guard arguments.count >= 4, let engine = LoadEngine(rawValue: arguments[0]), let depth = Int(arguments[2]),
      let seconds = Double(arguments[3])
    else { fatalError("usage: vxd-bench alone libaio|io_uring read|write DEPTH SECONDS [FILE]") }
    let path = arguments.dropFirst(4).first ?? "/dev/shm/vxd-bench-\(getpid()).img"
    if arguments.count == 4 { try makeFile(path) }
    defer { if arguments.count == 4 { unlink(path) } }
    let load = try GuestLoad(path: path, copies: false, inline: false, engine: engine)
    let result = load.run(
      Pattern(isWrite: arguments[1] == "write", depth: depth, fileBytes: fileBytes), seconds: seconds)
    load.stop()
    print("\(Int(result.requestsPerSecond * seconds)) requests in \(seconds) s")
  }

  private static func compareAll(_ path: String, _ inline: Bool) throws {
    let titles = [
      "bare/s", "direct/s", "ratio", "bounced/s", "ratio", "io_uring/s", "ratio", "maps/req", "kicks/req", "irqs/req",
    ]
    print(padded("pattern", 28) + titles.map { padded($0, 11) }.joined())
    for isWrite in [false, true] {
      for depth in [1, 32] {
        try compare(Pattern(isWrite: isWrite, depth: depth, fileBytes: fileBytes), path, inline)
      }
    }
  }

  private static func compare(_ pattern: Pattern, _ path: String, _ inline: Bool) throws {
    var bare: [Double] = []
    var direct: [Double] = []
    var bounced: [Double] = []
    var ring: [Double] = []
    var last: GuestLoad.Result?
    for _ in 0..<rounds {
      bare.append(try withDescriptor(path) { BareAIO.run(descriptor: $0, pattern: pattern, seconds: seconds) })
      for (copies, engine) in [(false, .libaio), (true, .libaio), (false, .ioUring)] as [(Bool, LoadEngine)] {
        let load = try GuestLoad(path: path, copies: copies, inline: inline, engine: engine)
        _ = load.run(pattern, seconds: 0.05)  // mappings and caches
        let result = load.run(pattern, seconds: seconds)
        load.stop()
        if engine == .ioUring {
          ring.append(result.requestsPerSecond)
          last = result
        } else if copies {
          bounced.append(result.requestsPerSecond)
        } else {
          direct.append(result.requestsPerSecond)
        }
      }
    }
    let base = median(bare)
    let cells = [
      whole(base), whole(median(direct)), ratio(median(direct) / base), whole(median(bounced)),
      ratio(median(bounced) / base), whole(median(ring)), ratio(median(ring) / base),
      ratio(last?.mapCallsPerRequest ?? 0), ratio(last?.notificationsPerRequest ?? 0),
      ratio(last?.interruptsPerRequest ?? 0),
    ]
    print(padded(pattern.name, 28) + cells.map { padded($0, 11) }.joined())
    fflush(nil)
  }

  private static func withDescriptor<Value>(_ path: String, _ body: (Int32) -> Value) throws -> Value {
    var raw = open(path, O_RDWR | O_CLOEXEC | 0o40000 /* O_DIRECT */)
    if raw < 0 { raw = open(path, O_RDWR | O_CLOEXEC) }
    guard raw >= 0 else { throw Errno.last }
    defer { close(raw) }
    return body(raw)
  }

  private static func makeFile(_ path: String) throws {
    let raw = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
    guard raw >= 0 else { throw Errno.last }
    defer { close(raw) }
    let chunk = [UInt8](repeating: 0x5a, count: 1 << 20)
    for _ in 0..<(fileBytes >> 20) {
      guard write(raw, chunk, chunk.count) == chunk.count else { throw Errno.last }
    }
  }

  private static func median(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }
  private static func whole(_ value: Double) -> String { "\(Int(value))" }
  private static func ratio(_ value: Double) -> String {
    let thousandths = Int(value * 1000 + 0.5)
    return "\(thousandths / 1000).\(String(1000 + thousandths % 1000).dropFirst())"
  }
  private static func padded(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }
}
