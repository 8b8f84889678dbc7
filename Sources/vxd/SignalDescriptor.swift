import CLinux
import EventLoop
import Glibc

/// Signals as a readable descriptor. They are blocked for every thread that is started later.
final class SignalDescriptor {
  private let descriptor: OwnedDescriptor

  init(_ signals: [Int32]) throws(Errno) {
    var set = sigset_t()
    sigemptyset(&set)
    for signal in signals { sigaddset(&set, signal) }
    guard pthread_sigmask(SIG_BLOCK, &set, nil) == 0 else { throw Errno.last }
    let raw = signalfd(-1, &set, Int32(SFD_CLOEXEC | SFD_NONBLOCK))
    guard raw >= 0 else { throw Errno.last }
    descriptor = OwnedDescriptor(adopting: raw)
  }

  var raw: Int32 { descriptor.raw }

  /// The signals that have come.
  func take() -> [Int32] {
    var signals: [Int32] = []
    var info = signalfd_siginfo()
    while read(raw, &info, MemoryLayout<signalfd_siginfo>.size) > 0 { signals.append(Int32(info.ssi_signo)) }
    return signals
  }
}
