import Synchronization

/// What one queue of a device counts.
package struct QueueAccount: Sendable {
  package let counters = QueueCounters()
  package let latencies = QueueLatencies()
}

/// What a device counts, over all the backends that it has one after the other.
package final class DeviceAccount: Sendable {
  private let queues = Mutex<[QueueAccount]>([])

  package init() {}

  /// The account of a queue; one backend at a time writes to it.
  package func queue(_ index: Int) -> QueueAccount {
    queues.withLock { queues in
      while queues.count <= index { queues.append(QueueAccount()) }
      return queues[index]
    }
  }

  package var all: [QueueAccount] { queues.withLock { $0 } }
}
