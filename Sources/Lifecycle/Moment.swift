/// A span of time in milliseconds.
package typealias Milliseconds = UInt64

/// When something happened, as the shell measured it. The machines have neither a clock nor a source of random numbers.
package struct Moment: Hashable, Sendable {
  /// Monotonic nanoseconds.
  package var nanoseconds: UInt64
  /// A random number from 0 to 1 that spreads pauses: devices which failed together must not come back together.
  package var chance: Double

  package init(nanoseconds: UInt64, chance: Double) {
    self.nanoseconds = nanoseconds
    self.chance = chance
  }
}

/// One backend of a device, counted from the device's first. Timers and drains are counted with it, so that no two of a device's
/// numbers are the same and a late report can be told by its number alone.
package struct BackendID: Hashable, Sendable {
  package let number: UInt64

  package init(_ number: UInt64) { self.number = number }
}
