import Synchronization
package import Virtqueue

/// A packed virtqueue as a driver sees it (virtio 1.2, 2.8).
package final class SimulatedPackedRing: SimulatedRing {
  package let size: UInt16
  package let descriptorArea: UInt64
  package let driverArea: UInt64
  package let deviceArea: UInt64
  private let tables: SimulatedIndirectTables
  private let memory: SimulatedMemory
  private let eventIndex: Bool
  private var freeIDs: [UInt16]
  /// Slots that the chain of an ID occupies.
  private var slots: [Int]
  private var freeSlots: Int
  private var nextAvailable = 0
  private var availableWrap = true
  private var nextUsed = 0
  private var usedWrap = true
  /// Slots made available since the last question for a notification.
  private var added = 0

  package init(memory: SimulatedMemory, area: UInt64, size: UInt16, features: FeatureBits) {
    self.memory = memory
    self.size = size
    eventIndex = features.contains(.eventIndex)
    descriptorArea = area
    driverArea = (area + 16 * UInt64(size) + 63) & ~63
    deviceArea = driverArea + 64
    tables = SimulatedIndirectTables(start: deviceArea + 64, count: size)
    memory.pointer(area).initializeMemory(as: UInt8.self, repeating: 0, count: Int(tables.start - area))
    freeIDs = (0..<size).reversed()
    slots = Array(repeating: 0, count: Int(size))
    freeSlots = Int(size)
  }

  package var end: UInt64 { tables.table(size) }

  package func add(_ buffers: [SimulatedDriver.Buffer], indirect: Bool) -> UInt16? {
    let needed = indirect ? 1 : buffers.count
    guard freeSlots >= needed, !buffers.isEmpty, let identifier = freeIDs.popLast() else { return nil }
    let first = nextAvailable
    var firstFlags: UInt16 = 0
    func put(_ target: UInt64, _ length: UInt32, _ kind: UInt16) {
      let lap: UInt16 = availableWrap ? 1 << 7 : 1 << 15
      let address = descriptorArea + UInt64(nextAvailable) * 16
      if nextAvailable == first {
        firstFlags = kind | lap
        // The flags of the first descriptor come last: they make the whole chain available.
        memory.putDescriptor(
          at: address, target, length, identifier, word(address + 14).pointee.load(ordering: .relaxed))
      } else {
        memory.putDescriptor(at: address, target, length, identifier, kind | lap)
      }
      nextAvailable += 1
      if nextAvailable == Int(size) {
        nextAvailable = 0
        availableWrap.toggle()
      }
    }
    if indirect {
      let table = tables.table(identifier)
      for (index, buffer) in buffers.enumerated() {
        memory.putDescriptor(
          at: table + UInt64(index) * 16, buffer.address, buffer.length, 0, buffer.isWritable ? 2 : 0)
      }
      put(table, UInt32(buffers.count * 16), 4)
    } else {
      for (index, buffer) in buffers.enumerated() {
        put(buffer.address, buffer.length, (index + 1 < buffers.count ? 1 : 0) | (buffer.isWritable ? 2 : 0))
      }
    }
    word(descriptorArea + UInt64(first) * 16 + 14).pointee.store(firstFlags, ordering: .releasing)
    slots[Int(identifier)] = needed
    freeSlots -= needed
    added += needed
    return identifier
  }

  private func word(_ address: UInt64) -> UnsafeMutablePointer<Atomic<UInt16>> {
    memory.pointer(address).assumingMemoryBound(to: Atomic<UInt16>.self)
  }

  package func notificationIsWanted() -> Bool {
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    defer { added = 0 }
    let flags = word(deviceArea + 2).pointee.load(ordering: .acquiring)
    guard flags == 2, eventIndex else { return flags == 0 }
    let event = word(deviceArea).pointee.load(ordering: .acquiring)
    let slot = Int(event & 0x7fff) - ((event >> 15 == 1) == availableWrap ? 0 : Int(size))
    let passed = nextAvailable - slot - 1
    return passed >= 0 && passed < added
  }

  package func takeUsed() -> (head: UInt16, length: UInt32)? {
    guard isUsed else { return nil }
    let entry = memory.pointer(descriptorArea + UInt64(nextUsed) * 16)
    let length = entry.load(fromByteOffset: 8, as: UInt32.self)
    let identifier = entry.load(fromByteOffset: 12, as: UInt16.self)
    guard identifier < size, slots[Int(identifier)] > 0 else { return nil }
    let count = slots[Int(identifier)]
    slots[Int(identifier)] = 0
    freeSlots += count
    freeIDs.append(identifier)
    nextUsed += count
    if nextUsed >= Int(size) {
      nextUsed -= Int(size)
      usedWrap.toggle()
    }
    return (identifier, length)
  }

  private var isUsed: Bool {
    let flags = word(descriptorArea + UInt64(nextUsed) * 16 + 14).pointee.load(ordering: .acquiring)
    return (flags & 1 << 7 != 0) == usedWrap && (flags & 1 << 15 != 0) == usedWrap
  }

  package func armInterrupt() -> Bool {
    if eventIndex {
      word(driverArea).pointee.store(UInt16(nextUsed) | (usedWrap ? 1 << 15 : 0), ordering: .relaxed)
      word(driverArea + 2).pointee.store(2, ordering: .releasing)
    } else {
      word(driverArea + 2).pointee.store(0, ordering: .relaxed)
    }
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return isUsed
  }
}
