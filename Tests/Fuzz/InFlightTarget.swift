import TestSupport
import Virtqueue

/// A split ring with an in-flight area, as Xenbus devices have it: small rings, and a driver that makes heads available again at any
/// moment. What the device says in the area is compared with a model, and what lies around the area must stay as it is.
enum InFlightTarget {
  // Touched by libFuzzer's one thread.
  nonisolated(unsafe) private static let fixture = QueueFixture(size: 8, memoryBytes: 1 << 17, bucketShift: 14)
  nonisolated(unsafe) private static let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 8)
  private static let page: UInt64 = 0x10000
  private static let filler: UInt8 = 0xa5

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    var layout = fixture.layout
    layout.size = 1 << UInt16(input.byte() & 3)
    layout.inFlightArea = page + 4096 - 4 * UInt64(layout.size)
    // Positions near the end of their range too.
    layout.nextAvailable = input.byte() & 1 == 0 ? 0 : 0xfffc
    layout.nextUsed = layout.nextAvailable
    let choice = input.byte()
    var features: FeatureBits = []
    if choice & 1 != 0 { features.insert(.eventIndex) }
    if choice & 2 != 0 { features.insert(.inOrder) }
    prepareMemory(layout)
    var view = GuestMemoryView(source: fixture.pool)
    let invalidations = view.enter()
    defer { view.leave() }
    do throws(VirtqueueFault) {
      var queue = try Virtqueue(
        layout: layout, maximumSize: 256, chainLimit: 8, features: features, source: fixture.pool)
      try queue.prepare(invalidations: invalidations)
      var model = Model(size: layout.size, position: layout.nextUsed, answersInOrder: choice & 2 != 0)
      try serve(&queue, &view, &model, &input, layout)
      _ = queue.publish()
      model.publish()
      check(model, layout)
    } catch {
      precondition(!error.message.isEmpty)
      check(nil, layout)
    }
  }

  private static func serve(
    _ queue: inout Virtqueue, _ view: inout GuestMemoryView, _ model: inout Model, _ input: inout Input,
    _ layout: QueueLayout
  ) throws(VirtqueueFault) {
    var chain = DescriptorChain(buffers: storage)
    var held: [ChainTicket] = []
    var offered = layout.nextAvailable
    for _ in 0..<64 where !input.isEmpty {
      let action = input.byte()
      switch action & 7 {
      case 0:
        _ = queue.publish()
        model.publish()
      case 1 where !held.isEmpty:
        let ticket = held.remove(at: Int(action >> 3) % held.count)
        queue.pushUsed(ticket, length: UInt32(action))
        model.answer(ticket.head)
      case 2:
        queue.disableNotifications()
        consume(queue.enableNotifications(behind: queue.hasPending() ? queue.pendingCount() : 0))
      default:
        let head = UInt16(action >> 3) & 7
        let ring = fixture.domain.memory.pointer(layout.driverArea)
        ring.storeBytes(of: head, toByteOffset: 4 + 2 * Int(offered % layout.size), as: UInt16.self)
        ring.storeBytes(of: offered &+ 1, toByteOffset: 2, as: UInt16.self)
        offered &+= 1
        guard try queue.next(memory: &view, into: &chain) else { continue }
        precondition(chain.ticket.head < layout.size)
        if action & 7 == 3 {
          queue.putBack(chain.ticket)
          offered &-= 1
          ring.storeBytes(of: offered, toByteOffset: 2, as: UInt16.self)
        } else {
          model.take(chain.ticket.head)
          held.append(chain.ticket)
        }
      }
      check(model, layout)
    }
  }

  /// What the area must say.
  private struct Model {
    private(set) var words: [UInt32]
    private var unpublished: [UInt16] = []
    private var taken: [UInt16] = []
    private var finished: Set<UInt16> = []
    private var position: UInt16
    private let answersInOrder: Bool

    init(size: UInt16, position: UInt16, answersInOrder: Bool) {
      words = Array(repeating: 0, count: Int(size))
      self.position = position
      self.answersInOrder = answersInOrder
    }

    mutating func take(_ head: UInt16) {
      precondition(words[Int(head)] == 0, "a head is taken while the device has it")
      words[Int(head)] = 1
      taken.append(head)
    }

    mutating func answer(_ head: UInt16) {
      guard answersInOrder else { return show(head) }
      finished.insert(head)
      while let first = taken.first, finished.contains(first) {
        finished.remove(first)
        taken.removeFirst()
        show(first)
      }
    }

    private mutating func show(_ head: UInt16) {
      words[Int(head)] = 0x10000 | UInt32(position)
      position &+= 1
      unpublished.append(head)
      precondition(unpublished.count <= words.count, "more answers than the ring has entries")
    }

    mutating func publish() {
      for head in unpublished { words[Int(head)] = 0 }
      unpublished = []
    }
  }

  private static func prepareMemory(_ layout: QueueLayout) {
    let memory = fixture.domain.memory
    memory.pointer(page).initializeMemory(as: UInt8.self, repeating: filler, count: 8192)
    guard let area = layout.inFlightArea else { return }
    memory.pointer(area).initializeMemory(as: UInt8.self, repeating: 0, count: layout.inFlightBytes)
    let ring = memory.pointer(layout.driverArea)
    ring.initializeMemory(as: UInt8.self, repeating: 0, count: 64)
    ring.storeBytes(of: layout.nextAvailable, toByteOffset: 2, as: UInt16.self)
    for index in 0..<8 { fixture.descriptor(index, 0x8000, 16, flags: 0) }
  }

  private static func check(_ model: Model?, _ layout: QueueLayout) {
    guard let area = layout.inFlightArea else { return }
    let memory = fixture.domain.memory
    let around = UnsafeRawBufferPointer(start: memory.pointer(page), count: 8192)
    let start = Int(area - page)
    precondition(around[..<start].allSatisfy { $0 == filler }, "memory before the area was written")
    precondition(around[4096...].allSatisfy { $0 == filler }, "memory behind the area was written")
    guard let model else { return }
    let words = memory.pointer(area)
    for (head, word) in model.words.enumerated() {
      precondition(words.load(fromByteOffset: 4 * head, as: UInt32.self) == word, "the area does not say what is so")
    }
  }
}
