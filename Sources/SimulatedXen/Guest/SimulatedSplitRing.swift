import Synchronization
package import Virtqueue

/// A split virtqueue as a driver sees it (virtio 1.2, 2.7).
package final class SimulatedSplitRing: SimulatedRing {
  package let size: UInt16
  package let descriptorArea: UInt64
  package let driverArea: UInt64
  package let deviceArea: UInt64
  private let tables: SimulatedIndirectTables
  private let memory: SimulatedMemory
  private let eventIndex: Bool
  private var free: [UInt16]
  /// Descriptors of the chain that a head starts; 0 where none does.
  private var chainLengths: [Int]
  private var availableIndex: UInt16 = 0
  private var seenUsed: UInt16 = 0
  private var lastNotified: UInt16 = 0

  package init(memory: SimulatedMemory, area: UInt64, size: UInt16, features: FeatureBits) {
    self.memory = memory
    self.size = size
    eventIndex = features.contains(.eventIndex)
    descriptorArea = area
    driverArea = (area + 16 * UInt64(size) + 4095) & ~4095
    deviceArea = (driverArea + 6 + 2 * UInt64(size) + 4095) & ~4095
    tables = SimulatedIndirectTables(start: deviceArea + 6 + 8 * UInt64(size), count: size)
    memory.pointer(area).initializeMemory(as: UInt8.self, repeating: 0, count: Int(tables.start - area))
    free = (0..<size).reversed()
    chainLengths = Array(repeating: 0, count: Int(size))
  }

  package var end: UInt64 { tables.table(size) }

  package func add(_ buffers: [SimulatedDriver.Buffer], indirect: Bool) -> UInt16? {
    let needed = indirect ? 1 : buffers.count
    guard free.count >= needed, !buffers.isEmpty else { return nil }
    let head: UInt16
    if indirect {
      head = free.removeLast()
      let table = tables.table(head)
      for (index, buffer) in buffers.enumerated() {
        let next = index + 1 < buffers.count ? UInt16(index + 1) : nil
        put(at: table + UInt64(index) * 16, buffer, next: next)
      }
      memory.putDescriptor(at: descriptorArea + UInt64(head) * 16, table, UInt32(buffers.count * 16), 4, 0)
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

  private func put(at address: UInt64, _ buffer: SimulatedDriver.Buffer, next: UInt16?) {
    memory.putDescriptor(
      at: address, buffer.address, buffer.length, (next == nil ? 0 : 1) | (buffer.isWritable ? 2 : 0), next ?? 0)
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

  package func notificationIsWanted() -> Bool {
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    defer { lastNotified = availableIndex }
    guard eventIndex else { return word(deviceArea, 0).pointee.load(ordering: .acquiring) & 1 == 0 }
    let event = word(deviceArea, 4 + 8 * UInt64(size)).pointee.load(ordering: .acquiring)
    return availableIndex &- event &- 1 < availableIndex &- lastNotified
  }

  package func takeUsed() -> (head: UInt16, length: UInt32)? {
    guard word(deviceArea, 2).pointee.load(ordering: .acquiring) != seenUsed else { return nil }
    let entry = memory.pointer(deviceArea) + (4 + 8 * Int(seenUsed % size))
    let head = UInt16(truncatingIfNeeded: entry.load(as: UInt32.self))
    let length = entry.load(fromByteOffset: 4, as: UInt32.self)
    seenUsed &+= 1
    release(head)
    return (head, length)
  }

  package func armInterrupt() -> Bool {
    word(driverArea, 4 + 2 * UInt64(size)).pointee.store(seenUsed, ordering: .relaxed)
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return word(deviceArea, 2).pointee.load(ordering: .acquiring) != seenUsed
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
