import Synchronization

/// A device's configuration space (virtio 1.2, 2.5): bytes that the driver reads with any width, and a generation.
///
/// Register accesses and changes by the operator meet here; both are rare, so a lock serves.
package final class ConfigurationSpace: Sendable {
  private struct Contents {
    var bytes: [UInt8]
    var generation: UInt32
  }

  private let contents: Mutex<Contents>

  package init(_ bytes: [UInt8]) {
    contents = Mutex(Contents(bytes: bytes, generation: 0))
  }

  /// As an earlier process left it. A driver that is in the middle of a read when another process takes over must not find the number that it
  /// knows, of which it may see 8 bits only (virtio 1.2, 4.1.4.3): so this is as far away from it as can be.
  ///
  /// - Parameter generation: the last that was saved; there may have been some more.
  init(_ bytes: [UInt8], behind generation: UInt32) {
    contents = Mutex(Contents(bytes: bytes, generation: generation &+ 128))
  }

  /// ConfigGeneration: changes whenever the contents do.
  package var generation: UInt32 { contents.withLock { $0.generation } }

  /// The contents.
  package var bytes: [UInt8] { contents.withLock { $0.bytes } }

  /// Takes the place of another space: the generation goes on from there.
  package func follow(_ other: ConfigurationSpace) {
    let generation = other.generation
    contents.withLock { $0.generation = generation &+ 1 }
  }

  /// Replaces the contents.
  package func update(_ change: (inout [UInt8]) -> Void) {
    contents.withLock {
      change(&$0.bytes)
      $0.generation &+= 1
    }
  }

  /// A little-endian value of 1, 2, 4 or 8 bytes; bytes beyond the end read as 0.
  package func read(offset: Int, width: Int) -> UInt64 {
    contents.withLock { contents in
      var value: UInt64 = 0
      for index in 0..<min(max(width, 0), 8) {
        let (position, overflow) = offset.addingReportingOverflow(index)
        guard !overflow, position >= 0, position < contents.bytes.count else { continue }
        value |= UInt64(contents.bytes[position]) << UInt64(8 * index)
      }
      return value
    }
  }
}
