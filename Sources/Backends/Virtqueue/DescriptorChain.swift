/// A run of guest memory that a descriptor names. Its addition never overflows.
package struct GuestBuffer {
  package var address: UInt64
  package var length: UInt32

  package init(address: UInt64, length: UInt32) {
    self.address = address
    self.length = length
  }
}

/// Names a chain that the device has towards its virtqueue.
package struct ChainTicket: BitwiseCopyable, Equatable {
  /// Head of a split chain, buffer ID of a packed one.
  package var head: UInt16
  /// Slots of a packed ring that the chain occupies; 1 in a split one.
  package var slots: UInt16
  /// The chain's place in the order of the available ones, where that order is kept.
  package var sequence: UInt16 = 0
  /// The device's number for the chain: a slot of its journal.
  package var slot: UInt32 = 0

  package init(head: UInt16, slots: UInt16) {
    self.head = head
    self.slots = slots
  }
}

/// A chain that an earlier owner of the queue's journal had taken and not answered.
package struct AdoptedChain {
  package var ticket: ChainTicket
  package var readableCount: Int
  package var writableCount: Int
}

/// A checked descriptor chain: readable buffers first, then the writable ones.
///
/// `buffers` is storage of the caller's, `Virtqueue.chainLimit` long; the chain is a copy, so what the driver writes
/// into the table later changes nothing.
package struct DescriptorChain {
  package var ticket = ChainTicket(head: 0, slots: 0)
  package var readableCount = 0
  package var writableCount = 0
  package var readableBytes: UInt64 = 0
  package var writableBytes: UInt64 = 0
  package let buffers: UnsafeMutablePointer<GuestBuffer>

  package init(buffers: UnsafeMutablePointer<GuestBuffer>) {
    self.buffers = buffers
  }

  package mutating func clear() {
    readableCount = 0
    writableCount = 0
    readableBytes = 0
    writableBytes = 0
  }

  /// The first buffer that the device may write to.
  package var writable: UnsafeMutablePointer<GuestBuffer> { buffers + readableCount }
}

/// Walks a list of buffers front to back; steps never leave the list.
package struct ChainCursor {
  private var next: UnsafeMutablePointer<GuestBuffer>
  private var left: Int
  private var offset: UInt32 = 0

  package init(_ first: UnsafeMutablePointer<GuestBuffer>, count: Int) {
    next = first
    left = count
  }

  /// The next run of at most `limit` bytes within one buffer; `nil` at the end.
  package mutating func take(_ limit: Int) -> GuestBuffer? {
    while left > 0 && next.pointee.length == offset {
      next += 1
      left &-= 1
      offset = 0
    }
    guard left > 0, limit > 0 else { return nil }
    let rest = next.pointee.length &- offset
    let length = limit < Int(rest) ? UInt32(truncatingIfNeeded: limit) : rest
    let run = GuestBuffer(address: next.pointee.address &+ UInt64(offset), length: length)
    offset &+= length
    return run
  }

  /// Steps over bytes; stops at the end.
  package mutating func skip(_ bytes: UInt64) {
    var rest = bytes
    while rest > 0, let run = take(Int(truncatingIfNeeded: min(rest, 1 << 31))) { rest &-= UInt64(run.length) }
  }

  /// Copies from the guest's buffers; returns how many bytes there were.
  package mutating func read(
    _ memory: inout GuestMemoryView, to destination: UnsafeMutableRawPointer, count: Int
  ) throws(GuestMemoryFault) -> Int {
    var done = 0
    while done < count, let run = take(count &- done) {
      try memory.copyIn(from: run.address, to: destination + done, count: Int(run.length))
      done &+= Int(run.length)
    }
    return done
  }

  /// Copies into the guest's buffers; returns how many bytes fitted.
  package mutating func write(
    _ memory: inout GuestMemoryView, from origin: UnsafeRawPointer, count: Int
  ) throws(GuestMemoryFault) -> Int {
    var done = 0
    while done < count, let run = take(count &- done) {
      try memory.copyOut(from: origin + done, to: run.address, count: Int(run.length))
      done &+= Int(run.length)
    }
    return done
  }
}
