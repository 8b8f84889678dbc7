/// What is told to operators about a guest or a device: a line in the log, an event on the control socket. Raw values are the names there.
package enum News: String, CaseIterable, Sendable {
  case guestAppeared = "guest.appeared"
  case guestGone = "guest.gone"
  case guestFailed = "guest.failed"
  case guestRenamed = "guest.renamed"
  case deviceReady = "device.ready"
  case deviceConnected = "device.connected"
  case deviceReset = "device.reset"
  case deviceFailed = "device.failed"
  case deviceFaulted = "device.faulted"
  /// A queue stopped at an error of the storage; the guest waits for `device.resume`.
  case deviceHeld = "device.held"
  case deviceResumed = "device.resumed"
  case deviceStorageLost = "device.storeLost"
  case deviceStorageBack = "device.storeBack"
  case deviceRestarting = "device.restarting"
  case deviceRestarted = "device.restarted"
  case deviceQuarantined = "device.quarantined"
  case devicePaused = "device.paused"
  case deviceAdopted = "device.adopted"
  case deviceLimited = "device.limited"
  case deviceAttached = "device.attached"
  case deviceNotAttached = "device.notAttached"
  case deviceDetached = "device.detached"
  case deviceStuck = "device.stuck"
  case deviceUnstuck = "device.unstuck"
  case deviceResized = "device.resized"
  case deviceNotResized = "device.notResized"
  case deviceLinkChanged = "device.linkChanged"
  case deviceLinkNotChanged = "device.linkNotChanged"
  /// A program in the guest has opened or closed ports of a console device.
  case devicePorts = "device.ports"
  case deviceClosing = "device.closing"
  /// The end of a device takes longer than it should: its storage does not answer.
  case deviceClosesSlowly = "device.closesSlowly"
  case deviceGone = "device.gone"

  /// Whether a guest can bring it about as often as it likes. Over Xenbus that includes the end and the start of its devices: the
  /// frontend's directory is the guest's own.
  package var isGuestsDoing: Bool {
    switch self {
    case .guestAppeared, .guestGone, .deviceReady, .deviceConnected, .deviceReset, .deviceFaulted, .devicePorts,
      .deviceClosing, .deviceGone:
      true
    case .guestFailed, .guestRenamed, .deviceFailed, .deviceHeld, .deviceResumed, .deviceStorageLost,
      .deviceStorageBack,
      .deviceRestarting, .deviceRestarted, .deviceQuarantined, .devicePaused, .deviceAdopted, .deviceLimited,
      .deviceAttached, .deviceNotAttached, .deviceDetached, .deviceStuck, .deviceUnstuck, .deviceResized,
      .deviceNotResized, .deviceLinkChanged, .deviceLinkNotChanged, .deviceClosesSlowly:
      false
    }
  }

  /// Whether it deserves an operator's attention.
  package var isTrouble: Bool {
    switch self {
    case .guestFailed, .deviceFailed, .deviceFaulted, .deviceHeld, .deviceStorageLost, .deviceStuck, .deviceNotResized,
      .deviceLinkNotChanged,
      .deviceRestarting, .deviceQuarantined, .deviceNotAttached, .deviceClosesSlowly:
      true
    case .guestAppeared, .guestGone, .guestRenamed, .deviceReady, .deviceConnected, .deviceReset, .deviceResumed,
      .deviceStorageBack, .deviceRestarted, .devicePaused, .deviceAdopted, .deviceLimited, .deviceAttached,
      .deviceDetached, .deviceUnstuck, .deviceResized, .deviceLinkChanged, .devicePorts, .deviceClosing, .deviceGone:
      false
    }
  }
}
