import CLinux
import Devices
import Engines
import EventLoop
import Glibc
import TestSupport
import Testing

/// Both engines that bring requests on images to the kernel, side by side.
@Suite(.serialized) struct ImageEngineTests {
  private let folder = TemporaryFolder()
  private static let depth = 32
  private static let bytes = 4 << 20

  enum Way: String, CaseIterable, Sendable {
    case libaio
    case ioUring = "io_uring"

    /// Where the kernel permits no io_uring, its part is left out.
    static let possible = clinux_probe_ring() == 0 ? allCases : [.libaio]
  }

  private func engine(_ way: Way, _ path: String, direct: Bool = true) throws -> any BlockEngine {
    let image = try RawImage(path: path, holder: "a", readOnly: false, discard: true, direct: direct)
    switch way {
    case .libaio: return try AIOEngine(image: image, depth: Self.depth)
    case .ioUring: return try IOUringEngine(image: image, depth: Self.depth)
    }
  }

  /// Memory for the data of each tag, in pieces of which some are registered.
  private final class Buffers {
    static let each = 128 << 10
    let start = UnsafeMutableRawPointer.allocate(byteCount: depth * each, alignment: 4096)
    let vectors = UnsafeMutablePointer<DataVector>.allocate(capacity: depth * 8)
    deinit {
      start.deallocate()
      vectors.deallocate()
    }
    func data(_ tag: Int) -> UnsafeMutableRawPointer { start + tag * Self.each }
  }

  /// What an engine was asked, and what a write leaves.
  private struct Asked {
    var operation: BlockOperation
    var range: Range<Int>
  }

  /// Takes what is done, at least one, checks it, and says which tags are free.
  private func harvest(
    _ engine: any BlockEngine, _ asked: inout [Int: Asked], _ buffers: Buffers, _ model: inout [UInt8], _ seed: UInt64
  ) throws -> [Int] {
    var done: [Int] = []
    var completions = [EngineCompletion](repeating: .init(tag: 0, result: 0), count: 5)
    while done.isEmpty {
      let count = engine.reap(into: &completions, capacity: completions.count)
      if count == 0 { engine.waitForCompletion() }
      for completion in completions[..<count] {
        let tag = Int(completion.tag)
        let found = asked.removeValue(forKey: tag)
        let request = try #require(found, "seed \(seed): tag \(tag) came twice")
        done.append(tag)
        switch request.operation {
        case .read:
          #expect(completion.result == request.range.count, "seed \(seed)")
          let data = UnsafeRawBufferPointer(start: buffers.data(tag), count: request.range.count)
          #expect(data.elementsEqual(model[request.range]), "seed \(seed): \(request.range)")
        case .write: #expect(completion.result == request.range.count, "seed \(seed)")
        default: #expect(completion.result == 0, "seed \(seed): \(request.operation)")
        }
      }
    }
    return done
  }

