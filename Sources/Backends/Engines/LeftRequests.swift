import EventLoop
import Glibc

/// How to wait for requests that a process left behind when it was killed: the kernel goes on with them, and they keep the image's lock, or the
/// block device, until they are done (`IOUringEngine`).
package struct LeftRequests {
  /// In milliseconds. Behind that the image is in use.
  private let patience: UInt64

  private init(milliseconds: UInt64) { patience = milliseconds }

  /// Not at all: with libaio a process is not gone before its requests are.
  package static let none = LeftRequests(milliseconds: 0)

  /// - Parameter isLikely: the device is resumed where an earlier process left it. Its requests may be stuck in a store that is out of reach
  ///   for a while. Starts that fail meanwhile are so far apart that they do not use up the restarts of a device (five in ten minutes).
  package init(isLikely: Bool) { patience = isLikely ? 125_000 : 2_000 }

  /// Waits while `isTaken`, on the device's own thread.
  func wait(while isTaken: () -> Bool) {
    guard patience > 0 else { return }
    let end = EventLoop.now() &+ patience &* 1_000_000
    var pause: Int32 = 2
    repeat {
      poll(nil, 0, pause)
      pause = min(pause * 2, 50)
    } while isTaken() && EventLoop.now() < end
  }
}
