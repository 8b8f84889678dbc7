package import Devices
package import EventLoop

/// What operators see of a running backend: values of the moment at which it was asked for them, and counters that its threads keep. They outlive the
/// backend, keep nothing of it, and cannot change it.
package struct BackendReadings: Sendable {
  /// How it is served, for people.
  package var mode: String
  package var threadCount: Int
  /// Requests that can be under way, in all queues together.
  package var requestLimit: Int
  /// The counters of each queue.
  package var counters: [QueueCounters]
  /// What is special of the type, as clients of the control socket get it.
  package var facts: [Reading.Member]
  package var ports: [BackendPort]
  /// Bytes of a disk.
  package var capacity: UInt64?
  package var isLinkUp: Bool?
  package var clocks: [ThreadClock]

  /// CPU time of the data threads in nanoseconds.
  package var cpuTime: UInt64 { clocks.reduce(0) { $0 &+ $1.time } }
}

/// One port of a console device.
package struct BackendPort: Sendable {
  package var name: String
  /// The socket where `vxctl console` finds it; nil for none.
  package var viewerPath: String?
}
