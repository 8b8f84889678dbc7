import Transport
import Xen

/// The Xenbus side of one device: where the handshake with its driver stands. Confined to the supervisor's loop.
final class XenbusLink {
  enum Phase: Equatable {
    /// No backend is ready yet, or nothing is offered.
    case idle
    /// The driver may set the device up; state 2.
    case offered
    /// The guest's thread maps and binds.
    case connecting
    /// The driver is at work; state 4.
    case connected
    /// The guest's thread resets and unmaps.
    case disconnecting
    /// All is given back; state 6.
    case closed
  }

  let pool: GrantPool
  /// The frontend's directory.
  let frontend: String
  var phase = Phase.idle
  var transport: XenbusTransport?
  /// Of the present offer.
  var epoch: UInt32 = 0
  /// The driver's setup that was refused: only another one is looked at.
  var refusedSequence: UInt32?
  /// The last configuration write that was done.
  var configurationWrites: UInt32?
  /// The life that an earlier daemon served, to be gone on with.
  var adoptsEpoch: UInt32?
  /// What `vx-config` says.
  var published = ""
  /// The toolstack wants the device gone; its driver is still using it up.
  var isLeaving = false
  /// Tries to connect that failed for want of room.
  var tries = 0

  init(pool: GrantPool, frontend: String) {
    self.pool = pool
    self.frontend = frontend
  }

  /// Pages that a guest may take of the budget that all share: twice what its module grants for each queue.
  private static let pagesForEachQueue = 4096

  func offer(_ profile: DeviceProfile, configurationBytes: Int) -> XenbusOffer {
    XenbusOffer(
      profile: profile,
      maximumPages: UInt32(min(Int(XenbusOffer.maximumPages), profile.queueSizes.count * Self.pagesForEachQueue)),
      configurationBytes: configurationBytes, epoch: epoch)
  }
}
