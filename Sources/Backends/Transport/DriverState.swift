package import Virtqueue

/// What the device's life as its driver sees it consists of; enough to resume it after a restart of the daemon.
package struct DriverState: Equatable, Sendable {
  package var deviceFeaturesSelect: UInt32 = 0
  package var driverFeaturesSelect: UInt32 = 0
  package var driverFeatures: UInt64 = 0
  package var queueSelect: UInt32 = 0
  /// Which life of the device this is, where the transport has numbers for them; 0 elsewhere.
  package var epoch: UInt32 = 0
  /// Of the configuration space, as the driver may have read it.
  package var generation: UInt32 = 0
  package var queues: [QueueLayout] = []
  package var ready: [Bool] = []

  package init() {}

  /// As a reset leaves it.
  init(queueCount: Int) {
    queues = Array(repeating: QueueLayout(), count: queueCount)
    ready = Array(repeating: false, count: queueCount)
  }

  package var negotiated: FeatureBits { FeatureBits(rawValue: driverFeatures) }

  /// The queues as a device wants them: nil where one is not ready.
  package var layouts: [QueueLayout?] { zip(queues, ready).map { $1 ? $0 : nil } }
}

/// Where a transport keeps what must outlive the process: called by the guest's thread, before a device is started and after it has
/// ended, so that an access which is answered once more after a restart finds its work done or not begun.
package protocol TransportState: AnyObject, Sendable {
  func save(_ driver: DriverState, _ status: DeviceStatus, configuration: [UInt8])
  /// The driver took a queue back while no backend was there to be told.
  func endQueue(_ queue: Int)
  /// The driver is gone: nothing that it chose is the next one's. Behind the backend's reset, if there is a backend.
  func forgetDriver()
  /// The configuration space as it was saved last; empty when it never was.
  var savedConfiguration: [UInt8] { get }
}

extension TransportState {
  package func forgetDriver() {}
  package var savedConfiguration: [UInt8] { [] }
}
