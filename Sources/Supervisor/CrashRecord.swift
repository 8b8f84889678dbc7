import CLinux
import ControlAPI
package import EventLoop
import Glibc
import Lifecycle
import Synchronization
import Xen

/// Who was at work when vxd died by a fault, over the last deaths: two files that outlive the process. `PATH.death` is mapped and written by the
/// signal handler of the dying process (`clinux_record_death`); `PATH.fuse` holds what follows of it for the next ones (`CrashFuse`).
///
/// A daemon that is killed, or ends in good order, adds nothing.
package final class CrashRecord: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the mapping never changes and is read in `init` alone; the fuse is under a lock.

  /// A death by a signal, in a thread that worked for a device, a guest (by its domain) or neither.
  package struct Death: Equatable, Sendable {
    package var signal: Int32
    package var label: String
  }

  /// Milliseconds of life after which nobody is under suspicion any more.
  static let healthyAfter: Milliseconds = 600_000
  private static let bytes = 4096
  private static let labelBytes = 64

  /// How the daemon before this one died; nil when it did not.
  package let lastDeath: Death?
  private let record: UnsafeMutableRawPointer
  private let fusePath: String
  private let fuse: Mutex<CrashFuse<String>>

  /// - Parameter path: of the files, without their endings; in a folder that ends with the host.
  package init(path: String) throws(Errno) {
    fusePath = path + ".fuse"
    let descriptor = OwnedDescriptor(
      adopting: try retrying { open(path + ".death", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o600) })
    // All of it now: without room the handler's store would be answered with another signal.
    let result = posix_fallocate(descriptor.raw, 0, off_t(Self.bytes))
    guard result == 0 else { throw Errno(result) }
    guard let mapping = mmap(nil, Self.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor.raw, 0),
      mapping != MAP_FAILED
    else { throw Errno.last }
    record = mapping
    let signal = record.load(as: Int32.self)
    let label = UnsafeRawBufferPointer(start: record + 4, count: Self.labelBytes).prefix { $0 != 0 }
    lastDeath = signal == 0 ? nil : Death(signal: signal, label: String(decoding: label, as: UTF8.self))
    memset(record, 0, Self.bytes)
    var fuse = CrashFuse(deaths: Self.deaths(fusePath))
    if let lastDeath { fuse.noteDeath(inBatch: lastDeath.label.isEmpty ? [] : [lastDeath.label]) }
    self.fuse = Mutex(fuse)
    if lastDeath != nil { save(fuse) }
  }

  /// From now on a death of this process is recorded. Called once.
  package func watch() { clinux_record_death(record) }

  // MARK: Devices

  /// How threads of a device, and of a guest, are labelled.
  static func label(_ key: DeviceKey) -> String { "\(key.domain)-\(key.kind.rawValue)-\(key.device)" }
  static func label(_ domain: DomainID) -> String { "\(domain)" }

  /// Why a device is not to be started; nil for one that may be.
  func reason(for key: DeviceKey) -> String? {
    fuse.withLock { $0.reason(for: Self.label(key)) ?? $0.reason(for: Self.label(key.domain)) }
  }

  /// An operator starts the device all the same.
  func forgive(_ key: DeviceKey) {
    change {
      $0.forgive(Self.label(key))
      $0.forgive(Self.label(key.domain))
    }
  }

  /// The daemon ends in good order, or has lived for long enough.
  func noteHealth() { change { $0.noteHealth() } }

  private func change(_ body: (inout CrashFuse<String>) -> Void) {
    let changed = fuse.withLock { fuse in
      let old = fuse
      body(&fuse)
      return fuse == old ? nil : fuse
    }
    if let changed { save(changed) }
  }

  // MARK: The file

  private static func deaths(_ path: String) -> [Set<String>] {
    guard let value = StateFolder.read(path), let deaths = value["deaths"]?.arrayValue else { return [] }
    return deaths.map { Set(($0.arrayValue ?? []).compactMap(\.stringValue)) }
  }

  private func save(_ fuse: CrashFuse<String>) {
    let deaths = fuse.deaths.map { JSONValue.array($0.sorted().map { .string($0) }) }
    // Without it the next daemon knows less, and serves all the same.
    try? StateFolder.write(JSONText.text(["version": 1, "deaths": .array(deaths)]), to: fusePath)
  }
}
