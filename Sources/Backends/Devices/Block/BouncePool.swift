import HostMemory

/// Aligned buffers for data on its way between guest memory and the store, taken and given back without allocation.
///
/// Two sizes: a page for the small requests that most are, 64 KiB pieces for the others. Last in, first out, so that the
/// memory in use stays in the processor's cache. Bounded: when nothing is left, requests wait in their queue.
struct BouncePool: ~Copyable {
  static let smallBytes = 4096
  static let largeBytes = 65536

  private let pages: UntouchedMemory
  private let memory: UnsafeMutableRawPointer
  private let free: UnsafeMutablePointer<UInt32>
  private let smallCount: Int
  private let largeCount: Int
  private var freeSmall: Int
  private var freeLarge: Int

  init(smallCount: Int, largeCount: Int) {
    self.smallCount = smallCount
    self.largeCount = largeCount
    pages = UntouchedMemory(
      bytes: smallCount * Self.smallBytes + largeCount * Self.largeBytes, dense: largeCount * Self.largeBytes)
    memory = pages.start
    free = .allocate(capacity: smallCount + largeCount)
    freeSmall = smallCount
    freeLarge = largeCount
    for index in 0..<smallCount { free[index] = UInt32(smallCount - 1 - index) }
    for index in 0..<largeCount { free[smallCount + index] = UInt32(smallCount + largeCount - 1 - index) }
  }

  deinit { free.deallocate() }

  /// Bytes of all buffers.
  var capacity: Int { smallCount * Self.smallBytes + largeCount * Self.largeBytes }

  /// The small buffers that are taken first: as many as are in use at a depth of 32.
  var hottest: (start: UnsafeMutableRawPointer, bytes: Int) { (memory, min(smallCount, 32) * Self.smallBytes) }

  func start(_ buffer: UInt32) -> UnsafeMutableRawPointer {
    let index = Int(buffer)
    return index < smallCount
      ? memory + index &* Self.smallBytes
      : memory + (smallCount &* Self.smallBytes &+ (index &- smallCount) &* Self.largeBytes)
  }

  func bytes(_ buffer: UInt32) -> Int { Int(buffer) < smallCount ? Self.smallBytes : Self.largeBytes }

  /// A buffer for `bytes` of data, or for as many as one holds; nil when none is left.
  mutating func take(bytes: UInt64) -> UInt32? {
    if bytes <= UInt64(Self.smallBytes), freeSmall > 0 {
      freeSmall &-= 1
      return free[freeSmall]
    }
    guard freeLarge > 0 else { return nil }
    freeLarge &-= 1
    return free[smallCount &+ freeLarge]
  }

  mutating func give(_ buffer: UInt32) {
    if Int(buffer) < smallCount {
      free[freeSmall] = buffer
      freeSmall &+= 1
    } else {
      free[smallCount &+ freeLarge] = buffer
      freeLarge &+= 1
    }
  }
}
