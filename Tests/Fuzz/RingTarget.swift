import SimulatedXen
import TestSupport
import Virtqueue

/// A virtqueue over rings of any content: the input is the rings' memory, and says between takes what the device uses.
enum RingTarget {
  // Touched by libFuzzer's one thread.
  nonisolated(unsafe) private static let fixture = QueueFixture(size: 16, memoryBytes: 1 << 17, bucketShift: 14)
  nonisolated(unsafe) private static let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 32)
  private static let memoryBytes = 1 << 17

  static let split: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { run($0, []) }
  static let packed: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { run($0, .ringPacked) }

  private static func run(_ bytes: UnsafeBufferPointer<UInt8>, _ format: FeatureBits) {
    var input = Input(bytes)
    let choice = input.byte()
    var features = format
    if choice & 1 != 0 { features.insert(.indirectDescriptors) }
    if choice & 2 != 0 { features.insert(.eventIndex) }
    if choice & 4 != 0 { features.insert(.inOrder) }
    var layout = fixture.layout
    layout.size = format.isEmpty ? 16 : UInt16(choice >> 3) + 1
    if format.isEmpty {
      layout.nextAvailable = UInt16(input.byte() & 1) &* 0xfff8
      layout.nextUsed = layout.nextAvailable
    }
    let uses = input.number(bytes: 4)
    fill(input.rest(), layout)
    var view = GuestMemoryView(source: fixture.pool)
    let invalidations = view.enter()
    defer { view.leave() }
    do throws(VirtqueueFault) {
      var queue = try Virtqueue(
        layout: layout, maximumSize: 256, chainLimit: 32, features: features, source: fixture.pool)
      try queue.prepare(invalidations: invalidations)
      var chain = DescriptorChain(buffers: storage)
      var kept: [ChainTicket] = []
      for step in 0..<48 {
        guard try queue.next(memory: &view, into: &chain) else { break }
        check(chain, &view)
        switch uses >> UInt64(step % 32) & 3 {
        case 0: kept.append(chain.ticket)
        case 1:
          queue.putBack(chain.ticket)
          precondition(queue.hasPending(), "a chain that was put back does not wait")
          consume(queue.enableNotifications(behind: queue.pendingCount()))
          return
        default: queue.pushUsed(chain.ticket, length: UInt32(truncatingIfNeeded: uses))
        }
        queue.disableNotifications()
        _ = queue.publish()
      }
      for ticket in kept.reversed() { queue.pushUsed(ticket, length: 1) }
      _ = queue.publish()
      _ = queue.enableNotifications()
    } catch {
      precondition(!error.message.isEmpty)
    }
  }

  private static func check(_ chain: DescriptorChain, _ view: inout GuestMemoryView) {
    precondition(chain.readableCount + chain.writableCount <= 32)
    var cursor = ChainCursor(chain.buffers, count: chain.readableCount)
    var bytes: UInt64 = 0
    while let run = cursor.take(1 << 20) {
      bytes += UInt64(run.length)
      guard bytes < 1 << 24 else { return }
    }
    precondition(bytes == chain.readableBytes)
    // A header behind a few bytes, as pumps read it, wherever the driver says that it lies.
    cursor = ChainCursor(chain.buffers, count: chain.readableCount)
    cursor.skip(3)
    let got = withUnsafeTemporaryAllocation(byteCount: 64, alignment: 1) { place in
      place.baseAddress.flatMap { try? cursor.read(&view, to: $0, count: 64) }
    }
    if let got { precondition(got == min(64, max(3, bytes) - 3), "not all that there was") }
  }

  /// Descriptors first, then the driver's area, then what indirect tables may be.
  private static func fill(_ bytes: UnsafeBufferPointer<UInt8>, _ layout: QueueLayout) {
    let memory = fixture.domain.memory
    var rest = bytes[...]
    for (address, room) in [(layout.descriptorArea, 512), (layout.driverArea, 64), (UInt64(0x10000), 1024)] {
      let start = memory.pointer(address)
      start.initializeMemory(as: UInt8.self, repeating: 0, count: room)
      for (index, byte) in rest.prefix(room).enumerated() {
        start.storeBytes(of: byte, toByteOffset: index, as: UInt8.self)
      }
      rest = rest.dropFirst(room)
    }
  }
}
