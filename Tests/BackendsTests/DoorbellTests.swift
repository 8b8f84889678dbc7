import DeviceHost
import Devices
import EventLoop
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue

/// When a queue's thread wants to be told of the next event of its channel.
@Suite struct DoorbellTests {
  private final class Journal: Sendable {
    private let words = Mutex<[String]>([])
    var all: [String] { words.withLock { $0 } }
    func note(_ word: String) { words.withLock { $0.append(word) } }
  }

  /// Has more to do for some runs.
  private struct Pump: DevicePump, ~Copyable {
    let journal: Journal
    var runsLeft = 3
    var nextTime: UInt64 { 0 }

    mutating func activate(_ queue: Int, _ activation: QueueActivation) throws(DeviceFault) {}
    mutating func deactivate(_ queue: Int) {}
    mutating func run(
      _ signals: borrowing [any TransportSignals], _ budget: inout RunBudget
    ) throws(DeviceFault) -> PumpOutcome {
      // The run of the activation is none of the channel's.
      guard journal.all.contains("acknowledge") else { return .idle }
      journal.note("run")
      runsLeft -= 1
      return runsLeft > 0 ? .more : .idle
    }
  }

  private final class Bell: QueueDoorbell {
    private let event: EventDescriptor
    private let journal: Journal
    private let masked = Atomic(false)
    var descriptor: Int32 { event.raw }
    var isMasked: Bool { masked.load(ordering: .relaxed) }

    init(_ journal: Journal) throws {
      event = try EventDescriptor()
      self.journal = journal
    }

    func arrive() { event.signal() }
    func acknowledge() {
      event.drain()
      masked.store(true, ordering: .relaxed)
      journal.note("acknowledge")
    }
    func rearm() {
      masked.store(false, ordering: .relaxed)
      journal.note("rearm")
    }
    func ring() {}
  }

  private final class Signals: TransportSignals {
    let bell: Bell
    init(_ bell: Bell) { self.bell = bell }
    var doorbell: (any QueueDoorbell)? { bell }
    func interruptForUsedBuffers() {}
    func interruptForConfiguration() {}
    func needReset() {}
  }

  private let journal = Journal()
  private let fixture = QueueFixture()

  private func start(_ bell: Bell, runs: Int) throws -> DeviceWorker<Pump> {
    let worker = try DeviceWorker(
      Pump(journal: journal, runsLeft: runs), index: 0,
      queues: [.init(maximumSize: 8, counters: QueueCounters())], thread: try LoopThread(name: "bell"),
      source: fixture.pool, report: { _ in })
    worker.thread.perform { try? worker.open() }
    worker.activate(
      [LiveQueue(number: 0, layout: fixture.layout, signals: Signals(bell))], features: [], adopts: false)
    worker.thread.perform {}
    return worker
  }

  @Test func channelIsRearmedOnceWhenNothingIsLeftToDo() throws {
    let bell = try Bell(journal)
    let worker = try start(bell, runs: 3)
    bell.arrive()
    #expect(eventually { journal.all.last == "rearm" && journal.all.count > 1 })
    worker.thread.perform { worker.close() }
    worker.thread.stopAndJoin()
    #expect(journal.all == ["rearm", "acknowledge", "run", "run", "run", "rearm"])
  }

  /// It may be a broken driver's, whose events are to cost nothing more.
  @Test func channelOfAQueueThatIsTakenAwayIsNotRearmed() throws {
    let bell = try Bell(journal)
    // It has more to do for ever.
    let worker = try start(bell, runs: .max)
    bell.arrive()
    #expect(eventually { journal.all.contains("run") })
    worker.thread.perform { worker.deactivate(0) }
    worker.thread.perform { worker.close() }
    worker.thread.stopAndJoin()
    #expect(journal.all.filter { $0 == "rearm" }.count == 1, "that of the activation")
  }

  /// Like the kernel's: what is read is masked until it is rearmed, and a channel outlives the backends that listen to it.
  @Test func nextBackendHearsAChannelThatTheOneBeforeItLeftMasked() throws {
    let bell = try Bell(journal)
    let first = try start(bell, runs: .max)
    bell.arrive()
    #expect(eventually { journal.all.contains("run") })
    first.thread.perform { first.close() }
    first.thread.stopAndJoin()
    #expect(bell.isMasked)
    let second = try start(bell, runs: 1)
    #expect(!bell.isMasked)
    second.thread.perform { second.close() }
    second.thread.stopAndJoin()
  }
}
