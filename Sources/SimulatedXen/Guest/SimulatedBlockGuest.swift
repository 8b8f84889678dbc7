import EventLoop
import Virtqueue

/// A guest's use of a virtio disk: requests of each type, answered by status (virtio 1.2, 5.2.6).
package final class SimulatedBlockGuest {
  package let driver: SimulatedDriver
  private let domain: SimulatedDomain
  private let indirect: Bool
  /// Guest memory for headers, data and status of requests that are waited for.
  private let scratch: UInt64

  package init(domain: SimulatedDomain, driver: SimulatedDriver, indirect: Bool = true) {
    self.domain = domain
    self.driver = driver
    self.indirect = indirect && driver.features.contains(.indirectDescriptors)
    scratch = (driver.areaEnd + 4095) & ~4095
  }

  /// Where data of `transfer` goes; at least 1 MiB if the guest has it.
  package var dataAddress: UInt64 { scratch + 4096 }

  /// Writes a request's header.
  package func putHeader(at address: UInt64, type: UInt32, sector: UInt64) {
    let header = driver.memory.pointer(address)
    header.storeBytes(of: type, as: UInt32.self)
    header.storeBytes(of: 0, toByteOffset: 4, as: UInt32.self)
    header.storeBytes(of: sector, toByteOffset: 8, as: UInt64.self)
  }

  /// One request, waited for.
  ///
  /// - Returns: the status byte and the length of the used element.
  package func request(
    type: UInt32, sector: UInt64, data: [SimulatedDriver.Buffer]
  ) throws(SimulatedDriver.Failure) -> (status: UInt8, length: UInt32) {
    putHeader(at: scratch, type: type, sector: sector)
    let status = driver.memory.pointer(scratch + 16)
    status.storeBytes(of: 0xee, as: UInt8.self)
    let chain = [.init(scratch, 16, writable: false)] + data + [.init(scratch + 16, 1, writable: true)]
    guard driver.add(chain, indirect: indirect) != nil else { throw .queueRefused }
    driver.notifyIfWanted()
    let used = try waitForUsed()
    return (status.load(as: UInt8.self), used.length)
  }

  /// Waits for the next used element, by interrupt.
  package func waitForUsed(seconds: Int = 30, queue: Int = 0) throws(SimulatedDriver.Failure) -> (
    head: UInt16, length: UInt32
  ) {
    let deadline = EventLoop.now() + UInt64(seconds) * 1_000_000_000
    while true {
      if let used = driver.takeUsed(queue: queue) { return used }
      if driver.armInterrupt(queue: queue) { continue }
      guard EventLoop.now() < deadline, domain.waitForInterrupt(seconds: seconds) else { throw .timeout }
      _ = driver.acknowledgeInterrupt()
    }
  }

  package func write(_ bytes: [UInt8], sector: UInt64) throws(SimulatedDriver.Failure) -> UInt8 {
    driver.memory.pointer(dataAddress).copyMemory(from: bytes, byteCount: bytes.count)
    return try request(type: 1, sector: sector, data: [.init(dataAddress, UInt32(bytes.count), writable: false)]).status
  }

  package func read(
    sector: UInt64, count: Int
  ) throws(SimulatedDriver.Failure) -> (status: UInt8, bytes: [UInt8]) {
    let answer = try request(type: 0, sector: sector, data: [.init(dataAddress, UInt32(count), writable: true)])
    let start = UnsafeRawPointer(driver.memory.pointer(dataAddress))
    return (answer.status, Array(UnsafeRawBufferPointer(start: start, count: count)))
  }

  package func flush() throws(SimulatedDriver.Failure) -> UInt8 { try request(type: 4, sector: 0, data: []).status }
}
