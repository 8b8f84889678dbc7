import CThreadSanitizer
import EventLoop
import Glibc
package import SimulatedXen
package import Transport
package import Virtqueue
package import Xen

/// Numbers from a seed: the same on every run, so that a failure that prints its seed can be repeated.
package struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64

  package init(seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }

  /// xorshift64*
  package mutating func next() -> UInt64 {
    state ^= state >> 12
    state ^= state << 25
    state ^= state >> 27
    return state &* 0x2545_f491_4f6c_dd1d
  }
}

/// Whether the tests know the standard library's locks, see CThreadSanitizer.c.
package let knowsLocks = cthreadsanitizer_present() == 1

/// A folder that is gone after the test.
package final class TemporaryFolder {
  package let path: String

  package init() {
    var template = Array("/tmp/vxd-test-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { fatalError("no temporary folder: \(Errno.last)") }
    path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  deinit {
    if let directory = opendir(path) {
      while let entry = readdir(directory) {
        let name = withUnsafePointer(to: &entry.pointee.d_name) {
          $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
        }
        unlink(path + "/" + name)
      }
      closedir(directory)
    }
    rmdir(path)
  }

  /// A sparse file.
  package func file(_ name: String, bytes: Int) -> String {
    let file = path + "/" + name
    let descriptor = OwnedDescriptor(adopting: open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0o600))
    guard ftruncate(descriptor.raw, off_t(bytes)) == 0 else { fatalError("ftruncate: \(Errno.last)") }
    return file
  }

  /// A file with a text.
  package func file(_ name: String, text: String) -> String {
    let file = path + "/" + name
    let descriptor = OwnedDescriptor(adopting: open(file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600))
    var bytes = Array(text.utf8)
    guard write(descriptor.raw, &bytes, bytes.count) == bytes.count else { fatalError("write: \(Errno.last)") }
    return file
  }

  /// Names in a folder, without those that begin with a dot.
  package static func names(_ path: String) -> [String] {
    namesInFolder(path)
  }
}

/// Whether everything is several times slower than usual: under a sanitizer.
package var testsAreSlow: Bool { getenv("VXD_TESTS_ARE_SLOW") != nil }

/// Polls a condition that another thread makes true; false when it does not within the limit. The limit is for what never comes: it is long
/// enough that no busy machine reaches it.
package func eventually(seconds: Int = 30, _ condition: () -> Bool) -> Bool {
  let deadline = EventLoop.now() + UInt64(seconds) * 1_000_000_000
  while EventLoop.now() < deadline {
    if condition() { return true }
    usleep(2000)
  }
  return condition()
}

/// A simulated guest's memory behind a pool, and one split virtqueue in it whose rings a test writes as it likes.
package final class QueueFixture {
  package let domain: SimulatedDomain
  package let pool: ForeignMappingPool
  package var layout = QueueLayout()

  package init(size: UInt16 = 8, memoryBytes: Int = 1 << 20, bucketShift: Int = 14) {
    guard let domain = try? SimulatedDomain(identifier: 7, memoryBytes: memoryBytes) else {
      fatalError("no simulated domain")
    }
    self.domain = domain
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    guard let handle = try? hypervisor.open(7) else { fatalError("no handle") }
    pool = ForeignMappingPool(guest: handle, bucketShift: bucketShift, budgetBytes: 1 << 18)
    layout.size = size
    layout.descriptorArea = 0x1000
    layout.driverArea = 0x9000
    layout.deviceArea = 0xb000
  }

  package func descriptor(_ index: Int, _ address: UInt64, _ length: UInt32, flags: UInt16, next: UInt16 = 0) {
    descriptor(at: layout.descriptorArea + UInt64(index) * 16, address, length, flags: flags, next: next)
  }

  package func descriptor(at place: UInt64, _ address: UInt64, _ length: UInt32, flags: UInt16, next: UInt16 = 0) {
    domain.memory.putDescriptor(at: place, address, length, flags, next)
  }

  /// Publishes heads, from the ring's start on.
  package func publish(_ heads: [UInt16], index: UInt16? = nil) {
    let ring = domain.memory.pointer(layout.driverArea)
    for (position, head) in heads.enumerated() {
      ring.storeBytes(of: head, toByteOffset: 4 + 2 * position, as: UInt16.self)
    }
    ring.storeBytes(of: index ?? UInt16(heads.count), toByteOffset: 2, as: UInt16.self)
  }
}

/// A device that records what its transport tells it.
package final class RecordingDevice: VirtioDevice, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: tests call its transport from one thread.
  package let deviceID: UInt32 = 2
  package let offeredFeatures: FeatureBits = [.version1, .eventIndex, .indirectDescriptors, .ringReset, .ringPacked]
  package let queueSizes: [UInt16] = [256, 64]
  package let configuration = ConfigurationSpace([1, 2, 3, 4, 5, 6, 7, 8])
  package private(set) var activations: [[QueueLayout?]] = []
  package private(set) var notified: [Int] = []
  package private(set) var resets = 0
  package private(set) var writes: [(Int, [UInt8])] = []

  package init() {}

  package func accepts(_ features: FeatureBits) -> Bool { true }
  package func activate(features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool) {
    activations.append(layouts)
  }
  package private(set) var queueResets: [Int] = []
  package private(set) var enabled: [Int] = []
  package func resetQueue(_ queue: Int) { queueResets.append(queue) }
  package func enableQueue(_ queue: Int, layout: QueueLayout) { enabled.append(queue) }
  package func notify(queue: Int) { notified.append(queue) }
  package func reset() { resets += 1 }
  package func configurationWritten(offset: Int, bytes: [UInt8]) { writes.append((offset, bytes)) }
}

/// An interrupt line that records its levels.
package final class RecordingLine: InterruptLine, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: tests drive it from one thread.
  package let isLevel: Bool
  package private(set) var levels: [Bool] = []

  package init(isLevel: Bool = true) { self.isLevel = isLevel }

  package func set(_ high: Bool) { levels.append(high) }
}
