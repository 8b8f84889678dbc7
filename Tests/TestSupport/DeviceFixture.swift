package import DeviceHost
package import Devices
package import EventLoop
package import SimulatedXen
import Synchronization
package import Transport
package import Virtqueue
package import Xen

/// A device of any type on the simulated Xen, with its driver and without a supervisor. Its saved state outlives its backends, so that
/// they can be exchanged under the driver.
package final class DeviceFixture: CustomReflectable {
  package typealias Start = (
    DeviceBackend.Context, @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread]

  package let domain: SimulatedDomain
  package let pool: ForeignMappingPool
  package let transport: MMIOTransport
  package let driver: SimulatedDriver
  private var present: DeviceBackend?
  package var backend: DeviceBackend {
    guard let present else { fatalError("no backend is there") }
    return present
  }
  package let account = DeviceAccount()
  package let rate = RateNode()
  package let faults = Faults()
  private var threads: [LoopThread]
  private let start: Start
  private let context: DeviceBackend.Context

  /// What the device reported.
  package final class Faults: Sendable {
    private let list = Mutex<[DeviceFault]>([])
    private let ports = Atomic<UInt64>(0)
    package var all: [DeviceFault] { list.withLock { $0 } }
    private let reports = Atomic<Int>(0)
    package var portReports: Int { reports.load(ordering: .acquiring) }
    /// Ports of a console that the guest has open, as was reported last.
    package var portsOpen: UInt64 { ports.load(ordering: .relaxed) }

    func add(_ report: DeviceReport) {
      switch report {
      case .fault(let fault): list.withLock { $0.append(fault) }
      case .portsOpen(let mask):
        reports.add(1, ordering: .relaxed)
        ports.store(mask, ordering: .releasing)
      default: break
      }
    }
  }

  /// - Parameters:
  ///   - wanted: features that the driver takes, of those that are offered; nil for all but ring formats.
  ///   - queueCount: queues that it sets up.
  package init(
    deviceID: UInt32, wanted: FeatureBits? = nil, queueSize: UInt16 = 64, queueCount: Int,
    consoleFolder: String? = nil, start: @escaping Start
  ) throws {
    domain = try SimulatedDomain(identifier: 9, memoryBytes: 32 << 20, vcpuCount: 1)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    let handle = try hypervisor.open(9)
    pool = ForeignMappingPool(guest: handle, bucketShift: 16, budgetBytes: 1 << 30)
    let kept = Mutex<DeviceState?>(nil)
    let faults = faults
    var context = DeviceBackend.Context(
      name: "test", source: pool, rate: rate, account: account,
      makeState: { layout throws(StartFault) in
        if let known = kept.withLock({ $0 }) { return known }
        do throws(Errno) {
          let made = try DeviceState(
            layout: layout, place: .mmio(base: SlotTable.slot(0).base, index: 0, sharedInterrupt: 0))
          kept.withLock { $0 = made }
          return made
        } catch {
          throw .host(error)
        }
      },
      report: { faults.add($0) })
    context.consoleFolder = consoleFolder
    self.context = context
    self.start = start
    let (backend, threads) = try Self.open(start, context)
    (present, self.threads) = (backend, threads)
    transport = MMIOTransport(
      device: backend, line: SlotTable.slot(0).line(of: handle), state: backend.state, onStatus: { _ in })
    driver = SimulatedDriver(registers: DirectRegisters(transport), memory: domain.memory, area: 1 << 20)
    try driver.start(
      deviceID: deviceID, wanted: wanted ?? backend.offeredFeatures, queueSize: queueSize, queueCount: queueCount)
  }

  private static func open(_ start: Start, _ context: DeviceBackend.Context) throws -> (
    DeviceBackend, [LoopThread]
  ) {
    let latch = Latch()
    let result = Mutex<Result<DeviceBackend, StartFault>?>(nil)
    let threads = start(context) { outcome in
      result.withLock { $0 = outcome }
      latch.open()
    }
    latch.wait()
    guard let outcome = result.withLock({ $0 }) else { throw Errno(12) }
    do {
      return (try outcome.get(), threads)
    } catch {
      for thread in threads { thread.stopAndJoin() }
      throw error
    }
  }

  private func end(_ meanwhile: () -> Void = {}) {
    guard let backend = present else { return }
    let latch = Latch()
    backend.stop { latch.open() }
    meanwhile()
    latch.wait()
    for thread in threads { thread.stopAndJoin() }
  }

  /// Returns when the device has dealt with everything that the driver did before, see `settle`.
  package func settle() { TestSupport.settle(threads) }

  /// Runs something on the device's first thread, and waits for it; or does not wait.
  package func perform(_ body: @escaping @Sendable () -> Void) { threads[0].perform(body) }
  package func enqueue(_ body: @escaping @Sendable () -> Void) { threads[0].loop.enqueue(body) }
  /// Jobs that wait for the device's first thread.
  package var jobsWaiting: Int { threads[0].loop.jobsWaiting }

  /// Another backend takes the place of the present one, as after a death of vxd.
  ///
  /// - Parameters:
  ///   - meanwhile: what the driver does while the present one is being stopped.
  ///   - between: what it does while none is there.
  package func exchange(whileStopping meanwhile: () -> Void = {}, _ between: () -> Void = {}) throws {
    transport.unplug()
    end(meanwhile)
    between()
    // An image is free when its backend is gone.
    present = nil
    threads = []
    let (backend, threads) = try Self.open(start, context)
    (present, self.threads) = (backend, threads)
    transport.plug(backend)
  }

  /// For the message of a failed expectation: what a fixture is made of cannot all be shown.
  package var customMirror: Mirror { Mirror(self, children: []) }

  package func stop() {
    transport.remove()
    end()
    pool.close()
  }

  // MARK: Guest memory

  /// Where tests put their buffers: behind the rings.
  package var buffers: UInt64 { (driver.areaEnd + 4095) & ~4095 }

  package func put(_ bytes: [UInt8], at address: UInt64) {
    driver.memory.pointer(address).copyMemory(from: bytes, byteCount: bytes.count)
  }

  package func bytes(at address: UInt64, count: Int) -> [UInt8] {
    Array(UnsafeRawBufferPointer(start: driver.memory.pointer(address), count: count))
  }

  /// Waits for the next used element of a queue, by interrupt.
  package func waitForUsed(_ queue: Int, seconds: Int = 30) -> (head: UInt16, length: UInt32)? {
    let deadline = EventLoop.now() + UInt64(seconds) * 1_000_000_000
    while true {
      if let used = driver.takeUsed(queue: queue) { return used }
      if driver.armInterrupt(queue: queue) { continue }
      guard EventLoop.now() < deadline, domain.waitForInterrupt(seconds: seconds) else { return nil }
      _ = driver.acknowledgeInterrupt()
    }
  }
}
