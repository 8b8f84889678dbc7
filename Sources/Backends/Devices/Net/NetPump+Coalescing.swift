import CLinux
import Transport
import Virtqueue

/// Notifications that are kept back for a while because the driver wants fewer of them (virtio 1.2, 5.1.6.5.8).
///
/// What is used is published at once, so a driver that looks finds it. Whether it wants to be interrupted is asked then too, and one that does is
/// owed an interrupt: for so many packets, or after so much time, or when its buffers run out.
extension NetPump {
  /// Whether the driver is owed an interrupt.
  @inline(__always) var isOwing: Bool { mutating get { receiveDelay.due | transmitDelay.due != 0 } }

  @inline(__always)
  mutating func publishReceived(_ packets: UInt64, _ signals: any TransportSignals) {
    guard receiveDelay.isOn else { return receiveQueue.publish(signals) }
    let isWanted = receiveQueue.publishQuietly()
    if receiveDelay.published(
      packets: packets, isWanted: isWanted, most: UInt64(receiveQueue.size / 2), at: now)
    {
      receiveQueue.interrupt(signals)
    }
  }

  @inline(__always)
  mutating func publishSent(_ packets: Int, _ signals: any TransportSignals) {
    guard transmitDelay.isOn else { return transmitQueue.publish(signals) }
    let isWanted = transmitQueue.publishQuietly()
    if transmitDelay.published(
      packets: UInt64(packets), isWanted: isWanted, most: UInt64(transmitQueue.size / 2), at: now)
    {
      transmitQueue.interrupt(signals)
    }
  }

  /// Interrupts the driver where it has been owed that for long enough, and asks to be woken for the rest.
  ///
  /// - Parameter isShort: it has no buffers for what it is to receive.
  mutating func notifyDue(_ signals: borrowing [any TransportSignals], isShort: Bool) {
    let time = MonotonicClock.now
    if receiveDelay.elapsed(at: isShort ? .max : time) { receiveQueue.interrupt(signals[Place.receive]) }
    if transmitDelay.elapsed(at: time) { transmitQueue.interrupt(signals[Place.transmit]) }
    guard isOwing else { return }
    // The earlier one; 0 is none.
    let due = min(receiveDelay.due &- 1, transmitDelay.due &- 1) &+ 1
    guard timer >= 0 else { return wait(until: due) }
    guard due != timerTime else { return }
    timerTime = due
    clinux_timer_set(timer, due)
  }
}
