import Synchronization
package import Virtqueue

/// The driver's half of virtio-mmio and of a split virtqueue, written from the specification (virtio 1.2, 2.7, 3.1, 4.2.3).
///
/// One device, one queue, one thread. Correct unless a test makes it otherwise, by writing into the rings itself.
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
  package private(set) var size: UInt16 = 0
  package let descriptorArea: UInt64
  package private(set) var driverArea: UInt64 = 0
  package private(set) var deviceArea: UInt64 = 0
  /// A table of `indirectEntries` descriptors per head.
  private var indirectArea: UInt64 = 0
  private static let indirectEntries: UInt64 = 256
  private var free: [UInt16] = []
  /// Descriptors of the chain that a head starts; 0 where none does.
  private var chainLengths: [Int] = []
  private var availableIndex: UInt16 = 0
  private var seenUsed: UInt16 = 0
  private var lastNotified: UInt16 = 0
  package private(set) var notifications: UInt64 = 0

  /// - Parameter area: guest memory for the rings, 4 KiB aligned; 2 MiB of it are used at most.
  package init(registers: any RegisterAccess, memory: SimulatedMemory, area: UInt64) {
    self.registers = registers
    self.memory = memory
    descriptorArea = area
  }

  // MARK: Initialization (virtio 1.2, 3.1.1)

  /// Finds the device, negotiates the wanted features (as far as offered), sets queue 0 up, and starts.
  package func start(deviceID: UInt32 = 2, wanted: FeatureBits, queueSize: UInt16 = 256) throws(Failure) {
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
    try setUpQueue(queueSize)
    registers.write(0x070, 15)
  }

  private func setUpQueue(_ wantedSize: UInt16) throws(Failure) {
    registers.write(0x030, 0)
    guard registers.read(0x044) == 0 else { throw .queueRefused }
    size = min(wantedSize, UInt16(truncatingIfNeeded: registers.read(0x034)))
    driverArea = (descriptorArea + 16 * UInt64(size) + 4095) & ~4095
    deviceArea = (driverArea + 6 + 2 * UInt64(size) + 4095) & ~4095
    indirectArea = (deviceArea + 6 + 8 * UInt64(size) + 4095) & ~4095
    let bytes = Int(indirectArea - descriptorArea)
    memory.pointer(descriptorArea).initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    (availableIndex, seenUsed, lastNotified) = (0, 0, 0)
    free = (0..<size).reversed()
    chainLengths = Array(repeating: 0, count: Int(size))
    registers.write(0x038, UInt32(size))
    for (register, address) in [(UInt64(0x080), descriptorArea), (0x090, driverArea), (0x0a0, deviceArea)] {
      registers.write(register, UInt32(truncatingIfNeeded: address))
      registers.write(register + 4, UInt32(address >> 32))
    }
    registers.write(0x044, 1)
    guard registers.read(0x044) == 1 else { throw .queueRefused }
  }

  /// The end of what `start` uses of the guest's memory, for buffers behind it.
  package var areaEnd: UInt64 { indirectArea + UInt64(size) * Self.indirectEntries * 16 }

  /// Resets the device.
  package func reset() { registers.write(0x070, 0) }

  package var status: UInt32 { registers.read(0x070) }

  // MARK: Requests

  /// Places available descriptors of a chain and publishes it; nil when the table is full.
  package func add(_ buffers: [Buffer], indirect: Bool = false) -> UInt16? {
    let needed = indirect ? 1 : buffers.count
    guard free.count >= needed, !buffers.isEmpty else { return nil }
    let head: UInt16
    if indirect {
      head = free.removeLast()
      let table = indirectArea + UInt64(head) * Self.indirectEntries * 16
      for (index, buffer) in buffers.enumerated() {
        let next = index + 1 < buffers.count ? UInt16(index + 1) : nil
        put(at: table + UInt64(index) * 16, buffer, next: next)
      }
      putRaw(at: descriptorArea + UInt64(head) * 16, table, UInt32(buffers.count * 16), flags: 4, next: 0)
    } else {
      let indexes = (0..<buffers.count).map { _ in free.removeLast() }
      head = indexes[0]
      for (index, buffer) in buffers.enumerated() {
        let next = index + 1 < buffers.count ? indexes[index + 1] : nil
        put(at: descriptorArea + UInt64(indexes[index]) * 16, buffer, next: next)
      }
    }
    chainLengths[Int(head)] = needed
    publish(head)
    return head
  }

  private func put(at address: UInt64, _ buffer: Buffer, next: UInt16?) {
    putRaw(
      at: address, buffer.address, buffer.length, flags: (next == nil ? 0 : 1) | (buffer.isWritable ? 2 : 0),
      next: next ?? 0)
  }

  /// Writes a descriptor as it is.
  package func putRaw(at address: UInt64, _ target: UInt64, _ length: UInt32, flags: UInt16, next: UInt16) {
    let entry = memory.pointer(address)
    entry.storeBytes(of: target, as: UInt64.self)
    entry.storeBytes(of: length, toByteOffset: 8, as: UInt32.self)
    entry.storeBytes(of: flags, toByteOffset: 12, as: UInt16.self)
    entry.storeBytes(of: next, toByteOffset: 14, as: UInt16.self)
  }

  /// Makes a head available.
  package func publish(_ head: UInt16) {
    let slot = 4 + 2 * Int(availableIndex % size)
    memory.pointer(driverArea).storeBytes(of: head, toByteOffset: slot, as: UInt16.self)
    availableIndex &+= 1
    word(driverArea, 2).pointee.store(availableIndex, ordering: .releasing)
  }

  /// Sets the available index to any value, as no correct driver does.
  package func jumpAvailable(to index: UInt16) {
    availableIndex = index
    word(driverArea, 2).pointee.store(index, ordering: .releasing)
  }

  private func word(_ area: UInt64, _ offset: UInt64) -> UnsafeMutablePointer<Atomic<UInt16>> {
    memory.pointer(area + offset).assumingMemoryBound(to: Atomic<UInt16>.self)
  }

  /// Notifies the device when it wants to be (virtio 1.2, 2.7.10 and 2.7.7).
  package func notifyIfWanted() {
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    let wanted: Bool
    if features.contains(.eventIndex) {
      let event = word(deviceArea, 4 + 8 * UInt64(size)).pointee.load(ordering: .acquiring)
      wanted = availableIndex &- event &- 1 < availableIndex &- lastNotified
    } else {
      wanted = word(deviceArea, 0).pointee.load(ordering: .acquiring) & 1 == 0
    }
    lastNotified = availableIndex
    if wanted { notify() }
  }

  /// Notifies the device in any case.
  package func notify() {
    notifications &+= 1
    registers.write(0x050, 0)
  }

  /// The next used element: head and bytes written; nil when there is none.
  package func takeUsed() -> (head: UInt16, length: UInt32)? {
    guard word(deviceArea, 2).pointee.load(ordering: .acquiring) != seenUsed else { return nil }
    let entry = memory.pointer(deviceArea) + (4 + 8 * Int(seenUsed % size))
    let head = UInt16(truncatingIfNeeded: entry.load(as: UInt32.self))
    let length = entry.load(fromByteOffset: 4, as: UInt32.self)
    seenUsed &+= 1
    release(head)
    return (head, length)
  }

  /// Asks for an interrupt at the next used element.
  ///
  /// - Returns: whether elements are there already.
  package func armInterrupt() -> Bool {
    word(driverArea, 4 + 2 * UInt64(size)).pointee.store(seenUsed, ordering: .relaxed)
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return word(deviceArea, 2).pointee.load(ordering: .acquiring) != seenUsed
  }

  /// What an interrupt handler does: reads the cause and acknowledges it.
  package func acknowledgeInterrupt() -> UInt32 {
    let cause = registers.read(0x060)
    registers.write(0x064, cause)
    return cause
  }

  private func release(_ head: UInt16) {
    guard head < size else { return }
    let count = chainLengths[Int(head)]
    chainLengths[Int(head)] = 0
    var index = head
    for step in 0..<count {
      free.append(index)
      if step + 1 < count {
        index = memory.pointer(descriptorArea).load(fromByteOffset: Int(index) * 16 + 14, as: UInt16.self)
      }
    }
  }
}
