package import Virtqueue

/// What a transport shows to the guest of a device, and what it tells the device.
///
/// The transport calls from the thread that answers the guest's register accesses; the device works on a thread of its own.
/// None of the calls waits for the guest or for storage.
package protocol VirtioDevice: AnyObject, Sendable {
  /// The device's number: 1 net, 2 blk, 3 console (virtio 1.2, chapter 5).
  var deviceID: UInt32 { get }
  /// Every feature that may be negotiated, transport bits included.
  var offeredFeatures: FeatureBits { get }
  /// The largest size of each queue; the count is the number of queues.
  var queueSizes: [UInt16] { get }
  /// The configuration space.
  var configuration: ConfigurationSpace { get }

  /// Whether the device can serve this subset of what it offered.
  func accepts(_ features: FeatureBits) -> Bool
  /// The driver set DRIVER_OK: the queues in `layouts` (nil where not ready) are live from now on.
  ///
  /// - Parameter adopts: the driver did so earlier, with another backend; the queues go on where that one was stopped.
  func activate(features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool)
  /// The driver takes one queue down (VIRTIO_F_RING_RESET): when this returns, the queue's memory is not touched any more and
  /// none of its chains will be used. The others go on.
  func resetQueue(_ queue: Int)
  /// A queue that was reset is live again.
  func enableQueue(_ queue: Int, layout: QueueLayout)
  /// The driver made buffers available in a queue, whose index is below the number of queues.
  func notify(queue: Int)
  /// The driver resets the device: when this returns, no guest memory is touched and no interrupt sent any more.
  func reset()
  /// The driver wrote to the configuration space.
  func configurationWritten(offset: Int, bytes: [UInt8])
  /// Waits for the end of a device that was taken off its transport and is being stopped: behind it no guest memory is touched any more.
  /// It does not keep the device.
  var untilStopped: @Sendable () -> Void { get }
}

extension VirtioDevice {
  package var untilStopped: @Sendable () -> Void { {} }
}

/// What a device tells its transport, from any thread.
package protocol TransportSignals: AnyObject, Sendable {
  /// Used buffers are published: interrupt the driver.
  func interruptForUsedBuffers()
  /// The configuration space changed: interrupt the driver.
  func interruptForConfiguration()
  /// The device cannot go on until the driver resets it: sets DEVICE_NEEDS_RESET and interrupts (virtio 1.2, 2.1.2).
  func needReset()
  /// What one queue signals by; by default the transport itself, for all of them.
  func signals(of queue: Int) -> any TransportSignals
  /// The queue's own channel; nil where notifications come by `VirtioDevice.notify`.
  var doorbell: (any QueueDoorbell)? { get }
}
