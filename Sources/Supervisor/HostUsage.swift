import EventLoop
import Glibc

/// What the daemon uses of the host, for its accounts.
enum HostUsage {
  /// Open descriptors.
  static var descriptors: Int {
    // One of them lists the others.
    max(0, namesInFolder("/proc/self/fd").count - 1)
  }

  static var descriptorLimit: UInt64 {
    var limit = rlimit()
    guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return 0 }
    return UInt64(limit.rlim_cur)
  }

  /// Event channels of a domain with the FIFO interface (xen: public/event_channel.h, EVTCHN_FIFO_NR_CHANNELS).
  static let eventChannelLimit = 131_072

  /// What Prometheus' own clients tell of a process, under their names; none where /proc is not there.
  struct Process {
    /// Bytes of address space, and of memory that is in use.
    var virtualBytes: UInt64
    var residentBytes: UInt64
    var threads: UInt64
    /// Seconds since 1970.
    var started: Double
  }

  static var process: Process? {
    guard let text = firstLine(of: "/proc/self/stat"), let name = text.lastIndex(of: ")") else { return nil }
    // The third field of proc(5) is the first behind the name.
    let fields = text[text.index(after: name)...].split(separator: " ")
    guard fields.count > 21, let threads = UInt64(fields[17]), let ticks = UInt64(fields[19]),
      let virtual = UInt64(fields[20]), let pages = UInt64(fields[21])
    else { return nil }
    var (boot, now) = (timespec(), timespec())
    clock_gettime(CLOCK_BOOTTIME, &boot)
    clock_gettime(CLOCK_REALTIME, &now)
    let age = seconds(boot) - Double(ticks) / Double(max(1, sysconf(Int32(_SC_CLK_TCK))))
    return Process(
      virtualBytes: virtual, residentBytes: pages &* UInt64(max(0, sysconf(Int32(_SC_PAGESIZE)))), threads: threads,
      started: (seconds(now) - age).rounded())
  }

  private static func seconds(_ time: timespec) -> Double { Double(time.tv_sec) + Double(time.tv_nsec) / 1e9 }

  private static func firstLine(of path: String) -> String? {
    guard let file = fopen(path, "re") else { return nil }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 2048)
    guard fgets(&line, Int32(line.count), file) != nil else { return nil }
    return String(decoding: line.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  /// Nanoseconds of CPU time of the process.
  static var cpuTime: UInt64 {
    var time = timespec()
    guard clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time) == 0 else { return 0 }
    return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
  }
}
