package import Virtqueue

/// What a transport shows of a device, whether or not a backend is there to serve it.
package struct DeviceIdentity: Equatable, Sendable {
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
