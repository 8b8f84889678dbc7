import DeviceHost
import Devices
import EventLoop
import Lifecycle
import SimulatedXen
import TestSupport
import Testing

/// An entropy device with its driver.
@Suite struct EntropyBackendTests {
  private func fixture() throws -> DeviceFixture {
    try DeviceFixture(deviceID: 4, queueCount: 1) { context, completion in
      EntropyBackend.start(EntropySettings(), context) { completion($0.map { $0 }) }
    }
  }

  private func ask(_ fixture: DeviceFixture, _ buffers: [SimulatedDriver.Buffer]) -> UInt32? {
    _ = fixture.driver.add(buffers)
    fixture.driver.notify()
    return fixture.waitForUsed(0)?.length
  }

  @Test func buffersAreFilledWithOtherBytesEachTime() throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    var seen: Set<[UInt8]> = []
    for _ in 0..<20 {
      fixture.put(Array(repeating: 0, count: 5000), at: fixture.buffers)
      let pieces = [(0, 1), (1, 300), (301, 4699)].map {
        SimulatedDriver.Buffer(fixture.buffers + UInt64($0.0), UInt32($0.1), writable: true)
      }
      #expect(ask(fixture, pieces) == 5000)
      let bytes = fixture.bytes(at: fixture.buffers, count: 5000)
      #expect(bytes.filter { $0 == 0 }.count < 100)
      #expect(seen.insert(bytes).inserted)
    }
    #expect(fixture.account.queue(0).counters.readBytes.value == 100_000)
  }

  @Test func greedyDriverGetsAtMostSixtyFourKibibytes() throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    #expect(ask(fixture, [.init(fixture.buffers, 1 << 20, writable: true)]) == 65536)
  }

  @Test func buffersThatAreNotThereEndTheAnswer() throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    #expect(ask(fixture, [.init(1 << 40, 64, writable: true)]) == 0)
    #expect(
      ask(fixture, [.init(fixture.buffers, 64, writable: true), .init(UInt64.max - 100, 64, writable: true)]) == 64)
    #expect(ask(fixture, [.init(fixture.buffers, 64, writable: false)]) == 0)
    #expect(ask(fixture, [.init(fixture.buffers, 64, writable: true)]) == 64)
    fixture.settle()
    #expect(fixture.faults.all.isEmpty)
  }

  @Test func limitHoldsTheDriverBackAndAnotherBackendGoesOn() throws {
    let fixture = try fixture()
    defer { fixture.stop() }
    var limits = RateLimits()
    limits.readBytes = 10_000
    limits.burstMilliseconds = 1
    fixture.backend.set(limits: limits)
    let start = EventLoop.now()
    #expect(ask(fixture, [.init(fixture.buffers, 2000, writable: true)]) == 2000)
    #expect(ask(fixture, [.init(fixture.buffers, 16, writable: true)]) == 16)
    #expect(EventLoop.now() - start > 150_000_000)
    fixture.backend.set(limits: RateLimits())
    try fixture.exchange { _ = fixture.driver.add([.init(fixture.buffers, 100, writable: true)]) }
    #expect(fixture.waitForUsed(0)?.length == 100)
  }
}
