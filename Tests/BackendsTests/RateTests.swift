import DeviceHost
import Devices
import EventLoop
import Glibc
import Lifecycle
import SimulatedXen
import TestSupport
import Testing
import Virtqueue

/// Rates of the tree of limits, and the histograms that show what they do.
@Suite struct RateTests {
  private func limits(_ change: (inout RateLimits) -> Void) -> RateLimits {
    var limits = RateLimits()
    change(&limits)
    return limits
  }

  /// Requests that get through in so many simulated milliseconds, when somebody asks all the time.
  private func admitted(_ node: RateNode, milliseconds: UInt64, isWrite: Bool = false, bytes: UInt64 = 4096) -> UInt64 {
    let start: UInt64 = 1_000_000_000_000
    var now = start
    var count: UInt64 = 0
    while now < start + milliseconds * 1_000_000 {
      let time = node.admit(isWrite: isWrite, bytes: bytes, at: now)
      if time == 0 {
        node.release()
        count += 1
      } else {
        #expect(time > now)
        // As a timer does: whole milliseconds, somewhat late.
        now += ((time - now) / 1_000_000 + 1) * 1_000_000 + count % 3 * 400_000
      }
    }
    return count
  }

  @Test(arguments: [10, 97, 1000, 40_000, 900_000] as [UInt64]) func rateIsKeptExactlyWithLateTimers(rate: UInt64) {
    let node = RateNode()
    node.set(limits { $0.readOperations = rate })
    let count = admitted(node, milliseconds: 10_000)
    // The burst of 100 ms comes on top once.
    let expected = Double(rate) * 10.1
    #expect(abs(Double(count) - expected) <= expected * 0.02 + 1, "\(count) for \(expected)")
  }

  @Test(arguments: [512, 4096, 65536, 1 << 20] as [UInt64]) func bytesAreKeptWhateverTheSizes(bytes: UInt64) {
    let node = RateNode()
    node.set(limits { $0.writeBytes = 10_000_000 })
    let moved = admitted(node, milliseconds: 10_000, isWrite: true, bytes: bytes) * bytes
    #expect(abs(Double(moved) - 101_000_000) <= 2_020_000 + Double(bytes), "\(moved)")
  }

