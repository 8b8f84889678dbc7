package import EventLoop

/// The barrier behind each claim that nothing happened: returns when each of the threads has dealt with everything that was sent to it
/// before, be it a job or an event of a descriptor. A loop looks at its descriptors before it runs its jobs, so a job that has run tells
/// that the events of before have been handled.
///
/// Twice, since what one round begins may end in the next: buffered I/O, for one, is complete when its wake-up is looked at.
package func settle(_ threads: [LoopThread]) {
  for _ in 0..<2 {
    for thread in threads { thread.perform {} }
  }
}
