import CLinux
import Glibc

/// A file descriptor with one owner, which closes it.
package struct OwnedDescriptor: ~Copyable, Sendable {
  package let raw: Int32

  /// Takes over an open descriptor.
  package init(adopting raw: Int32) { self.raw = raw }

  deinit { close(raw) }
}

/// An eventfd: a wake-up from any thread.
package struct EventDescriptor: ~Copyable, Sendable {
  private let descriptor: OwnedDescriptor

  package init() throws(Errno) {
    descriptor = OwnedDescriptor(
      adopting: try retrying { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) })
  }

  package var raw: Int32 { descriptor.raw }

  /// Makes the descriptor readable. Several before it is drained are one.
  package func signal() { Self.signal(raw) }

  /// The same for whoever knows an eventfd by its number only; its owner outlives the call.
  package static func signal(_ raw: Int32) {
    var one: UInt64 = 1
    while write(raw, &one, 8) == -1 && errno == EINTR {}
  }

  /// Takes the signals that have come.
  package func drain() {
    var count: UInt64 = 0
    while read(raw, &count, 8) == -1 && errno == EINTR {}
  }
}