  @Test func readsAndWritesHaveRatesOfTheirOwn() {
    let node = RateNode()
    node.set(limits { $0.writeOperations = 10 })
    #expect(admitted(node, milliseconds: 1000, isWrite: true) <= 12)
    // Nothing limits reads: each is admitted at once.
    for _ in 0..<10_000 { #expect(node.admit(isWrite: false, bytes: 1 << 20, at: 5) == 0) }
  }

  @Test func nodeAboveLimitsAllBelow() {
    let daemon = RateNode()
    let guest = RateNode(parent: daemon)
    let first = RateNode(parent: guest)
    let second = RateNode(parent: guest)
    #expect(!first.isLimited)
    daemon.set(limits { $0.readOperations = 1000 })
    guest.set(limits { $0.readOperations = 100 })
    #expect(first.isLimited && second.isLimited)
    let counts = (admitted(first, milliseconds: 5000), admitted(second, milliseconds: 5000))
    // One after the other in the same simulated time: what the first used up is not there for the second.
    #expect(counts.0 > 480 && counts.0 < 520 && counts.1 < 30, "\(counts)")
    guest.set(RateLimits())
    daemon.set(RateLimits())
    #expect(!first.isLimited)
  }

  @Test func requestsUnderWayAreCapped() {
    let guest = RateNode()
    let device = RateNode(parent: guest)
    guest.set(limits { $0.inFlight = 2 })
    #expect(device.admit(isWrite: false, bytes: 1, at: 10) == 0)
    #expect(device.admit(isWrite: true, bytes: 1, at: 10) == 0)
    #expect(device.admit(isWrite: false, bytes: 1, at: 10) > 10)
    device.release()
    #expect(device.admit(isWrite: false, bytes: 1, at: 10) == 0)
  }

  // MARK: Through a device

  @Test func limitedDeviceServesEverythingAndReadsDoNotWaitForWrites() throws {
    let folder = TemporaryFolder()
    let settings = BlockSettings(
      path: folder.file("disk.img", bytes: 8 << 20), readOnly: false, discard: true, serial: "x")
    let rate = RateNode()
    // One in a second: the read is answered while writes wait, however busy the machine is.
    rate.set(limits { $0.writeOperations = 1 })
    let fixture = try BlockFixture(settings, rate: rate)
    defer { fixture.stop() }
    let guest = fixture.guest
    // Writes beyond the rate, then one read: the read overtakes.
    for index in 0..<12 as Range<UInt64> {
      guest.putHeader(at: (20 << 20) + index * 8192, type: 1, sector: index * 8)
      let chain: [SimulatedDriver.Buffer] = [
        .init((20 << 20) + index * 8192, 16, writable: false),
        .init((20 << 20) + index * 8192 + 4096, 512, writable: false),
        .init((20 << 20) + index * 8192 + 16, 1, writable: true),
      ]
      #expect(fixture.driver.add(chain) != nil)
    }
    fixture.driver.notifyIfWanted()
    #expect(eventually { fixture.backend.counters[0].throttled.value > 0 })
    let start = EventLoop.now()
    guest.putHeader(at: 24 << 20, type: 0, sector: 0)
    let read = fixture.driver.add([
      .init(24 << 20, 16, writable: false), .init((24 << 20) + 4096, 512, writable: true),
      .init((24 << 20) + 16, 1, writable: true),
    ])
    fixture.driver.notifyIfWanted()
    let head = try #require(read)
    var order: [UInt16] = []
    while order.last != head, order.count < 13 { order.append(try guest.waitForUsed().head) }
    #expect(order.last == head && order.count < 12, "the read came as number \(order.count) of 13")
    let waited = EventLoop.now() - start
    fixture.backend.set(limits: RateLimits())
    while order.count < 13 { order.append(try guest.waitForUsed().head) }
    fixture.settle()
    let latencies = fixture.backend.latencies[0]
    #expect(latencies.counts(.write, .throttle).count == 12)
    // To a sixteenth.
    #expect(latencies.counts(.write, .throttle).quantile(1) > waited / 16 * 15)
    #expect(latencies.counts(.read, .total).count == 1)
    #expect(eventually { fixture.backend.counters[0].inFlight.load(ordering: .relaxed) == 0 })
  }

  @Test func limitThatIsTakenAwayLetsWhatWaitsGo() throws {
    let folder = TemporaryFolder()
    let settings = BlockSettings(
      path: folder.file("disk.img", bytes: 8 << 20), readOnly: false, discard: true, serial: "x")
    let rate = RateNode()
    rate.set(limits { $0.readBytes = 512 })
    let fixture = try BlockFixture(settings, rate: rate)
    defer { fixture.stop() }
    #expect(try fixture.guest.read(sector: 0, count: 65536).status == 0)  // on credit: two minutes of debt
    fixture.guest.putHeader(at: 20 << 20, type: 0, sector: 0)
    #expect(
      fixture.driver.add([
        .init(20 << 20, 16, writable: false), .init((20 << 20) + 4096, 512, writable: true),
        .init((20 << 20) + 16, 1, writable: true),
      ]) != nil)
    fixture.driver.notifyIfWanted()
    #expect(eventually { fixture.backend.counters[0].throttled.value == 1 })
    fixture.backend.set(limits: RateLimits())
    #expect(try fixture.guest.waitForUsed().length == 513)
  }

  // MARK: Histograms

  @Test func bucketsCoverEverythingWithoutGapsAndQuantilesAreRightToASixteenth() {
    var last = 0
    var value: UInt64 = 0
    while value < 1 << 41 {
      let bucket = LatencyHistogram.bucket(value)
      #expect(bucket == last || bucket == last + 1, "\(value)")
      #expect(value < LatencyHistogram.end(of: bucket) || bucket == LatencyHistogram.bucketCount - 1)
      if bucket > 0 { #expect(value >= LatencyHistogram.end(of: bucket - 1)) }
      last = bucket
      value += max(1, value >> 7)
    }
    #expect(LatencyHistogram.bucket(.max) == LatencyHistogram.bucketCount - 1)
    #expect(LatencyHistogram.bucket(0) == 0)
  }

  @Test func mergedHistogramsHoldWhatBothHeld() throws {
    let folder = TemporaryFolder()
    let settings = BlockSettings(
      path: folder.file("disk.img", bytes: 8 << 20), readOnly: false, discard: true, serial: "x")
    let fixture = try BlockFixture(settings)
    defer { fixture.stop() }
    for _ in 0..<10 { #expect(try fixture.guest.read(sector: 0, count: 512).status == 0) }
    #expect(try fixture.guest.flush() == 0)
    fixture.settle()
    let counts = fixture.backend.latencies[0].counts(.read, .engine)
    #expect(counts.count == 10)
    var sum = counts
    sum += fixture.backend.latencies[0].counts(.flush, .engine)
    #expect(sum.count == 11)
    #expect(sum.sum >= counts.sum)
    #expect(counts.quantile(0.5) <= counts.quantile(0.99))
    #expect(counts.below(.max) == 10)
    #expect(fixture.backend.latencies[0].counts(.read, .throttle).count == 0)
  }
}
