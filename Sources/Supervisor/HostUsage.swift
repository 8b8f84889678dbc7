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

  /// Nanoseconds of CPU time of the process.
  static var cpuTime: UInt64 {
    var time = timespec()
    guard clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time) == 0 else { return 0 }
    return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
  }
}
