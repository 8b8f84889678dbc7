import Devices
package import EventLoop
import Transport
import Virtqueue

/// A running entropy device.
package final class EntropyBackend: DeviceBackend, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: nothing of its own; see the superclass.

  private static let queueSize: UInt16 = 64

  package static func start(
    _ settings: EntropySettings, _ surroundings: Surroundings,
    completion: @escaping @Sendable (Result<EntropyBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    start(
      name: surroundings.name, label: surroundings.label, threads: 1,
      make: { threads throws(StartFault) in try EntropyBackend(settings, surroundings, threads[0]) },
      completion: completion)
  }

  private init(_ settings: EntropySettings, _ surroundings: Surroundings, _ thread: LoopThread) throws(StartFault) {
    let profile = DeviceProfile(
      deviceID: EntropyPump.deviceID, offeredFeatures: settings.offered ?? EntropyPump.features,
      queueSizes: [Self.queueSize])
    let state = try surroundings.makeState?(DeviceState.Shape(unjournaled: profile))
    let counters = surroundings.account.queue(0).counters
    let worker = try Self.make { () throws in
      try DeviceWorker(
        EntropyPump(source: surroundings.source, counters: counters, rate: surroundings.rate), index: 0,
        queues: [.init(maximumSize: Self.queueSize, counters: counters)], thread: thread, source: surroundings.source,
        report: surroundings.report)
    }
    try super.init(
      Parts(
        profile: profile, configuration: ConfigurationSpace([]), mode: "the kernel's random numbers",
        threads: [thread], workers: [worker], routes: [Route(worker: 0, queue: 0)], rate: surroundings.rate,
        state: state, counters: [counters]))
  }
}
