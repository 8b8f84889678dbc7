import Synchronization

/// How a device reaches its guest's interrupt controller.
package protocol InterruptLine: AnyObject, Sendable {
  /// Whether the line follows a level (x86) or each rise is an edge of its own (Arm's vGIC ignores level 0).
  var isLevel: Bool { get }
  /// Drives the line. Called by one thread at a time.
  func set(_ high: Bool)
}

/// Causes of an interrupt: the bits of InterruptStatus (virtio 1.2, 4.2.2).
package struct InterruptCause: OptionSet, Sendable {
  package let rawValue: UInt32

  package init(rawValue: UInt32) { self.rawValue = rawValue }

  package static let usedBuffer = InterruptCause(rawValue: 1)
  package static let configuration = InterruptCause(rawValue: 2)
}

/// InterruptStatus and its line, shared without a lock by the data thread, which raises, and the ioreq thread, which
/// acknowledges.
///
/// One atomic word holds the causes, the level that was driven last, and a mark that somebody drives the line right now.
/// Whoever changes the causes then drives the line until it agrees with them; a second thread that finds the mark set leaves
/// that to the first, which looks again before it clears the mark.
package final class InterruptState: Sendable {
  private static let causes: UInt32 = 3
  private static let high: UInt32 = 1 << 8
  private static let busy: UInt32 = 1 << 9
  private static let again: UInt32 = 1 << 10
  private static let disabled: UInt32 = 1 << 11

  private let word = Atomic<UInt32>(0)
  private let line: any InterruptLine
  private let isLevel: Bool
  /// How often the guest was interrupted.
  package let raised = Gauge()

  package init(line: any InterruptLine) {
    self.line = line
    isLevel = line.isLevel
  }

  /// The register InterruptStatus.
  package var pending: UInt32 { word.load(ordering: .acquiring) & Self.causes }

  /// Adds a cause and interrupts the guest.
  package func raise(_ cause: InterruptCause) {
    raised.add(1)
    // On an edge-triggered line new causes need an edge even when old ones are not acknowledged yet.
    word.bitwiseOr(isLevel ? cause.rawValue : cause.rawValue | Self.again, ordering: .acquiringAndReleasing)
    drive()
  }

  /// The register InterruptACK; bits that are not set do no harm.
  package func acknowledge(_ bits: UInt32) {
    word.bitwiseAnd(~(bits & Self.causes), ordering: .acquiringAndReleasing)
    drive()
  }

  /// Takes every cause back and lowers the line: the device is reset or gone.
  package func clear() {
    word.bitwiseAnd(~(Self.causes | Self.again), ordering: .acquiringAndReleasing)
    drive()
  }

  /// Lets the line follow the causes, or keeps it low whatever they are: for devices that have another way to interrupt.
  package func set(enabled: Bool) {
    if enabled {
      word.bitwiseAnd(~Self.disabled, ordering: .acquiringAndReleasing)
    } else {
      word.bitwiseOr(Self.disabled, ordering: .acquiringAndReleasing)
    }
    drive()
  }

  private func drive() {
    var current = word.load(ordering: .acquiring)
    while true {
      let want = current & Self.causes != 0 && current & Self.disabled == 0
      let isHigh = current & Self.high != 0
      let edge = current & Self.again != 0 && want
      guard current & Self.busy == 0, want != isHigh || edge else { return }
      let claimed = (current | Self.busy) & ~Self.again
      let (exchanged, seen) = word.compareExchange(
        expected: current, desired: claimed, ordering: .acquiringAndReleasing)
      guard exchanged else {
        current = seen
        continue
      }
      line.set(want)
      if want { word.bitwiseOr(Self.high, ordering: .relaxed) } else { word.bitwiseAnd(~Self.high, ordering: .relaxed) }
      current = word.bitwiseAnd(~Self.busy, ordering: .acquiringAndReleasing).newValue
    }
  }
}
