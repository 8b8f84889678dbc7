import Devices
import EventLoop
import Glibc
import HostMemory

/// Completions of an image's requests that come by another way than the kernel's ring: failures that are known at once, and what a `StorageWorker`
/// does. Confined to the queue's data thread.
struct SideCompletions: ~Copyable {
  private let image: RawImage
  /// Of the image; the engine's.
  private let descriptor: Int32
  /// The engine's eventfd, signalled for each of them.
  private let wakeUp: Int32
  private let table: UntouchedMemory
  private let early: UnsafeMutablePointer<EngineCompletion>
  private(set) var earlyCount = 0
  private var worker: StorageWorker?
  private(set) var workerOutstanding = 0

  /// - Parameter depth: requests at a time at most.
  init(image: RawImage, descriptor: Int32, depth: Int, wakeUp: Int32) {
    self.image = image
    self.descriptor = descriptor
    self.wakeUp = wakeUp
    var table = UntouchedMemory(bytes: UntouchedMemory.bytes(EngineCompletion.self, depth))
    early = table.take(EngineCompletion.self, depth)
    self.table = table
  }

  mutating func fail(_ tag: UInt32, _ result: Int) {
    early[earlyCount] = EngineCompletion(tag: tag, result: result)
    earlyCount &+= 1
    EventDescriptor.signal(wakeUp)
  }

  mutating func startOnWorker(_ request: EngineRequest) {
    if worker == nil { worker = try? StorageWorker(image: image, descriptor: descriptor, wakeUp: wakeUp) }
    guard let worker else { return fail(request.tag, -Int(EAGAIN)) }
    workerOutstanding &+= 1
    worker.start(request)
  }

  /// Takes those that are there, at most `capacity`.
  mutating func take(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
    var count = 0
    while earlyCount > 0, count < capacity {
      earlyCount &-= 1
      completions[count] = early[earlyCount]
      count &+= 1
    }
    if workerOutstanding > 0, count < capacity, let worker {
      let taken = worker.take(into: completions + count, capacity: capacity &- count)
      workerOutstanding &-= taken
      count &+= taken
    }
    return count
  }

  /// Waits for what the worker does, and ends it.
  func stop() { worker?.stop() }
}
