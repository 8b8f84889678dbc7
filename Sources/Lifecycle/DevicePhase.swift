/// What operators see of a device's life. A projection of `DeviceMachine`: nobody assigns it.
///
///     opening ──► ready ──► connected ──► closing ──► (gone)
///        │          ▲  │        │ ▲ ▲────► held       (errors of the storage; `resume` leads back)
///        │          │  └────────┼─┼──────► faulted    (the guest's reset leads back to ready)
///        ▼          │           ▼ │
///      failed ──────┘      restarting ──► quarantined (until an operator restarts it, or its entry is corrected)
///     (when the entry                ▲
///      is corrected, or   paused ────┘                (`resume`)
///      by a retry)
package enum DevicePhase: Hashable, Sendable {
  /// The image is being opened, the guest's ioreq server prepared.
  case opening
  /// The guest can find the device; its driver has not taken it yet. Backend state 2.
  case ready
  /// The guest's driver is at work. Backend state 4.
  case connected
  /// The device cannot be served: the entry or its image is wrong. The entry's `error` node says the same.
  case failed(reason: String)
  /// The guest broke its queue: DEVICE_NEEDS_RESET is set.
  case faulted(reason: String)
  /// A queue stopped at an error of the storage, as the disk's policy says: the guest waits until an operator says `resume`.
  case held(reason: String)
  /// The backend failed and is started again; the guest's requests wait.
  case restarting(reason: String)
  /// The backend failed too often: it is left alone until an operator says `vxctl device restart`.
  case quarantined(reason: String)
  /// An operator paused the device; the guest's requests wait.
  case paused
  /// Requests are drained and everything is given back.
  case closing

  /// Every name, in the order of a device's life.
  package static let names = [
    "opening", "ready", "connected", "failed", "faulted", "held", "restarting", "quarantined", "paused", "closing",
  ]

  package var name: String {
    switch self {
    case .opening: "opening"
    case .ready: "ready"
    case .connected: "connected"
    case .failed: "failed"
    case .faulted: "faulted"
    case .held: "held"
    case .restarting: "restarting"
    case .quarantined: "quarantined"
    case .paused: "paused"
    case .closing: "closing"
    }
  }

  /// Why, where there is something to say.
  package var reason: String? {
    switch self {
    case .failed(let reason), .faulted(let reason), .held(let reason), .restarting(let reason),
      .quarantined(let reason):
      reason
    case .opening, .ready, .connected, .paused, .closing: nil
    }
  }
}
