package import Logging
import Synchronization

/// What is logged, by all loggers of the process; changed while it runs.
package enum LogLevel {
  private static let index = Atomic<Int>(2)

  /// The lowest level that is logged.
  package static var current: Logger.Level {
    get { Logger.Level.allCases[index.load(ordering: .relaxed)] }
    set { index.store(Logger.Level.allCases.firstIndex(of: newValue) ?? 2, ordering: .relaxed) }
  }
}
