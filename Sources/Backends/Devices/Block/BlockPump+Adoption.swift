import Virtqueue

/// Chains that an earlier owner of the queue's journal had and did not answer: an earlier backend, or an earlier process.
extension BlockPump {
  /// Takes over the chains that an earlier owner of the journal left.
  mutating func adopt() throws(VirtqueueFault) {
    for chain in try queue.adopt() {
      let slot = Int(chain.ticket.slot)
      guard slab.take(slot, at: now) else { throw .badLayout }
      slab.records[slot] = BlockOperationRecord(
        life: life, ticket: chain.ticket, readableCount: chain.readableCount, writableCount: chain.writableCount)
      adopted.append(slot)
      tally.adopted &+= 1
    }
  }

  /// Starts them again. None of them was answered, so they have no order among each other, and nothing new is taken before.
  mutating func startAdopted() {
    guard !adopted.isEmpty, orphans == 0, heldResult == 0 else { return }
    while let slot = adopted.first {
      let record = slab.records[slot]
      var chain = DescriptorChain(buffers: slab.buffers(slot))
      chain.ticket = record.ticket
      chain.readableCount = record.readableCount
      chain.writableCount = record.writableCount
      for index in 0..<record.readableCount { chain.readableBytes &+= UInt64(chain.buffers[index].length) }
      for index in 0..<record.writableCount { chain.writableBytes &+= UInt64(chain.writable[index].length) }
      // The request was checked when it was taken first.
      guard let hasRoom = try? begin(slot, chain) else {
        // It has no place for a status: its owner died on the way to saying so.
        queue.pushUsed(record.ticket, length: 0)
        releaseMeans(slot)
        adopted.removeFirst()
        continue
      }
      guard hasRoom else { break }
      adopted.removeFirst()
    }
    submit()
  }
}
