import CLinux
import Glibc
package import Synchronization

/// What a loop calls when a descriptor is ready. Called on the loop's thread.
package protocol EventSource: AnyObject {
  /// - Parameter events: EPOLLIN and so on.
  func ready(events: UInt32)
}

/// A source that runs a closure.
package final class ActionSource: EventSource {
  private let action: (UInt32) -> Void

  package init(_ action: @escaping (UInt32) -> Void) { self.action = action }

  package func ready(events: UInt32) { action(events) }
}

/// One thread's loop: descriptors by epoll, jobs from other threads, timers.
///
/// It is also a serial executor, so that an actor bound to it runs on its thread. Registrations, timers and `run` belong to
/// that thread; `enqueue` and `stop` may be called from any.
package final class EventLoop: SerialExecutor, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: everything but `mailbox`, `wakeUp` and `stopping` is touched by the loop's thread
  // only, or before that thread exists and after it has ended.

  private enum Job {
    case closure(@Sendable () -> Void)
    case task(UnownedJob)
  }

  private struct Registration {
    var source: (any EventSource)?
    var descriptor: Int32
    /// Counts the uses of this place: an event for an earlier one is stale and dropped.
    var generation: UInt32
    /// What it tells of may end a sleep without it being readable.
    var isAlsoInterrupted = false
  }

  private struct Timer {
    var deadline: UInt64
    var identifier: UInt64
    var action: @Sendable () -> Void
  }

  /// EPOLLIN and EPOLLOUT, for those who have no other use for the system's headers.
  package static let input = EPOLLIN.rawValue
  package static let output = EPOLLOUT.rawValue

  /// Names a registration.
  package struct Token: Sendable {
    fileprivate var index: Int
    fileprivate var generation: UInt32
  }

  package let name: String
  private let epoll: OwnedDescriptor
  private let wakeUp: EventDescriptor
  private let mailbox = Mutex<[Job]>([])
  /// Jobs that were taken from the mailbox, and how many of them have run.
  private var taken: [Job] = []
  private var done = 0
  /// Jobs of one turn at most: descriptors and timers have theirs then.
  private static let jobLimit = 64
  /// Whether jobs wait. Long work on the loop's thread looks at it between steps. Allocated on its own, freed with the loop.
  package let interruption: UnsafeMutablePointer<Atomic<Bool>>
  private let stopping = Atomic<Bool>(false)
  private let runnerNumber = Atomic<Int32>(0)
  private var runner = pthread_t()
  private var registrations: [Registration] = []
  private var timers: [Timer] = []
  private var nextTimer: UInt64 = 1
  private let events: UnsafeMutablePointer<epoll_event>
  private static let eventCount: Int32 = 32

  package init(name: String) throws(Errno) {
    self.name = name
    epoll = OwnedDescriptor(adopting: try retrying { epoll_create1(Int32(EPOLL_CLOEXEC)) })
    wakeUp = try EventDescriptor()
    interruption = .allocate(capacity: 1)
    interruption.initialize(to: Atomic(false))
    events = .allocate(capacity: Int(Self.eventCount))
    events.initialize(repeating: epoll_event(), count: Int(Self.eventCount))
    var event = epoll_event()
    event.events = EPOLLIN.rawValue
    event.data.u64 = .max
    guard epoll_ctl(epoll.raw, EPOLL_CTL_ADD, wakeUp.raw, &event) == 0 else { throw Errno.last }
  }

  deinit {
    events.deallocate()
    interruption.deallocate()
  }

  // MARK: Jobs

  /// Runs `body` on the loop's thread, after what was enqueued before.
  package func enqueue(_ body: @escaping @Sendable () -> Void) {
    post(.closure(body))
  }

  /// For Swift concurrency: jobs of actors bound to this loop.
  package func enqueue(_ job: consuming ExecutorJob) {
    post(.task(UnownedJob(job)))
  }

  private func post(_ job: Job) {
    let first = mailbox.withLock {
      $0.append(job)
      return $0.count == 1
    }
    interruption.pointee.store(true, ordering: .relaxed)
    if first { wakeUp.signal() }
  }

  /// Jobs that nobody has taken from the mailbox yet.
  package var jobsWaiting: Int { mailbox.withLock { $0.count } }

  private func runJobs(limit: Int = jobLimit) {
    if done == taken.count {
      wakeUp.drain()
      // Before the mailbox is emptied: what comes behind that sets it again.
      interruption.pointee.store(false, ordering: .relaxed)
      taken = mailbox.withLock { jobs in
        let all = jobs
        jobs = []
        return all
      }
      done = 0
    }
    let end = min(taken.count, limit > taken.count ? taken.count : done + limit)
    while done < end {
      let job = taken[done]
      done += 1
      switch job {
      case .closure(let body): body()
      case .task(let task): task.runSynchronously(on: asUnownedSerialExecutor())
      }
    }
    if done == taken.count {
      taken = []
      done = 0
    }
  }

  /// Whether a descriptor is ready that has not been looked at: what jobs of tests ask to know that the thread has nothing left to do.
  package var hasEvents: Bool {
    var descriptor = pollfd(fd: epoll.raw, events: Int16(POLLIN), revents: 0)
    return poll(&descriptor, 1, 0) > 0
  }

  // MARK: Descriptors

  /// Watches a descriptor, which must stay open until `remove`.
  package func add(_ descriptor: Int32, events: UInt32, source: any EventSource) throws(Errno) -> Token {
    let index = registrations.firstIndex { $0.source == nil } ?? registrations.count
    if index == registrations.count {
      registrations.append(Registration(source: nil, descriptor: -1, generation: 0))
    }
    let generation = registrations[index].generation &+ 1
    registrations[index] = Registration(source: source, descriptor: descriptor, generation: generation)
    let token = Token(index: index, generation: generation)
    do throws(Errno) {
      try control(EPOLL_CTL_ADD, token, events)
    } catch {
      registrations[index].source = nil
      throw error
    }
    return token
  }

  /// Watches a descriptor for input and runs `action` on the loop's thread.
  ///
  /// - Parameter alsoInterrupted: what the descriptor tells of may end the loop's sleep (EINTR) before it is seen to be readable, as an
  ///   io_uring does: the action runs for that too, which saves a look at the descriptors.
  package func onReadable(
    _ descriptor: Int32, alsoInterrupted: Bool = false, _ action: @escaping () -> Void
  ) throws(Errno) -> Token {
    let token = try add(descriptor, events: EPOLLIN.rawValue, source: ActionSource { _ in action() })
    registrations[token.index].isAlsoInterrupted = alsoInterrupted
    return token
  }

  /// The same, told once for each change: whoever listens takes all there is, or comes back by himself.
  package func onEdge(_ descriptor: Int32, _ action: @escaping () -> Void) throws(Errno) -> Token {
    try add(descriptor, events: EPOLLIN.rawValue | EPOLLET.rawValue, source: ActionSource { _ in action() })
  }

  /// Changes what a registration waits for.
  package func modify(_ token: Token, events: UInt32) throws(Errno) {
    try control(EPOLL_CTL_MOD, token, events)
  }

  /// Ends a registration; no event of it is delivered any more.
  package func remove(_ token: Token) {
    guard registrations[token.index].generation == token.generation, registrations[token.index].source != nil else {
      return
    }
    epoll_ctl(epoll.raw, EPOLL_CTL_DEL, registrations[token.index].descriptor, nil)
    registrations[token.index].source = nil
  }

  private func control(_ operation: Int32, _ token: Token, _ events: UInt32) throws(Errno) {
    var event = epoll_event()
    event.events = events
    event.data.u64 = UInt64(token.index) << 32 | UInt64(token.generation)
    guard epoll_ctl(epoll.raw, operation, registrations[token.index].descriptor, &event) == 0 else {
      throw Errno.last
    }
  }

  // MARK: Timers

  /// Runs `action` once after a delay; the result cancels it.
  @discardableResult
  package func schedule(afterMilliseconds delay: UInt64, _ action: @escaping @Sendable () -> Void) -> UInt64 {
    let timer = Timer(deadline: Self.now() &+ delay &* 1_000_000, identifier: nextTimer, action: action)
    nextTimer &+= 1
    let index = timers.firstIndex { $0.deadline > timer.deadline } ?? timers.count
    timers.insert(timer, at: index)
    return timer.identifier
  }

  package func cancel(timer identifier: UInt64) {
    timers.removeAll { $0.identifier == identifier }
  }

  /// Monotonic time in nanoseconds.
  package static func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
  }

  private func runTimers() {
    guard !timers.isEmpty else { return }
    let now = Self.now()
    while let first = timers.first, first.deadline <= now {
      timers.removeFirst()
      first.action()
    }
  }

  private var timeout: Int32 {
    guard taken.isEmpty else { return 0 }
    guard let first = timers.first else { return -1 }
    let now = Self.now()
    guard first.deadline > now else { return 0 }
    return Int32(clamping: (first.deadline &- now &+ 999_999) / 1_000_000)
  }

  /// For Swift concurrency: whether the caller runs on the loop's thread.
  package func checkIsolated() {
    precondition(pthread_equal(pthread_self(), runner) != 0, "not on the thread of the loop '\(name)'")
  }

  /// The kernel's number of the thread that runs the loop; 0 before.
  package var threadID: Int32 { runnerNumber.load(ordering: .relaxed) }

  // MARK: Running

  /// Runs until `stop`, on the calling thread.
  package func run() {
    runner = pthread_self()
    runnerNumber.store(clinux_thread_id(), ordering: .relaxed)
    while !stopping.load(ordering: .acquiring) {
      let count = epoll_wait(epoll.raw, events, Self.eventCount, timeout)
      var jobs = false
      if count < 0 { tellInterrupted() }
      for index in 0..<Int(max(count, 0)) {
        let data = events[index].data.u64
        guard data != .max else {
          jobs = true
          continue
        }
        let registration = registrations[Int(data >> 32)]
        guard registration.generation == UInt32(truncatingIfNeeded: data) else { continue }
        registration.source?.ready(events: events[index].events)
      }
      if jobs || !taken.isEmpty { runJobs() }
      runTimers()
    }
    for _ in 0..<2 { runJobs(limit: .max) }
  }

  private func tellInterrupted() {
    // An action may add or remove some.
    var index = 0
    while index < registrations.count {
      if registrations[index].isAlsoInterrupted { registrations[index].source?.ready(events: 0) }
      index += 1
    }
  }

  /// Ends `run` after the jobs that are enqueued by now.
  package func stop() {
    enqueue { [self] in stopping.store(true, ordering: .releasing) }
  }
}
