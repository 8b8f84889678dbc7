package import Transport

/// A block queue in the common skeleton: one pump for each queue.
extension BlockPump: DevicePump, WatchingPump {
  var clock: UInt64 { engine.now }
  var hasPending: Bool { mutating get { queue.hasPending() } }

  package var descriptors: [Int32] { [engine.readiness] + (engine.alarm.map { [$0] } ?? []) }

  package var interruptsSleep: Bool { engine.interruptsSleep }

  package mutating func acknowledge(_ descriptor: Int) {
    if descriptor == 0 { engine.acknowledgeReadiness() } else { engine.acknowledgeAlarm() }
  }

  package mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault) {
    try activate(
      layout: activation.layout, maximumSize: activation.maximumSize, features: activation.features,
      source: activation.source, adopts: activation.adopts)
  }

  package mutating func deactivate(_ queue: Int) { deactivate() }

  package mutating func end(_ queue: Int) { storage.journal.end() }

  package mutating func markBroken(_ queue: Int) { storage.journal.markBroken() }

  package mutating func run(
    _ signals: borrowing [any TransportSignals], _ budget: inout RunBudget
  ) throws(DeviceFault) -> PumpOutcome {
    try run(signals: signals[0], budget: &budget)
  }

  /// A run without a loop around it.
  package mutating func run(signals: any TransportSignals) throws(DeviceFault) -> PumpOutcome {
    var budget = RunBudget()
    return try run(signals: signals, budget: &budget)
  }

  package mutating func takeReport() -> PumpReport? {
    if goneResult != 0 {
      defer { goneResult = 0 }
      return .gone(goneResult)
    }
    guard heldResult != reportedHold else { return nil }
    reportedHold = heldResult
    return .held(heldResult)
  }

  package mutating func close() {
    deactivate()
    engine.abandon()
    drain()
    engine.close()
  }
}
