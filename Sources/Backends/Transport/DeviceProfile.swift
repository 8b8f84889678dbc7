package import Virtqueue

/// What a transport shows of a device, whether or not a backend is there to serve it.
package struct DeviceProfile: Equatable, Sendable {
  /// The device's number: 1 net, 2 blk, 3 console (virtio 1.2, chapter 5).
  package var deviceID: UInt32
  package var offeredFeatures: FeatureBits
  /// The largest size of each queue.
  package var queueSizes: [UInt16]

  package init(deviceID: UInt32, offeredFeatures: FeatureBits, queueSizes: [UInt16]) {
    self.deviceID = deviceID
    self.offeredFeatures = offeredFeatures
    self.queueSizes = queueSizes
  }

  package init(_ device: any VirtioDevice) {
    self.init(deviceID: device.deviceID, offeredFeatures: device.offeredFeatures, queueSizes: device.queueSizes)
  }

  /// Whether another backend can serve what the driver negotiated with an earlier one.
  func goesOn(with device: any VirtioDevice, features: FeatureBits, layouts: [QueueLayout?]) -> Bool {
    device.deviceID == deviceID && features.isSubset(of: device.offeredFeatures) && device.accepts(features)
      && layouts.count == device.queueSizes.count
      && zip(layouts, device.queueSizes).allSatisfy { ($0?.size ?? 0) <= $1 }
  }
}

/// Where a transport keeps what must outlive the process: called by the ioreq thread, before a device is started and after it has
/// ended, so that an access which is answered once more after a restart finds its work done or not begun.
package protocol TransportState: AnyObject, Sendable {
  func save(_ registers: MMIOTransport.Registers, _ status: DeviceStatus, configuration: [UInt8])
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
