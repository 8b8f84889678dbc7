/// Memory with a queue's journal, which lives as long as this object.
package final class JournalStorage: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: immutable; what the journal's memory holds belongs to the queue's data thread.

  package let journal: QueueJournal
  /// Keeps memory that is not ours.
  private let owner: AnyObject?
  private let start: UnsafeMutableRawPointer

  /// Memory of its own, which ends with the process.
  package init(slotCount: Int, chainLimit: Int) {
    // Large, and never touched as a whole: pages of slots that are not used cost nothing.
    start = .allocate(
      byteCount: QueueJournal.bytes(slotCount: slotCount, chainLimit: chainLimit), alignment: 64)
    start.initializeMemory(as: UInt8.self, repeating: 0, count: QueueJournal.headerBytes)
    owner = nil
    journal = QueueJournal(memory: start, slotCount: slotCount, chainLimit: chainLimit)
  }

  /// Memory of `owner`, which is kept.
  ///
  /// - Parameter slotsWithMemory: nil for all.
  package init(
    memory: UnsafeMutableRawPointer, slotCount: Int, chainLimit: Int, slotsWithMemory: Int? = nil, owner: AnyObject
  ) {
    start = memory
    self.owner = owner
    journal = QueueJournal(
      memory: memory, slotCount: slotCount, chainLimit: chainLimit, slotsWithMemory: slotsWithMemory)
  }

  deinit {
    if owner == nil { start.deallocate() }
  }
}
