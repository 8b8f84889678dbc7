package import ControlAPI
package import Xen

/// Something that happened to a guest or a device, for those who subscribed on the control socket and for the log.
package struct SupervisorEvent: Sendable {
  package enum Kind: String, Sendable {
    case guestAppeared = "guest.appeared"
    case guestGone = "guest.gone"
    case guestFailed = "guest.failed"
    case deviceReady = "device.ready"
    case deviceConnected = "device.connected"
    case deviceReset = "device.reset"
    case deviceFailed = "device.failed"
    case deviceFaulted = "device.faulted"
    /// A queue stopped at an error of the store; the guest waits for `device.resume`.
    case deviceHeld = "device.held"
    case deviceResumed = "device.resumed"
    case deviceStoreLost = "device.storeLost"
    case deviceStoreBack = "device.storeBack"
    case deviceRestarting = "device.restarting"
    case deviceRestarted = "device.restarted"
    case deviceQuarantined = "device.quarantined"
    case devicePaused = "device.paused"
    case deviceAdopted = "device.adopted"
    case deviceLimited = "device.limited"
    case deviceAttached = "device.attached"
    case deviceNotAttached = "device.notAttached"
    case deviceDetached = "device.detached"
    case guestRenamed = "guest.renamed"
    case deviceStuck = "device.stuck"
    case deviceUnstuck = "device.unstuck"
    case deviceResized = "device.resized"
    case deviceNotResized = "device.notResized"
    /// A program in the guest has opened or closed ports of a console device.
    case devicePorts = "device.ports"
    case deviceClosing = "device.closing"
    case deviceGone = "device.gone"

    /// Whether a guest can bring it about as often as it likes.
    var isGuestsDoing: Bool {
      switch self {
      case .deviceConnected, .deviceReset, .deviceFaulted, .devicePorts: true
      default: false
      }
    }

    /// Whether it deserves an operator's attention.
    package var isTrouble: Bool {
      switch self {
      case .guestFailed, .deviceFailed, .deviceFaulted, .deviceHeld, .deviceStoreLost, .deviceStuck, .deviceNotResized,
        .deviceRestarting, .deviceQuarantined, .deviceNotAttached:
        true
      default: false
      }
    }
  }

  package var kind: Kind
  package var domain: DomainID
  package var guest: String
  package var device: String?
  package var reason: String?

  package var json: JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "event", value: .string(kind.rawValue)), .init(name: "domain", value: .count(domain)),
      .init(name: "guest", value: .string(guest)),
    ]
    if let device { members.append(.init(name: "device", value: .string(device))) }
    if let reason { members.append(.init(name: "reason", value: .string(reason))) }
    return .object(members)
  }
}
