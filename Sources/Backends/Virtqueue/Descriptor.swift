import Synchronization

/// A snapshot of a 16-byte table entry (virtio 1.2, 2.7.5), read once, so that what is checked is what is used.
struct Descriptor {
  var address: UInt64
  var length: UInt32
  var flags: UInt16
  var next: UInt16

  var hasNext: Bool { flags & 1 != 0 }  // VIRTQ_DESC_F_NEXT
  var isWritable: Bool { flags & 2 != 0 }  // VIRTQ_DESC_F_WRITE
  var isIndirect: Bool { flags & 4 != 0 }  // VIRTQ_DESC_F_INDIRECT

  /// - Parameter entry: 16-byte aligned and mapped: an entry of a ring part or of the copied indirect table.
  init(copying entry: UnsafeMutableRawPointer) {
    // Two 64-bit loads: relaxed atomics, since the driver may write at the same time.
    let words = entry.assumingMemoryBound(to: Atomic<UInt64>.self)
    address = UInt64(littleEndian: words[0].load(ordering: .relaxed))
    let rest = UInt64(littleEndian: words[1].load(ordering: .relaxed))
    length = UInt32(truncatingIfNeeded: rest)
    flags = UInt16(truncatingIfNeeded: rest >> 32)
    next = UInt16(truncatingIfNeeded: rest >> 48)
  }
}

/// Loads and stores of the 16-bit words that both sides of a ring use.
enum RingWord {
  /// - Parameter offset: even, and inside the mapped ring part.
  @inline(__always)
  static func acquire(_ start: UnsafeMutableRawPointer, _ offset: Int) -> UInt16 {
    UInt16(
      littleEndian: (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .acquiring))
  }

  @inline(__always)
  static func load(_ start: UnsafeMutableRawPointer, _ offset: Int) -> UInt16 {
    UInt16(littleEndian: (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .relaxed))
  }

  @inline(__always)
  static func store(_ value: UInt16, _ start: UnsafeMutableRawPointer, _ offset: Int) {
    (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(
      value.littleEndian, ordering: .relaxed)
  }

  @inline(__always)
  static func release(_ value: UInt16, _ start: UnsafeMutableRawPointer, _ offset: Int) {
    (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(
      value.littleEndian, ordering: .releasing)
  }
}
