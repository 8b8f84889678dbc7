import CLinux
import EventLoop
import Glibc
import Synchronization

/// Which file a descriptor is, whatever path it was opened by.
struct FileIdentity: Hashable, Sendable {
  var device: UInt64
  var inode: UInt64

  init(_ status: stat) {
    device = UInt64(status.st_dev)
    inode = UInt64(status.st_ino)
  }
}

/// Exclusive (or, read-only, shared) use of an image, by a lock of the open file description: it ends with the descriptor and
/// is not lost when another descriptor of the same file is closed, as POSIX locks are.
enum ImageLock {
  /// Names of our own holders, so that a conflict within this daemon can say which guest's disk it is.
  private static let holders = Mutex<[FileIdentity: [String]]>([:])

  /// - Parameters:
  ///   - holder: who wants it, for others' error messages.
  ///   - left: how to wait for requests that an ended process left behind.
  static func take(
    _ descriptor: Int32, path: String, holder: String, exclusive: Bool, after left: LeftRequests
  ) throws(ImageFault) -> FileIdentity {
    var status = stat()
    guard fstat(descriptor, &status) == 0 else { throw .host(what: "cannot examine '\(path)'", Errno.last) }
    let identity = FileIdentity(status)
    var result = clinux_lock_description(descriptor, exclusive ? 1 : 0)
    if result == EAGAIN || result == EACCES, isHeldByNobody(descriptor, identity) {
      // No process has it, but requests that one left behind: they hold it for as long as they may still write.
      left.wait {
        result = clinux_lock_description(descriptor, exclusive ? 1 : 0)
        return result == EAGAIN || result == EACCES
      }
    }
    if result == EAGAIN || result == EACCES { throw .locked(path: path, holder: nameHolder(descriptor, identity)) }
    guard result == 0 else { throw .host(what: "cannot lock '\(path)'", Errno(result)) }
    holders.withLock { $0[identity, default: []].append(holder) }
    return identity
  }

  /// Forgets a holder; the lock itself ends with its descriptor.
  static func release(_ identity: FileIdentity, holder: String) {
    holders.withLock {
      if let index = $0[identity]?.firstIndex(of: holder) { $0[identity]?.remove(at: index) }
      if $0[identity]?.isEmpty == true { $0[identity] = nil }
    }
  }

  /// Which of our disks have a file, as far as it was opened by the same name.
  static func holder(of status: stat) -> String? {
    holders.withLock { $0[FileIdentity(status)] }?.joined(separator: " and ")
  }

  private static func isHeldByNobody(_ descriptor: Int32, _ identity: FileIdentity) -> Bool {
    holders.withLock { $0[identity] ?? [] }.isEmpty && clinux_lock_holder(descriptor) <= 0
      && openers(identity).isEmpty
  }

  private static func openers(_ identity: FileIdentity) -> [Int32] {
    processes().filter { $0 != getpid() && has(process: $0, open: identity) }
  }

  private static func nameHolder(_ descriptor: Int32, _ identity: FileIdentity) -> String {
    if let ours = holders.withLock({ $0[identity] }), !ours.isEmpty { return ours.joined(separator: " and ") }
    let pid = clinux_lock_holder(descriptor)
    if pid > 0 { return describe(process: pid) }
    // Locks of an open file description have no pid: look who has the file open.
    let openers = openers(identity)
    return openers.isEmpty
      ? "another process, or by requests that a killed process left behind"
      : openers.map(describe(process:)).joined(separator: " and ")
  }

  private static func describe(process pid: Int32) -> String {
    var name = "?"
    if let file = fopen("/proc/\(pid)/comm", "re") {
      var line = [CChar](repeating: 0, count: 64)
      if fgets(&line, 64, file) != nil {
        name = String(decoding: line.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
      }
      fclose(file)
    }
    return "process \(pid) (\(name))"
  }

  private static func processes() -> [Int32] { namesInFolder("/proc").compactMap { Int32($0) } }

  private static func has(process pid: Int32, open identity: FileIdentity) -> Bool {
    namesInFolder("/proc/\(pid)/fd").contains { entry in
      var status = stat()
      return stat("/proc/\(pid)/fd/\(entry)", &status) == 0 && FileIdentity(status) == identity
    }
  }
}
