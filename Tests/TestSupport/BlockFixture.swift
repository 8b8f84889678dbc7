package import DeviceHost
package import Devices
import EventLoop
import Glibc
package import SimulatedXen
package import Transport
package import Virtqueue
package import Xen

/// A block backend on its own thread behind a transport, and a simulated guest that drives it by direct register accesses.
package final class BlockFixture {
  package let domain: SimulatedDomain
  package let pool: ForeignMappingPool
  package let backend: BlockBackend
  package let transport: MMIOTransport
  package let driver: SimulatedDriver
  package let guest: SimulatedBlockGuest
  private let threads: [LoopThread]

  /// - Parameter mappingBudget: bytes; small ones make the pool evict.
  package init(
    _ settings: BlockSettings, memoryBytes: Int = 32 << 20, queueSize: UInt16 = 256, indirect: Bool = true,
    wanted: FeatureBits = [.indirectDescriptors, .eventIndex], mappingBudget: UInt64 = 1 << 30, bucketShift: Int = 16,
    onlyWanted: Bool = false, queueCount: Int = 1, vcpuCount: Int = 1, rate: RateNode = RateNode(),
    decorate: @escaping @Sendable (any BlockEngine, _ queue: Int) -> any BlockEngine = { engine, _ in engine },
    report: @escaping @Sendable (DeviceReport) -> Void = { _ in }
  ) throws {
    domain = try SimulatedDomain(identifier: 9, memoryBytes: memoryBytes, vcpuCount: vcpuCount)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    let handle = try hypervisor.open(9)
    pool = ForeignMappingPool(guest: handle, bucketShift: bucketShift, budgetBytes: mappingBudget)
    var settings = settings
    // The tests are run once by each engine, see Tests/run-unit-tests.
    if settings.engine == .auto, let name = getenv("VXD_TEST_ENGINE") {
      settings.engine = BlockEngineChoice(rawValue: String(cString: name)) ?? .auto
    }
    let latch = Latch()
    let outcome = Outcome()
    threads = BlockBackend.start(
      settings, .init(name: "test", source: pool, rate: rate, report: report), decorate: decorate
    ) { result in
      outcome.result = result
      latch.open()
    }
    latch.wait()
    guard let result = outcome.result else { throw Errno(12) }
    do {
      backend = try result.get()
    } catch {
      for thread in threads { thread.stopAndJoin() }
      throw error
    }
    transport = MMIOTransport(device: backend, line: SlotTable.slot(0).line(of: handle), onStatus: { _ in })
    driver = SimulatedDriver(registers: DirectRegisters(transport), memory: domain.memory, area: 1 << 20)
    // Device bits always; ring formats only where a test asks for them.
    let rings: FeatureBits = [.ringPacked, .inOrder, .ringReset, .indirectDescriptors, .eventIndex]
    let offered =
      onlyWanted
      ? backend.offeredFeatures.subtracting(rings) : backend.offeredFeatures.subtracting([.ringPacked, .inOrder])
    try driver.start(wanted: wanted.union(offered), queueSize: queueSize, queueCount: queueCount)
    guest = SimulatedBlockGuest(domain: domain, driver: driver, indirect: indirect)
  }

  /// Holds the result that comes from another thread; the latch orders the accesses.
  private final class Outcome: @unchecked Sendable {
    var result: Result<BlockBackend, StartFault>?
  }

  /// Returns when the device has dealt with everything that the driver did before, see `settle`.
  package func settle() { TestSupport.settle(threads) }

  /// Ends the backend; afterwards nothing of the guest may be mapped.
  package func stop() {
    transport.remove()
    let latch = Latch()
    backend.stop { latch.open() }
    latch.wait()
    for thread in threads { thread.stopAndJoin() }
    pool.close()
  }
}
