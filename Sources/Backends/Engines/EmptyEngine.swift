package import Devices
package import EventLoop

/// The engine of a disk of no size. The device refuses every access to sectors that are not there, so what comes here is flushes, which
/// succeed, and requests of a disk that was emptied under its guest, which fail.
package final class EmptyEngine: BlockEngine {
  package let geometry = BlockGeometry(capacity: 0, canDiscard: true)
  package var reachesGuestMemory: Bool { false }
  package var movesDataInSubmit: Bool { false }
  package var memoryAlignment: Int { 1 }
  package var now: UInt64 { EventLoop.now() }
  package var readiness: Int32 { wakeUp.raw }
  private let wakeUp: EventDescriptor
  private let finished: UnsafeMutablePointer<EngineCompletion>
  private let depth: Int
  private var count = 0

  package init(depth: Int) throws(Errno) {
    self.depth = depth
    wakeUp = try EventDescriptor()
    finished = .allocate(capacity: depth)
  }

  deinit { finished.deallocate() }

  package func acknowledgeReadiness() { wakeUp.drain() }

  package func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count new: Int) {
    for index in 0..<new where count < depth {
      finished[count] = EngineCompletion(
        tag: requests[index].tag, result: requests[index].operation == .flush ? 0 : -5 /* EIO */)
      count &+= 1
    }
    wakeUp.signal()
  }

  package func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    let taken = min(count, capacity)
    for index in 0..<taken { completions[index] = finished[index] }
    count &-= taken
    for index in 0..<count { finished[index] = finished[index &+ taken] }
    return taken
  }

  package func waitForCompletion() {}

  package func abandon() {}

  package func close() {}
}
