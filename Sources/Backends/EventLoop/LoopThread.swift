import CLinux
import Glibc

/// A thread that runs one loop. Its owner joins it.
package final class LoopThread: Sendable {
  package let loop: EventLoop
  // Written once in `init`, before the value is shared.
  private nonisolated(unsafe) var thread = pthread_t()

  /// Starts the thread; it carries the loop's name.
  package init(name: String) throws(Errno) {
    loop = try EventLoop(name: name)
    let context = Unmanaged.passRetained(loop)
    let result = pthread_create(
      &thread, nil,
      { context in
        guard let context else { return nil }
        let loop = Unmanaged<EventLoop>.fromOpaque(context).takeRetainedValue()
        var signals = sigset_t()
        sigfillset(&signals)
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

  /// Whether the caller runs on this thread.
  package var isCurrent: Bool { pthread_equal(pthread_self(), thread) != 0 }

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
