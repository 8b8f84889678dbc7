/// The driver's half of a virtqueue in a simulated guest's memory. One thread uses it.
package protocol SimulatedRing: AnyObject {
  /// As the driver tells the device.
  var size: UInt16 { get }
  var descriptorArea: UInt64 { get }
  var driverArea: UInt64 { get }
  var deviceArea: UInt64 { get }
  /// Behind what the ring uses of the guest's memory, its indirect tables included.
  var end: UInt64 { get }

  /// Makes a chain available; nil when the ring is full.
  ///
  /// - Returns: what `takeUsed` names the chain by.
  func add(_ buffers: [SimulatedDriver.Buffer], indirect: Bool) -> UInt16?
  /// Whether the device wants a notification of what was added since the last call (virtio 1.2, 2.7.7, 2.7.10, 2.8.10).
  func notificationIsWanted() -> Bool
  /// The next used chain and the bytes written to it; nil when there is none.
  func takeUsed() -> (head: UInt16, length: UInt32)?
  /// Asks for an interrupt at the next used chain.
  ///
  /// - Returns: whether there are some already.
  func armInterrupt() -> Bool
}

/// Tables for indirect descriptors: one for each name of a chain.
struct SimulatedIndirectTables {
  let start: UInt64
  let entries: UInt64

  /// - Parameter count: tables; with many of them each is short.
  init(start: UInt64, count: UInt16) {
    self.start = (start + 4095) & ~4095
    entries = count <= 256 ? 256 : 16
  }

  func table(_ index: UInt16) -> UInt64 { start + UInt64(index) * entries * 16 }
}

extension SimulatedMemory {
  /// Writes a descriptor as it is: the last two fields are flags and next in the split format, id and flags in the packed one.
  package func putDescriptor(at address: UInt64, _ target: UInt64, _ length: UInt32, _ third: UInt16, _ fourth: UInt16)
  {
    let entry = pointer(address)
    entry.storeBytes(of: target, as: UInt64.self)
    entry.storeBytes(of: length, toByteOffset: 8, as: UInt32.self)
    entry.storeBytes(of: third, toByteOffset: 12, as: UInt16.self)
    entry.storeBytes(of: fourth, toByteOffset: 14, as: UInt16.self)
  }
}
