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

/// What one chain or one register access may ask for, and what is done of it at once. Queues that never run dry: `FloodTests`.
@Suite struct BoundsTests {
  // MARK: Long chains

  /// 64 buffers of 4 GiB are one chain: hours of copying, if it were done at once.
  @Test func consoleChainOfAnyLengthIsWrittenInSteps() throws {
    let folder = TemporaryFolder()
    let settings = ConsoleSettings(ports: [ConsolePortSettings(name: "", isConsole: true)])
    let fixture = try DeviceFixture(
      deviceID: 3, wanted: [], queueCount: 2, consoleFolder: folder.path
    ) { context, completion in
      ConsoleBackend.start(settings, context) { completion($0.map { $0 }) }
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
    ) { context, completion in
      ConsoleBackend.start(settings, context) { completion($0.map { $0 }) }
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
