package import Virtqueue

/// The driver's half of virtio-mmio, written from the specification (virtio 1.2, 3.1, 4.2.3), with the rings of its queues.
///
/// One device, one thread. Correct unless a test makes it otherwise, by writing into the rings itself.
package final class SimulatedDriver {
  package enum Failure: Error, Equatable {
    case noDevice(id: UInt32)
    case featuresRefused
    case queueRefused
    case timeout
  }

  /// A buffer of a request.
  package struct Buffer {
    package var address: UInt64
    package var length: UInt32
    package var isWritable: Bool

    package init(_ address: UInt64, _ length: UInt32, writable: Bool) {
      self.address = address
      self.length = length
      isWritable = writable
    }
  }

  package let registers: any RegisterAccess
  package let memory: SimulatedMemory
  package private(set) var features: FeatureBits = []
  package private(set) var rings: [any SimulatedRing] = []
  private let area: UInt64
  package private(set) var notifications: UInt64 = 0

  /// - Parameter area: guest memory for the rings, 4 KiB aligned; a queue of 256 uses somewhat more than 1 MiB of it.
  package init(registers: any RegisterAccess, memory: SimulatedMemory, area: UInt64) {
    self.registers = registers
    self.memory = memory
    self.area = area
  }

  // MARK: Initialization (virtio 1.2, 3.1.1)

  /// Finds the device, negotiates the wanted features (as far as offered), sets queues up, and starts.
  ///
  /// - Parameters:
  ///   - queueCount: queues that are used; the others are left alone.
  ///   - setUp: what the driver does to its device before it sets DRIVER_OK.
  package func start(
    deviceID: UInt32 = 2, wanted: FeatureBits, queueSize: UInt16 = 256, queueCount: Int = 1,
    setUp: (SimulatedDriver) -> Void = { _ in }
  ) throws(Failure) {
    let id = registers.read(0x008)
    guard registers.read(0x000) == 0x7472_6976, registers.read(0x004) == 2, id == deviceID else {
      throw .noDevice(id: id)
    }
    registers.write(0x070, 0)
    registers.write(0x070, 1)
    registers.write(0x070, 3)
    registers.write(0x014, 1)
    let high = registers.read(0x010)
    registers.write(0x014, 0)
    let offered = FeatureBits(rawValue: UInt64(high) << 32 | UInt64(registers.read(0x010)))
    features = offered.intersection(wanted.union(.version1))
    registers.write(0x024, 1)
    registers.write(0x020, UInt32(features.rawValue >> 32))
    registers.write(0x024, 0)
    registers.write(0x020, UInt32(truncatingIfNeeded: features.rawValue))
    registers.write(0x070, 11)
    guard registers.read(0x070) & 8 != 0 else { throw .featuresRefused }
    rings = []
    for index in 0..<queueCount { rings.append(try makeRing(index, queueSize, at: rings.last?.end ?? area)) }
    setUp(self)
    registers.write(0x070, 15)
  }

  private func makeRing(_ index: Int, _ wantedSize: UInt16, at place: UInt64) throws(Failure) -> any SimulatedRing {
    registers.write(0x030, UInt32(index))
    guard registers.read(0x044) == 0 else { throw .queueRefused }
    let size = min(wantedSize, UInt16(truncatingIfNeeded: registers.read(0x034)))
    guard size > 0 else { throw .queueRefused }
    let start = (place + 4095) & ~4095
    let ring: any SimulatedRing =
      features.contains(.ringPacked)
      ? SimulatedPackedRing(memory: memory, area: start, size: size, features: features)
      : SimulatedSplitRing(memory: memory, area: start, size: size, features: features)
    registers.write(0x038, UInt32(size))
    for (register, address) in [
      (UInt64(0x080), ring.descriptorArea), (0x090, ring.driverArea), (0x0a0, ring.deviceArea),
    ] {
      registers.write(register, UInt32(truncatingIfNeeded: address))
      registers.write(register + 4, UInt32(address >> 32))
    }
    registers.write(0x044, 1)
    guard registers.read(0x044) == 1 else { throw .queueRefused }
    return ring
  }

  /// Takes one queue down while the device goes on, and sets it up anew (VIRTIO_F_RING_RESET, virtio 1.2, 2.6.1).
  package func resetQueue(_ index: Int) throws(Failure) {
    let old = rings[index]
    registers.write(0x030, UInt32(index))
    registers.write(0x0c0, 1)
    guard registers.read(0x0c0) == 0 else { throw .queueRefused }
    rings[index] = try makeRing(index, old.size, at: old.descriptorArea)
  }

  /// The end of what `start` uses of the guest's memory, for buffers behind it.
  package var areaEnd: UInt64 { rings.last?.end ?? area }

  /// Resets the device.
  package func reset() { registers.write(0x070, 0) }

  package var status: UInt32 { registers.read(0x070) }

  // MARK: Requests

  /// Makes a chain available in a queue; nil when it is full.
  package func add(_ buffers: [Buffer], indirect: Bool = false, queue: Int = 0) -> UInt16? {
    rings[queue].add(buffers, indirect: indirect)
  }

  /// Sets the available index of queue 0 to any value, as no correct driver does.
  package func jumpAvailable(to index: UInt16) { (rings[0] as? SimulatedSplitRing)?.jumpAvailable(to: index) }

  /// Notifies the device when it wants to be.
  package func notifyIfWanted(queue: Int = 0) {
    if rings[queue].notificationIsWanted() { notify(queue: queue) }
  }

  /// Notifies the device in any case.
  package func notify(queue: Int = 0) {
    notifications &+= 1
    registers.write(0x050, UInt32(queue))
  }

  /// The next used element: head and bytes written; nil when there is none.
  package func takeUsed(queue: Int = 0) -> (head: UInt16, length: UInt32)? { rings[queue].takeUsed() }

  /// Asks for an interrupt at the next used element.
  ///
  /// - Returns: whether elements are there already.
  package func armInterrupt(queue: Int = 0) -> Bool { rings[queue].armInterrupt() }

  /// What an interrupt handler does: reads the cause and acknowledges it.
  package func acknowledgeInterrupt() -> UInt32 {
    let cause = registers.read(0x060)
    registers.write(0x064, cause)
    return cause
  }
}