  /// Any requests, as many at a time as there are tags, none of which meets another one under way: the image is what a model says.
  @Test(arguments: Way.possible, [1, 2, 3, 4, 5, 6] as [UInt64])
  func anyRequestsLeaveWhatTheyShould(way: Way, seed: UInt64) throws {
    let direct = seed > 2
    var random = SeededGenerator(seed: seed)
    let path = folder.file("disk-\(way)-\(direct)-\(seed)", bytes: Self.bytes)
    let engine = try engine(way, path, direct: direct)
    defer { engine.close() }
    let buffers = Buffers()
    if seed % 2 == 1 { engine.register(buffers.start, bytes: Self.depth / 2 * Buffers.each) }
    var model = [UInt8](repeating: 0, count: Self.bytes)
    var free = Array(0..<Self.depth)
    var asked: [Int: Asked] = [:]
    for _ in 0..<100 {
      var batch: [EngineRequest] = []
      while !free.isEmpty, batch.count < 1 + Int(random.next() % 8) {
        // Each tag has a share of the disk to itself.
        let tag = free.removeLast()
        let share = Self.bytes / Self.depth
        let first = Int(random.next() % 24) * 4096
        let place = tag * share + first
        let length = (1 + Int(random.next() % UInt64((share - first) / 4096))) * 4096
        let range = place..<place + length
        let operations: [BlockOperation] = [.read, .read, .write, .write, .write, .flush, .writeZeroes, .discard]
        let operation = operations[Int(random.next() % UInt64(operations.count))]
        let vectors = buffers.vectors + tag * 8
        var count = 0
        var done = 0
        while done < length {
          let rest = length - done
          let piece = count == 7 ? rest : min(rest, (1 + Int(random.next() % 16)) * 4096)
          vectors[count] = DataVector(start: buffers.data(tag) + done, length: piece)
          done += piece
          count += 1
        }
        var request = EngineRequest(
          operation: operation, tag: UInt32(tag), offset: UInt64(place), length: UInt64(length), vectors: vectors,
          vectorCount: operation == .read || operation == .write ? count : 0)
        switch operation {
        case .write:
          request.isDurable = random.next() % 4 == 0
          let byte = UInt8(truncatingIfNeeded: random.next())
          memset(buffers.data(tag), Int32(byte), length)
          for index in range { model[index] = byte }
        case .writeZeroes, .discard: for index in range { model[index] = 0 }
        case .read: memset(buffers.data(tag), 0xee, length)
        case .flush, .secureErase: break
        }
        asked[tag] = Asked(operation: operation, range: range)
        batch.append(request)
      }
      engine.submit(&batch, count: batch.count)
      if free.isEmpty || random.next() % 2 == 0 { free += try harvest(engine, &asked, buffers, &model, seed) }
    }
    while !asked.isEmpty { free += try harvest(engine, &asked, buffers, &model, seed) }
    #expect(Set(free) == Set(0..<Self.depth))
    let descriptor = OwnedDescriptor(adopting: open(path, O_RDONLY | O_CLOEXEC))
    var content = [UInt8](repeating: 0xee, count: Self.bytes)
    #expect(pread(descriptor.raw, &content, content.count, 0) == content.count)
    let wrong = content.indices.first { content[$0] != model[$0] }
    #expect(wrong == nil, "seed \(seed): the first byte that is not what the model has")
  }

  /// A disk that is detached can be attached elsewhere at once: the kernel keeps neither lock nor file behind `close`.
  @Test(arguments: Way.possible) func imageIsFreeOnceItsEngineIsClosed(way: Way) throws {
    let path = folder.file("disk", bytes: 1 << 20)
    for _ in 0..<20 {
      do {
        let engine = try engine(way, path)
        let buffers = Buffers()
        engine.register(buffers.start, bytes: 4096)
        buffers.vectors[0] = DataVector(start: buffers.start, length: 4096)
        var request = EngineRequest(operation: .read, tag: 3, offset: 0, vectors: buffers.vectors, vectorCount: 1)
        engine.submit(&request, count: 1)
        var completion = EngineCompletion(tag: 0, result: 0)
        while engine.reap(into: &completion, capacity: 1) == 0 { engine.waitForCompletion() }
        #expect(completion.tag == 3 && completion.result == 4096)
        engine.close()
      }
      let other = OwnedDescriptor(adopting: open(path, O_RDWR | O_CLOEXEC))
      // A program that another test starts holds what was open for a moment, between its fork and its exec.
      #expect(eventually { clinux_lock_description(other.raw, 1) == 0 })
    }
  }

  /// What a store says is the request's result, other than what only means that the kernel would have had to wait.
  @Test(arguments: Way.possible) func readBehindTheEndIsShortAndAWriteThatFailsSaysWhy(way: Way) throws {
    let path = folder.file("disk", bytes: 1 << 20)
    let engine = try engine(way, path)
    defer { engine.close() }
    let buffers = Buffers()
    #expect(truncate(path, 8192) == 0)
    func ask(_ operation: BlockOperation, _ offset: UInt64, _ address: Int, _ length: Int) -> Int {
      buffers.vectors[0] = DataVector(start: buffers.start + address, length: length)
      var request = EngineRequest(
        operation: operation, tag: 0, offset: offset, length: UInt64(length), vectors: buffers.vectors, vectorCount: 1)
      engine.submit(&request, count: 1)
      var completion = EngineCompletion(tag: 9, result: 0)
      while engine.reap(into: &completion, capacity: 1) == 0 { engine.waitForCompletion() }
      #expect(completion.tag == 0)
      return completion.result
    }
    #expect(ask(.read, 4096, 0, 8192) == 4096)
    #expect(ask(.read, 0, 0, 8192) == 8192)
    #expect(ask(.read, 1 << 20, 0, 4096) == 0)
    #expect(ask(.write, 0, 1, 4096) == -Int(EINVAL))  // memory that direct I/O does not take
  }
}
