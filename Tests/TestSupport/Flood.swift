import EventLoop
import Glibc
package import SimulatedXen
import Synchronization

/// A driver that never lets a queue run dry: it fills the queue from a thread of its own, as another vCPU does, with the same chain over
/// and over.
package final class Flood: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the ring is the thread's between `init` and `stop`.
  private let ring: any SimulatedRing
  private let chain: [SimulatedDriver.Buffer]
  private let notify: @Sendable () -> Void
  private let stops = Atomic<Bool>(false)
  private let hasStopped = Latch()
  private let seen = Atomic<Int>(0)
  /// Chains that the device has answered.
  package var answered: Int { seen.load(ordering: .acquiring) }

  package init(_ ring: any SimulatedRing, _ chain: [SimulatedDriver.Buffer], notify: @escaping @Sendable () -> Void) {
    self.ring = ring
    self.chain = chain
    self.notify = notify
    while ring.add(chain, indirect: false) != nil {}
    var thread = pthread_t()
    let context = Unmanaged.passRetained(self)
    let result = pthread_create(
      &thread, nil,
      { context in
        guard let context else { return nil }
        Unmanaged<Flood>.fromOpaque(context).takeRetainedValue().fill()
        return nil
      }, context.toOpaque())
    precondition(result == 0)
    pthread_detach(thread)
  }

  private func fill() {
    while !stops.load(ordering: .acquiring) {
      guard ring.takeUsed() != nil else {
        // The device is another thread, maybe of the same processor.
        sched_yield()
        continue
      }
      seen.wrappingAdd(1, ordering: .releasing)
      _ = ring.add(chain, indirect: false)
      if ring.notificationIsWanted() { notify() }
    }
    hasStopped.open()
  }

  /// Ends the thread; may be called again.
  package func stop() {
    stops.store(true, ordering: .releasing)
    hasStopped.wait()
    hasStopped.open()
  }
}
