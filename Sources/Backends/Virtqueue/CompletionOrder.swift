/// Holds finished chains back until those before them are finished too (VIRTIO_F_IN_ORDER, virtio 1.2, 2.7.9 and 2.8.9).
///
/// A window over the sequence numbers of the chains that the device has: at most as many as the queue is long.
struct CompletionOrder: ~Copyable {
  private struct Entry {
    var ticket = ChainTicket(head: 0, slots: 0)
    var length: UInt32 = 0
    var isFinished = false
  }

  private let entries: UnsafeMutablePointer<Entry>
  private let mask: UInt16
  private var issued: UInt16 = 0
  private var first: UInt16 = 0

  /// Whether the order is kept; else chains are given back as they finish, and nothing here is used.
  let isKept: Bool

  init(size: UInt16, isKept: Bool) {
    self.isKept = isKept
    var capacity = 1
    while isKept, capacity < Int(size) { capacity *= 2 }
    mask = UInt16(capacity - 1)
    entries = .allocate(capacity: capacity)
    entries.initialize(repeating: Entry(), count: capacity)
  }

  deinit { entries.deallocate() }

  /// A number for a chain that was taken.
  mutating func issue() -> UInt16 {
    defer { issued &+= 1 }
    return issued
  }

  /// The chain that was taken last is put back.
  mutating func withdraw() { issued &-= 1 }

  func finish(_ ticket: ChainTicket, _ length: UInt32) {
    entries[Int(ticket.sequence & mask)] = Entry(ticket: ticket, length: length, isFinished: true)
  }

  /// The oldest chain, when it is finished; it leaves the window.
  mutating func takeFirst() -> (ChainTicket, UInt32)? {
    let index = Int(first & mask)
    guard first != issued, entries[index].isFinished else { return nil }
    entries[index].isFinished = false
    first &+= 1
    return (entries[index].ticket, entries[index].length)
  }
}
