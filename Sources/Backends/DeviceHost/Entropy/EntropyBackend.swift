import Devices
package import EventLoop
import Transport
import Virtqueue

/// A running entropy device.
package final class EntropyBackend: DeviceBackend, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: nothing of its own; see the superclass.

  private static let queueSize: UInt16 = 64

  package static func start(
    _ settings: EntropySettings, _ context: Context,
    completion: @escaping @Sendable (Result<EntropyBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    start(
      name: context.name, label: context.label, threads: 1,
      make: { threads throws(StartFault) in try EntropyBackend(settings, context, threads[0]) },
      completion: completion)
  }

  private init(_ settings: EntropySettings, _ context: Context, _ thread: LoopThread) throws(StartFault) {
    let identity = DeviceIdentity(
      deviceID: EntropyPump.deviceID, offeredFeatures: settings.offered ?? EntropyPump.features,
      queueSizes: [Self.queueSize])
    let state = try context.makeState?(DeviceState.Layout(unjournaled: identity))
    let counters = context.account.queue(0).counters
    let worker = try Self.make { () throws in
      try DeviceWorker(
        EntropyPump(source: context.source, counters: counters, rate: context.rate), index: 0,
        queues: [.init(maximumSize: Self.queueSize, counters: counters)], thread: thread, source: context.source,
        report: context.report)
    }
    try super.init(
      Components(
        identity: identity, configuration: ConfigurationSpace([]), mode: "the kernel's random numbers",
        threads: [thread], workers: [worker], routes: [Route(worker: 0, queue: 0)], rate: context.rate,
        state: state, counters: [counters]))
  }
}
