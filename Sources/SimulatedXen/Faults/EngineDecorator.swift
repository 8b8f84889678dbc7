package import Devices

/// An engine in front of another one: what it does not do itself, that one does.
package protocol EngineDecorator: BlockEngine {
  var engine: any BlockEngine { get }
}

extension EngineDecorator {
  package var geometry: BlockGeometry { engine.geometry }
  package var reachesGuestMemory: Bool { engine.reachesGuestMemory }
  // A completion that is held back must not refer to guest memory.
  package var movesDataInSubmit: Bool { false }
  package var canRetryFlush: Bool { engine.canRetryFlush }
  package var memoryAlignment: Int { engine.memoryAlignment }
  package var now: UInt64 { engine.now }
  package var readiness: Int32 { engine.readiness }
  package func acknowledgeReadiness() { engine.acknowledgeReadiness() }
  package var alarm: Int32? { engine.alarm }
  package func acknowledgeAlarm() { engine.acknowledgeAlarm() }
  package var interruptsSleep: Bool { engine.interruptsSleep }
  package var bouncesUpTo: UInt64 { engine.bouncesUpTo }
  package func register(_ start: UnsafeMutableRawPointer, bytes: Int) { engine.register(start, bytes: bytes) }
  package func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
    engine.submit(requests, count: count)
  }
  package func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    engine.reap(into: completions, capacity: capacity)
  }
  package func waitForCompletion() { engine.waitForCompletion() }
  package func abandon() { engine.abandon() }
  package func close() { engine.close() }
}
