import TestSupport
import Testing
import Virtqueue

/// The area in which the device of a split ring says which heads it has, under drivers that give a head again too early.
@Suite struct InFlightAreaTests {
  /// A queue whose in-flight area ends where a page does; what lies around the area is filled with a pattern.
  private final class AreaFixture {
    let queue: QueueFixture
    let area: UInt64
    private let page: UInt64 = 0x40000
    private let filler: UInt8 = 0xa5

    init(size: UInt16) {
      queue = QueueFixture(size: size)
      area = page + 4096 - 4 * UInt64(size)
      queue.layout.inFlightArea = area
      queue.domain.memory.pointer(page).initializeMemory(as: UInt8.self, repeating: filler, count: 2 * 4096)
      queue.domain.memory.pointer(area).initializeMemory(as: UInt8.self, repeating: 0, count: 4 * Int(size))
      for index in 0..<Int(size) { queue.descriptor(index, 0x20000, 16, flags: 0) }
    }

    /// Makes a head available as the next one.
    func offer(_ head: UInt16, as index: UInt16) {
      let ring = queue.domain.memory.pointer(queue.layout.driverArea)
      ring.storeBytes(of: head, toByteOffset: 4 + 2 * Int(index % queue.layout.size), as: UInt16.self)
      ring.storeBytes(of: index &+ 1, toByteOffset: 2, as: UInt16.self)
    }

    func word(_ head: UInt16) -> UInt32 {
      queue.domain.memory.pointer(area).load(fromByteOffset: 4 * Int(head), as: UInt32.self)
    }

    /// Whether nothing but the area was written.
    var isIntact: Bool {
      let bytes = UnsafeRawBufferPointer(start: queue.domain.memory.pointer(page), count: 2 * 4096)
      let start = Int(area - page)
      return bytes[..<start].allSatisfy { $0 == filler } && bytes[4096...].allSatisfy { $0 == filler }
    }

    func make() throws -> Virtqueue {
      try Virtqueue(layout: queue.layout, maximumSize: 256, chainLimit: 8, features: [], source: queue.pool)
    }
  }

  @Test func headComesBackOnlyWhenItsAnswerIsPublished() throws {
    let fixture = AreaFixture(size: 1)
    var view = GuestMemoryView(source: fixture.queue.pool)
    var queue = try fixture.make()
    try queue.prepare(invalidations: view.enter())
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 8)
    defer { storage.deallocate() }
    var chain = DescriptorChain(buffers: storage)
    fixture.offer(0, as: 0)
    let isTaken = try queue.next(memory: &view, into: &chain)
    #expect(isTaken)
    #expect(fixture.word(0) == 1)
    queue.pushUsed(chain.ticket, length: 0)
    #expect(fixture.word(0) == 0x10000)
    _ = queue.publish()
    #expect(fixture.word(0) == 0)
    fixture.offer(0, as: 1)
    let isTakenAgain = try queue.next(memory: &view, into: &chain)
    #expect(isTakenAgain)
    queue.pushUsed(chain.ticket, length: 0)
    // The driver has not seen the answer, and gives the head again all the same.
    fixture.offer(0, as: 2)
    #expect(throws: VirtqueueFault.headInUse(0)) { _ = try queue.next(memory: &view, into: &chain) }
    _ = queue.publish()
    #expect(fixture.word(0) == 0)
    #expect(fixture.isIntact)
  }

  /// A driver that watches the in-flight area can give heads again between an answer and its publication.
  @Test(arguments: [1, 2, 4, 8] as [UInt16], UInt64(1)...50)
  func nothingIsWrittenBesidesTheAreaWhateverTheDriverOffers(size: UInt16, seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    let fixture = AreaFixture(size: size)
    var view = GuestMemoryView(source: fixture.queue.pool)
    let invalidations = view.enter()
    defer { view.leave() }
    let storage = UnsafeMutablePointer<GuestBuffer>.allocate(capacity: 8)
    defer { storage.deallocate() }
    for _ in 0..<20 {
      var queue = try fixture.make()
      try queue.prepare(invalidations: invalidations)
      var chain = DescriptorChain(buffers: storage)
      var held: [ChainTicket] = []
      var (offered, unpublished): (UInt16, Int) = (0, 0)
      do throws(VirtqueueFault) {
        for _ in 0..<100 {
          switch UInt8.random(in: 0..<8, using: &random) {
          case 0:
            _ = queue.publish()
            unpublished = 0
          case 1 where !held.isEmpty:
            queue.pushUsed(held.remove(at: Int.random(in: held.indices, using: &random)), length: 0)
            unpublished += 1
          default:
            fixture.offer(UInt16.random(in: 0..<size, using: &random), as: offered)
            offered &+= 1
            if try queue.next(memory: &view, into: &chain) {
              // Answered at once, or kept.
              if Bool.random(using: &random) {
                queue.pushUsed(chain.ticket, length: 0)
                unpublished += 1
              } else {
                held.append(chain.ticket)
              }
            }
          }
          #expect(unpublished + held.count <= Int(size), "size \(size), seed \(seed)")
        }
      } catch {
        #expect(!error.message.isEmpty)
      }
      _ = queue.publish()
      #expect(fixture.isIntact, "size \(size), seed \(seed)")
    }
  }
}
