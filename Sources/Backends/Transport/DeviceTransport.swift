/// A transport as its supervisor sees it, whatever the guest reaches it by. Called by the guest's thread.
package protocol DeviceTransport: TransportSignals {
  /// The driver's status register, or what stands for it.
  var currentStatus: DeviceStatus { get }
  /// How often the guest was interrupted.
  var interruptGauge: Gauge { get }
  /// Puts a backend behind the transport. A device that the driver has started goes on at once.
  ///
  /// - Returns: false when the backend cannot serve what was negotiated; the driver must reset then.
  @discardableResult func plug(_ device: any VirtioDevice) -> Bool
  /// Takes the backend away: it is not called any more, and the driver's requests wait for the next.
  func unplug()
}

/// One queue's channel in both directions, where a queue has one of its own: its data thread listens to it and answers by it.
package protocol QueueDoorbell: AnyObject, Sendable {
  /// Readable when the driver has notified the queue.
  var descriptor: Int32 { get }
  /// Takes the notification. No other is told of until `rearm`, by which one that came meanwhile makes the descriptor readable at once. On the
  /// data thread.
  func acknowledge()
  /// Wants to be told of the next notification: before the thread sleeps, rather than for each of them. On the data thread.
  func rearm()
  /// Interrupts the driver. On the data thread.
  func ring()
}

extension TransportSignals {
  /// What one queue signals by; by default the transport itself, for all of them.
  package func signals(of queue: Int) -> any TransportSignals { self }
  /// The queue's own channel; nil where notifications come by `VirtioDevice.notify`.
  package var doorbell: (any QueueDoorbell)? { nil }
}
