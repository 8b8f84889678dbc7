import CXen
import EventLoop
import Glibc
import Synchronization

/// A connection to xenstored through libxenstore. Confined to one thread, which may block for as long as xenstored takes.
///
/// Paths may be relative: they start at the own domain's directory (/local/domain/0 for dom0), whose number therefore need
/// not be known.
package final class XenStore {
  let handle: OpaquePointer
  /// Watches that are set.
  package private(set) var watchCount = 0

  /// - Parameter socketPath: the socket of a simulated xenstored; nil for the real one (socket or /dev/xen/xenbus).
  package init(socketPath: String? = nil) throws(XenError) {
    // libxenstore takes the path from the environment only, which the whole process shares.
    handle = try Self.opening.withLock { _ throws(XenError) in
      if let socketPath { setenv("XENSTORED_PATH", socketPath, 1) }
      defer { if socketPath != nil { unsetenv("XENSTORED_PATH") } }
      guard let handle = xs_open(0) else { throw XenError("xs_open", Errno.last) }
      return handle
    }
  }

  private static let opening = Mutex(())

  deinit { xs_close(handle) }

  // MARK: Nodes

  /// The value of a node; nil when there is none, or it may not be read.
  package func read(_ path: String, in transaction: UInt32 = 0) -> String? {
    var length: UInt32 = 0
    guard let value = xs_read(handle, transaction, path, &length) else { return nil }
    defer { free(value) }
    return String(decoding: UnsafeRawBufferPointer(start: value, count: Int(length)), as: UTF8.self)
  }

  /// The same as it is, whatever its bytes mean.
  package func readBytes(_ path: String) -> [UInt8]? {
    var length: UInt32 = 0
    guard let value = xs_read(handle, 0, path, &length) else { return nil }
    defer { free(value) }
    return Array(UnsafeRawBufferPointer(start: value, count: Int(length)))
  }

  package func write(_ path: String, bytes: [UInt8]) throws(XenError) {
    guard xs_write(handle, 0, path, bytes, UInt32(bytes.count)) else { throw XenError("xs_write \(path)", Errno.last) }
  }

  /// Names of the nodes below one; nil when there is none.
  package func list(_ path: String, in transaction: UInt32 = 0) -> [String]? {
    var count: UInt32 = 0
    guard let names = xs_directory(handle, transaction, path, &count) else { return nil }
    defer { free(names) }
    return (0..<Int(count)).compactMap { names[$0].map { String(cString: $0) } }
  }

  /// As `read` and `list`, for those who draw conclusions from a node's absence: nil means that it is not there, and nothing else.
  package func readIfThere(_ path: String, in transaction: UInt32 = 0) throws(XenError) -> String? {
    if let value = read(path, in: transaction) { return value }
    guard errno == ENOENT else { throw XenError("xs_read \(path)", Errno.last) }
    return nil
  }

  /// As `readIfThere`, for nodes of another domain: where one is gone, what is left above it may not be looked at.
  package func readIfVisible(_ path: String, in transaction: UInt32 = 0) throws(XenError) -> String? {
    if let value = read(path, in: transaction) { return value }
    guard errno == ENOENT || errno == EACCES else { throw XenError("xs_read \(path)", Errno.last) }
    return nil
  }

  package func listIfThere(_ path: String, in transaction: UInt32 = 0) throws(XenError) -> [String]? {
    if let names = list(path, in: transaction) { return names }
    guard errno == ENOENT else { throw XenError("xs_directory \(path)", Errno.last) }
    return nil
  }

  package func write(_ path: String, _ value: String, in transaction: UInt32 = 0) throws(XenError) {
    guard xs_write(handle, transaction, path, value, UInt32(value.utf8.count)) else {
      throw XenError("xs_write \(path)", Errno.last)
    }
  }

  /// Removes a node and what is below it; one that is not there is no error.
  package func remove(_ path: String, in transaction: UInt32 = 0) throws(XenError) {
    guard xs_rm(handle, transaction, path) || errno == ENOENT else { throw XenError("xs_rm \(path)", Errno.last) }
  }

  /// Runs `body` as one transaction, again when another one got in between, at most eight times.
  package func transaction<Result>(_ body: (UInt32) throws(XenError) -> Result) throws(XenError) -> Result {
    for _ in 0..<8 {
      let transaction = xs_transaction_start(handle)
      guard transaction != 0 else { throw XenError("xs_transaction_start", Errno.last) }
      let result: Result
      do throws(XenError) {
        result = try body(transaction)
      } catch {
        xs_transaction_end(handle, transaction, true)
        throw error
      }
      if xs_transaction_end(handle, transaction, false) { return result }
      guard errno == EAGAIN else { throw XenError("xs_transaction_end", Errno.last) }
    }
    throw XenError("xs_transaction_end", Errno(EAGAIN))
  }

  /// Whether xenstored still answers. libxenstore closes a broken connection without a word to those who wait for watches.
  package var isAlive: Bool {
    var length: UInt32 = 0
    guard let value = xs_read(handle, 0, "domid", &length) else { return errno == ENOENT || errno == EACCES }
    free(value)
    return true
  }

  // MARK: Watches

  /// Watches a node and what is below it. Fires once at once.
  package func watch(_ path: String, token: String) throws(XenError) {
    guard xs_watch(handle, path, token) else { throw XenError("xs_watch \(path)", Errno.last) }
    watchCount += 1
  }

  /// Waits until `condition` holds, woken by each change of a node or what is below it. For those who watch nothing else.
  ///
  /// - Returns: false when the time is over.
  package func wait(on paths: [String], seconds: Int, until condition: () -> Bool) -> Bool {
    for path in paths { try? watch(path, token: "wait") }
    defer { for path in paths { unwatch(path, token: "wait") } }
    let end = EventLoop.now() &+ UInt64(min(max(seconds, 0), 1 << 30)) &* 1_000_000_000
    while true {
      while nextEvent() != nil {}
      if condition() { return true }
      let now = EventLoop.now()
      guard now < end else { return false }
      var poller = pollfd(fd: eventDescriptor, events: Int16(POLLIN), revents: 0)
      // Not for ever: a directory that is removed as a whole may end without an event.
      _ = poll(&poller, 1, Int32(clamping: min((end - now) / 1_000_000 + 1, 1000)))
    }
  }

  package func unwatch(_ path: String, token: String) {
    if xs_unwatch(handle, path, token) { watchCount -= 1 }
  }

  /// Readable when a watch has fired.
  package var eventDescriptor: Int32 { xs_fileno(handle) }

  /// The next event that is there: the path that changed, in the form in which it was watched, and the token.
  ///
  /// Events may be spurious and merged: whoever gets one reads the state again.
  package func nextEvent() -> (path: String, token: String)? {
    guard let event = xs_check_watch(handle) else { return nil }
    defer { free(event) }
    guard let path = event[0], let token = event[1] else { return nil }  // XS_WATCH_PATH, XS_WATCH_TOKEN
    return (String(cString: path), String(cString: token))
  }
}
