import Synchronization

/// A snapshot of a 16-byte descriptor of either format (virtio 1.2, 2.7.5 and 2.8.13), read once, so that what is checked is what is used.
struct Descriptor {
  var address: UInt64
  var length: UInt32
  var flags: UInt16
  /// Split format: the entry that follows where NEXT is set.
  var next: UInt16
  /// Packed format: the driver's name for the chain.
  var bufferID: UInt16

  var hasNext: Bool { flags & 1 != 0 }  // VIRTQ_DESC_F_NEXT
  var isWritable: Bool { flags & 2 != 0 }  // VIRTQ_DESC_F_WRITE
  var isIndirect: Bool { flags & 4 != 0 }  // VIRTQ_DESC_F_INDIRECT

  /// - Parameter entry: 16-byte aligned and mapped: an entry of a ring part or of the copied indirect table.
  init(copying entry: UnsafeMutableRawPointer, packed: Bool = false) {
    // Two 64-bit loads: relaxed atomics, since the driver may write at the same time.
    let words = entry.assumingMemoryBound(to: Atomic<UInt64>.self)
    address = UInt64(littleEndian: words[0].load(ordering: .relaxed))
    let rest = UInt64(littleEndian: words[1].load(ordering: .relaxed))
    length = UInt32(truncatingIfNeeded: rest)
    // The last two fields are flags and next in the split format, id and flags in the packed one.
    let (third, fourth) = (UInt16(truncatingIfNeeded: rest >> 32), UInt16(truncatingIfNeeded: rest >> 48))
    (flags, next) = packed ? (fourth, 0) : (third, fourth)
    bufferID = third
  }
}

/// Loads and stores of the 16-bit words that both sides of a ring use.
enum RingWord {
  /// - Parameter offset: even, and inside the mapped ring part.
  static func acquire(_ start: UnsafeMutableRawPointer, _ offset: Int) -> UInt16 {
    UInt16(
      littleEndian: (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .acquiring))
  }

  static func load(_ start: UnsafeMutableRawPointer, _ offset: Int) -> UInt16 {
    UInt16(littleEndian: (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .relaxed))
  }

  static func store(_ value: UInt16, _ start: UnsafeMutableRawPointer, _ offset: Int) {
    (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(
      value.littleEndian, ordering: .relaxed)
  }

  static func release(_ value: UInt16, _ start: UnsafeMutableRawPointer, _ offset: Int) {
    (start + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(
      value.littleEndian, ordering: .releasing)
  }
}
