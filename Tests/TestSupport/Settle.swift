package import EventLoop

/// The barrier behind each claim that nothing happened: returns when each of the threads has dealt with everything that was sent to it
/// before, be it a job or an event of a descriptor.
///
/// Twice, since what one round begins may end in the next: buffered I/O, for one, is complete when its wake-up is looked at.
package func settle(_ threads: [LoopThread]) {
  for _ in 0..<2 {
    for thread in threads {
      let latch = Latch()
      whenQuiet(thread.loop) { latch.open() }
      latch.wait()
    }
  }
}

/// Runs `body` on the loop's thread when none of its descriptors is ready. A job alone does not tell that: pumps leave their batches for
/// jobs, and go on behind them.
package func whenQuiet(_ loop: EventLoop, rounds: Int = 100_000, _ body: @escaping @Sendable () -> Void) {
  loop.enqueue {
    if loop.hasEvents, rounds > 0 { whenQuiet(loop, rounds: rounds - 1, body) } else { body() }
  }
}
