import CLinux
import Glibc

/// A thread that runs one loop. Its owner joins it.
package final class LoopThread: Sendable {
  /// Who decides how much a thread has to do.
  package enum Work: Sendable {
    /// The daemon itself: the supervisor, operators, the toolstack.
    case daemon
    /// Guests. However many such threads they keep busy, those of the daemon get their turn: they have about three times the weight.
    case guests
  }

  /// By how much the nice value of threads with guests' work is above that of the main thread.
  package static let guestSteps = 5

  package let loop: EventLoop
  // Written once in `init`, before the value is shared.
  private nonisolated(unsafe) var thread = pthread_t()

  /// Starts the thread; it carries the loop's name.
  package init(name: String, work: Work = .daemon) throws(Errno) {
    loop = try EventLoop(name: name)
    // The first thing that the thread does.
    if work == .guests { loop.enqueue { clinux_lower_thread(Int32(Self.guestSteps)) } }
    let context = Unmanaged.passRetained(loop)
    let result = pthread_create(
      &thread, nil,
      { context in
        guard let context else { return nil }
        let loop = Unmanaged<EventLoop>.fromOpaque(context).takeRetainedValue()
        var signals = sigset_t()
        sigfillset(&signals)
        // A fault whose signal is blocked kills the process without its handler (`clinux_record_death`).
        for fault in [SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV] { sigdelset(&signals, fault) }
        pthread_sigmask(SIG_BLOCK, &signals, nil)
        clinux_name_thread(loop.name)
        loop.run()
        return nil
      }, context.toOpaque())
    guard result == 0 else {
      context.release()
      throw Errno(result)
    }
  }

  /// Says for whom the thread works, 63 characters at most: for the record of a death by what it did.
  package func label(_ text: String) { loop.enqueue { clinux_label_thread(text) } }

  /// Whether the caller runs on this thread.
  package var isCurrent: Bool { pthread_equal(pthread_self(), thread) != 0 }

  /// CPU time that the thread has used, in nanoseconds; 0 when it has ended.
  package var cpuTime: UInt64 { clock.time }

  package var clock: ThreadClock { ThreadClock(number: loop.threadID) }

  /// Ends the loop and waits for the thread; not to be called from it.
  package func stopAndJoin() {
    loop.stop()
    pthread_join(thread, nil)
  }

  /// Runs `body` on the loop's thread and waits for it; not to be called from that thread.
  package func perform(_ body: @escaping @Sendable () -> Void) {
    let done = Latch()
    loop.enqueue {
      body()
      done.open()
    }
    done.wait()
  }
}

/// What reads a thread's CPU time; it does not keep the thread.
package struct ThreadClock: Sendable {
  /// The kernel's number of the thread; 0 before it runs.
  let number: Int32

  /// In nanoseconds; 0 when the thread has ended.
  package var time: UInt64 {
    guard number > 0 else { return 0 }
    var time = timespec()
    // The clock of a thread by its number (linux: include/linux/posix-timers_types.h: 4 is a thread's, 2 is its running time): unlike
    // the one by `pthread_t` it may be asked for when the thread has ended.
    guard clock_gettime(clockid_t((~number << 3) | 6), &time) == 0 else { return 0 }
    return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
  }
}
