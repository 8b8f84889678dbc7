import Devices
import TestSupport
import Testing
import Transport
import Virtqueue

/// The pump of a block queue without a thread or a transport around it.
@Suite struct BlockPumpTests {
  /// Notes what it is given, and completes it with success.
  private final class NotingEngine: BlockEngine {
    var submitted = 0
    private var done: [EngineCompletion] = []

    let geometry = BlockGeometry(capacity: 1 << 20)
    let reachesGuestMemory = true
    let movesDataInSubmit = true
    let memoryAlignment = 1
    let now: UInt64 = 1
    let readiness: Int32 = -1
    func acknowledgeReadiness() {}
    func waitForCompletion() {}
    func abandon() {}
    func close() {}

    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      submitted += count
      for index in 0..<count {
        done.append(EngineCompletion(tag: requests[index].tag, result: Int(requests[index].length)))
      }
    }

    func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
      let count = min(capacity, done.count)
      for index in 0..<count { completions[index] = done[index] }
      done.removeFirst(count)
      return count
    }
  }

  private final class NoSignals: TransportSignals {
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  /// What was staged refers to the guest's memory, which is there until the batch ends and not a moment longer.
  @Test func requestsBeforeABrokenChainGoOutWithinTheirBatch() throws {
    let fixture = QueueFixture(size: 8)
    let engine = NotingEngine()
    var settings = BlockPumpSettings()
    settings.pollsWhenIdle = false
    var pump = try BlockPump(
      engine: engine, source: fixture.pool, counters: QueueCounters(), settings: settings,
      storage: JournalStorage(slotCount: 8, chainLimit: 8))
    try pump.activate(layout: fixture.layout, maximumSize: 8, features: [], source: fixture.pool)
    let header = fixture.domain.memory.pointer(0x20000)
    header.initializeMemory(as: UInt8.self, repeating: 0, count: 16)
    fixture.descriptor(0, 0x20000, 16, flags: 1, next: 1)
    fixture.descriptor(1, 0x21000, 512, flags: 3, next: 2)
    fixture.descriptor(2, 0x22000, 1, flags: 2)
    // The second chain names a head that does not exist.
    fixture.publish([0, 99])
    #expect(throws: DeviceFault.virtqueue(.headOutOfRange(99))) { _ = try pump.run(signals: NoSignals()) }
    #expect(engine.submitted == 1)
    pump.deactivate()
    #expect(engine.submitted == 1)
    pump.drain()
    let busy = pump.busyCount
    #expect(busy == 0)
  }
}
