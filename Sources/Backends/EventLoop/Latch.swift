import Glibc

/// A gate that one thread opens once and others wait at.
package final class Latch: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the semaphore is made for use from any thread; its storage never moves.
  private let semaphore: UnsafeMutablePointer<sem_t>

  package init() {
    semaphore = .allocate(capacity: 1)
    semaphore.initialize(to: sem_t())
    sem_init(semaphore, 0, 0)
  }

  deinit {
    sem_destroy(semaphore)
    semaphore.deallocate()
  }

  package func open() { sem_post(semaphore) }

  /// Waits for `open`.
  package func wait() {
    while sem_wait(semaphore) == -1 && errno == EINTR {}
  }

  /// Waits for `open`; false when the time is over first.
  package func wait(seconds: Int) -> Bool {
    var deadline = timespec()
    clock_gettime(CLOCK_REALTIME, &deadline)
    deadline.tv_sec += seconds
    while sem_timedwait(semaphore, &deadline) == -1 {
      if errno != EINTR { return false }
    }
    return true
  }
}

/// Lets another thread run.
package func yieldThread() { sched_yield() }
