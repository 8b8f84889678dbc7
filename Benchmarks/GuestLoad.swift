import DeviceHost
import Devices
import EventLoop
import SimulatedXen
import Transport
import Virtqueue
import Xen

/// The pattern of the benchmark through vxd's block backend, driven by a simulated guest on a thread of its own.
final class GuestLoad {
  struct Result {
    var requestsPerSecond: Double
    var mapCallsPerRequest: Double
    var notificationsPerRequest: Double
    var interruptsPerRequest: Double
  }

  private let domain: SimulatedDomain
  private let pool: ForeignMappingPool
  private let end: () -> Void
  /// Serves the queue on this thread; nil where the device has a thread of its own.
  private let serve: (() -> Void)?
  private let transport: MMIOTransport
  private let driver: SimulatedDriver
  private let buffers: UInt64

  private final class Outcome: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: the latch orders the one write before the one read.
    var result: Swift.Result<BlockBackend, StartFault>?
  }

  /// - Parameter inline: without a thread for the device.
  init(path: String, copies: Bool, inline: Bool, engine: LoadEngine, rate: RateNode = RateNode()) throws {
    domain = try SimulatedDomain(identifier: 1, memoryBytes: 64 << 20)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    let handle = try hypervisor.open(1)
    let pool = ForeignMappingPool(guest: handle, isStable: true)
    self.pool = pool
    let line = SlotTable.slot(0).line(of: handle)
    if inline {
      let device = try InlineDevice(path: path, source: pool, copies: copies, engine: engine)
      transport = MMIOTransport(device: device, line: line, onStatus: { _ in })
      serve = { device.run() }
      end = { device.finish() }
    } else {
      let (backend, threads) = try Self.startBackend(path, pool, copies, engine, rate)
      transport = MMIOTransport(device: backend, line: line, onStatus: { _ in })
      serve = nil
      end = {
        let latch = Latch()
        backend.stop { latch.open() }
        latch.wait()
        for thread in threads { thread.stopAndJoin() }
      }
    }
    driver = SimulatedDriver(registers: DirectRegisters(transport), memory: domain.memory, area: 1 << 20)
    try driver.start(wanted: [.indirectDescriptors, .eventIndex])
    buffers = (driver.areaEnd + 0xffff) & ~0xffff
  }

  private static func startBackend(
    _ path: String, _ pool: ForeignMappingPool, _ copies: Bool, _ engine: LoadEngine, _ rate: RateNode
  ) throws -> (BlockBackend, [LoopThread]) {
    var settings = BlockSettings(path: path, readOnly: false, discard: false, serial: "bench")
    settings.copiesAlways = copies
    settings.engine = engine == .libaio ? .libaio : .ioUring
    let latch = Latch()
    let outcome = Outcome()
    let threads = BlockBackend.start(
      settings, .init(name: "bench", source: pool, rate: rate, report: { fatalError("\($0)") })
    ) {
      outcome.result = $0
      latch.open()
    }
    latch.wait()
    guard let result = outcome.result else { throw Errno(12) }
    return (try result.get(), threads)
  }

  func run(_ pattern: Pattern, seconds: Double) -> Result {
    var random = pattern.random
    let (mapCalls, notifications, interrupts) = (
      pool.statistics.mapCalls, driver.notifications, transport.interrupts.raised.value
    )
    var slotOfHead = [Int](repeating: 0, count: 256)
    var chain: [SimulatedDriver.Buffer] = []
    chain.reserveCapacity(3)
    func submit(_ slot: Int) {
      let place = buffers + UInt64(slot) * 8192
      let header = driver.memory.pointer(place)
      header.storeBytes(of: pattern.isWrite ? 1 : 0, as: UInt32.self)
      header.storeBytes(of: pattern.offset(&random) / 512, toByteOffset: 8, as: UInt64.self)
      chain.removeAll(keepingCapacity: true)
      chain.append(.init(place, 16, writable: false))
      chain.append(.init(place + 4096, 4096, writable: !pattern.isWrite))
      chain.append(.init(place + 16, 1, writable: true))
      guard let head = driver.add(chain, indirect: true) else { fatalError("the queue is full") }
      slotOfHead[Int(head)] = slot
    }
    for slot in 0..<pattern.depth { submit(slot) }
    driver.notifyIfWanted()
    var done = 0
    let start = EventLoop.now()
    let end = start + UInt64(seconds * 1e9)
    var outstanding = pattern.depth
    while outstanding > 0 {
      var taken = 0
      let goesOn = EventLoop.now() < end
      while let used = driver.takeUsed() {
        let slot = slotOfHead[Int(used.head)]
        guard driver.memory.pointer(buffers + UInt64(slot) * 8192 + 16).load(as: UInt8.self) == 0 else {
          fatalError("a request failed")
        }
        taken += 1
        if goesOn { submit(slot) } else { outstanding -= 1 }
      }
      done += taken
      if taken > 0 {
        if goesOn && serve == nil { driver.notifyIfWanted() }
        continue
      }
      if let serve {
        serve()
        continue
      }
      if driver.armInterrupt() { continue }
      guard domain.waitForInterrupt(seconds: 10) else { fatalError("no interrupt within 10 s") }
      _ = driver.acknowledgeInterrupt()
    }
    let elapsed = Double(EventLoop.now() - start) / 1e9
    let count = Double(max(done, 1))
    return Result(
      requestsPerSecond: Double(done) / elapsed,
      mapCallsPerRequest: Double(pool.statistics.mapCalls - mapCalls) / count,
      notificationsPerRequest: Double(driver.notifications - notifications) / count,
      interruptsPerRequest: Double(transport.interrupts.raised.value - interrupts) / count)
  }

  func stop() {
    transport.remove()
    end()
    pool.close()
  }
}
