import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

/// Drivers that never let a queue run dry, and what has to happen all the same. Turns and chains are counted rather than time: how many
/// chains a device takes once somebody wants something of its thread.
@Suite struct BoundsTests {
  /// Fills a queue from a thread of its own, as another vCPU does, with the same chain over and over.
  private final class Flood: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: the ring is the thread's between `init` and `stop`.
    private let ring: any SimulatedRing
    private let chain: [SimulatedDriver.Buffer]
    private let notify: @Sendable () -> Void
    private let stops = Atomic<Bool>(false)
    private let hasStopped = Latch()
    private let seen = Atomic<Int>(0)
    /// Chains that the device has answered.
    var answered: Int { seen.load(ordering: .acquiring) }

    init(_ ring: any SimulatedRing, _ chain: [SimulatedDriver.Buffer], notify: @escaping @Sendable () -> Void) {
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
        guard ring.takeUsed() != nil else { continue }
        seen.wrappingAdd(1, ordering: .releasing)
        _ = ring.add(chain, indirect: false)
        if ring.notificationIsWanted() { notify() }
      }
      hasStopped.open()
    }

    func stop() {
      stops.store(true, ordering: .releasing)
      hasStopped.wait()
    }
  }

  /// Chains that a device may answer before what is asked of its thread is done: the run under way, one more of those that come with
  /// jobs, and what the driver's thread has not seen yet.
  private static let patience = RunBudget.chains + 4 * RunBudget.chainsBesideJobs + 256

  private func checkBounds(
    _ fixture: DeviceFixture, queue: Int, _ chain: [SimulatedDriver.Buffer], isPaced: Bool = true
  ) throws {
    let backend = fixture.backend
    let flood = Flood(fixture.driver.rings[queue], chain) { backend.notify(queue: queue) }
    fixture.driver.notify(queue: queue)
    #expect(eventually { flood.answered > 1000 })
    // Whatever comes by a job: limits, a link, an operator. Of several tries the quickest counts: this thread may be away from the processor
    // between its two looks, in which the flood goes on.
    let job = (0..<20).map { _ in
      let before = flood.answered
      fixture.perform {}
      return flood.answered - before
    }
    #expect(job.min() ?? 0 <= Self.patience, "jobs waited for so many chains: \(job)")
    // Ballooning: every mapping is withdrawn under the flood, and comes back.
    let invalidation = (0..<20).map { _ in
      let before = flood.answered
      fixture.pool.invalidate()
      return flood.answered - before
    }
    #expect(invalidation.min() ?? 0 <= Self.patience, "invalidations waited for so many chains: \(invalidation)")
    let mapped = fixture.pool.statistics.mappedPages
    #expect(mapped < 4096)
    let still = flood.answered
    #expect(eventually { flood.answered > still + 1000 })
    // A reset, which the flood does not know of: that it returns is what counts.
    fixture.driver.reset()
    flood.stop()
  }

  @Test func networkGuestThatNeverStopsSendingHoldsNothingUp() throws {
    var pair: [Int32] = [-1, -1]
    try #require(socketpair(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_NONBLOCK.rawValue), 0, &pair) == 0)
    let (near, far) = (pair[0], pair[1])
    defer { close(far) }
    let mac = MACAddress(value: 0x0016_3e00_0001)
    let settings = NetSettings(attachment: .created(bridge: nil), tapName: "none", mac: mac)
    let fixture = try DeviceFixture(deviceID: 1, queueCount: 3) { surroundings, completion in
      NetBackend.start(
        settings, surroundings, openTap: { _ throws(TapFault) in TapDevice(name: "none", queues: [near]) }
      ) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    let frame = [UInt8](repeating: 0, count: 12) + [UInt8](repeating: 0xff, count: 6) + mac.bytes + [8, 0, 1, 2, 3, 4]
    fixture.put(frame, at: fixture.buffers)
    try checkBounds(fixture, queue: 1, [.init(fixture.buffers, UInt32(frame.count), writable: false)])
  }

  @Test func entropyGuestThatNeverStopsAskingHoldsNothingUp() throws {
    let fixture = try DeviceFixture(deviceID: 4, queueCount: 1) { surroundings, completion in
      EntropyBackend.start(EntropySettings(), surroundings) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    try checkBounds(fixture, queue: 0, [.init(fixture.buffers, 64, writable: true)])
  }

  @Test func consoleGuestThatNeverStopsPrintingHoldsNothingUp() throws {
    let folder = TemporaryFolder()
    let settings = ConsoleSettings(ports: [ConsolePortSettings(name: "", isConsole: true)])
    let fixture = try DeviceFixture(
      deviceID: 3, wanted: [], queueCount: 2, consoleFolder: folder.path
    ) { surroundings, completion in
      ConsoleBackend.start(settings, surroundings) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    try checkBounds(fixture, queue: 1, [.init(fixture.buffers, 64, writable: false)])
  }

  @Test(arguments: [false, true])
  func blockGuestThatNeverStopsReadingHoldsNothingUp(direct: Bool) throws {
    let folder = TemporaryFolder()
    var settings = BlockSettings(
      path: folder.file("disk.img", bytes: 1 << 20), readOnly: false, discard: false, serial: "bounds")
    settings.direct = direct
    let final = settings
    let fixture = try DeviceFixture(deviceID: 2, queueSize: 64, queueCount: 1) { surroundings, completion in
      BlockBackend.start(final, surroundings) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    fixture.put([UInt8](repeating: 0, count: 16), at: fixture.buffers)
    try checkBounds(
      fixture, queue: 0,
      [
        .init(fixture.buffers, 16, writable: false), .init(fixture.buffers + 4096, 512, writable: true),
        .init(fixture.buffers + 8192, 1, writable: true),
      ])
  }

  // MARK: Long chains

  /// 64 buffers of 4 GiB are one chain: hours of copying, if it were done at once.
  @Test func consoleChainOfAnyLengthIsWrittenInSteps() throws {
    let folder = TemporaryFolder()
    let settings = ConsoleSettings(ports: [ConsolePortSettings(name: "", isConsole: true)])
    let fixture = try DeviceFixture(
      deviceID: 3, wanted: [], queueCount: 2, consoleFolder: folder.path
    ) { surroundings, completion in
      ConsoleBackend.start(settings, surroundings) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    let chain = (0..<60).map { _ in SimulatedDriver.Buffer(0, 24 << 20, writable: false) }
    for _ in 0..<1 { _ = fixture.driver.add(chain, queue: 1) }
    fixture.driver.notify(queue: 1)
    let written = fixture.account.queue(1).counters.writtenBytes
    #expect(eventually { written.value > 1 << 20 })
    for _ in 0..<10 {
      let before = written.value
      fixture.perform {}
      #expect(written.value - before <= 4 << 20)
    }
    let before = written.value
    fixture.driver.reset()
    #expect(written.value - before <= 4 << 20)
  }

  /// A console's emergency write is one register access, and each access is a job: they must not pile up.
  @Test func emergencyWritesDoNotPileUp() throws {
    let folder = TemporaryFolder()
    let settings = ConsoleSettings(ports: [ConsolePortSettings(name: "", isConsole: true)])
    let fixture = try DeviceFixture(
      deviceID: 3, wanted: [.consoleEmergencyWrite], queueCount: 2, consoleFolder: folder.path
    ) { surroundings, completion in
      ConsoleBackend.start(settings, surroundings) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    let (isHeld, goesOn) = (Latch(), Latch())
    fixture.enqueue {
      isHeld.open()
      goesOn.wait()
    }
    isHeld.wait()
    for _ in 0..<10_000 { fixture.driver.registers.write(0x108, 65) }
    // One job, whatever the count of characters.
    #expect(fixture.jobsWaiting <= 2)
    goesOn.open()
    fixture.settle()
  }
}
