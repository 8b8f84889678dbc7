/// What the shell has to do for a device, in this order. "On the guest's thread" means: one after the other there, in the order of the
/// effects.
package enum DeviceEffect: Hashable, Sendable {
  // MARK: The backend

  /// Makes its threads and opens it, by the device's newest entry. Answered by `started` or `startFailed`.
  case start(BackendID)
  /// Takes it off its transport, if it is behind one, on the guest's thread; then its data threads close it. Answered by `stopped`.
  case stop(BackendID)
  /// Its threads have nothing left to do: joins them. Not answered.
  case join(BackendID)
  /// Tries the requests again that an error of the storage holds up.
  case resume(BackendID)
  /// Answered by `adjusted`.
  case adjust(BackendID, Adjustment)
  /// Requests from now on keep to these, whatever backend there is.
  /// - Parameter isNews: operators are told.
  case limit(RateLimits, isNews: Bool)
  /// An operator has taken the device into use again: the crashes that it was part of are forgotten.
  case forgive

  // MARK: The guest's thread

  /// Claims the device's window as an empty slot: the guest's accesses are answered. Answered by `claimed`.
  case claim
  /// Makes the transport with this backend behind it and puts it where the guest finds it. Answered by `plugged` or `insertFailed`.
  /// - Parameter needsReset: the driver takes the device for live, and nothing is known of it.
  case insert(BackendID, needsReset: Bool)
  /// Puts a new backend behind the transport. Answered by `plugged`.
  case plug(BackendID)
  /// Takes the device away from the guest: what is behind the transport is reset first, and over Xenbus all pages are unmapped. Answered
  /// by `removed`.
  case remove
  /// As `remove`, without a trace for the driver: the next daemon goes on. Answered by `removed`.
  case leave
  /// Maps and binds what the driver's setup page names. Answered by `connected`.
  case connect(sequence: UInt32, reference: UInt32, adopts: Bool)
  /// The driver's reset: what is behind the transport is reset, then everything is unmapped. Answered by `disconnected`.
  case disconnect
  case writeConfiguration(FrontendView.ConfigurationWrite)
  /// DEVICE_NEEDS_RESET.
  case needReset

  // MARK: Xenstore

  /// A new offer with another epoch, the configuration space, and state 2, in one transaction.
  case offer
  /// Reads the frontend's nodes. Answered by `frontend`.
  case readFrontend
  /// `vx-config`, if it says something else than before.
  case publishConfiguration
  case acknowledge(sequence: UInt32, Acknowledgement)
  /// The `error` node; nil removes it.
  case writeError(String?)
  /// The `state` node, when it holds one of these values now; any value when there is none.
  case writeState(XenbusState, over: [XenbusState])
  /// State 6 at the end of the device: everything is given back.
  case writeClosed
  /// Removes the entry where the backend's domain has to.
  case removeEntry
  /// An entry with the same name may have come meanwhile.
  case lookAgain

  // MARK: What lasts

  /// The spare disk's entry is of this image.
  case assign(image: String)
  /// The spare disk's entry becomes empty.
  case empty
  case saveAssignment
  case forgetAssignment
  /// The state file.
  case forgetState
  /// What outlives backends: interfaces, consoles' memories. On the guest's thread, since other programs may be waited for. Answered by
  /// `cleared`.
  case removeTraces

  // MARK: Others

  case schedule(DeviceTimer, Milliseconds)
  /// Reports `drained` with this number when no request is under way.
  case watchDrain(BackendID)
  case tell(News, String?)
  /// The guest's bus is to be tried again. For `GuestMachine`.
  case retryBus
  /// The device has begun to end. For `GuestMachine`.
  case leaving
  /// All of the device is given back. For `GuestMachine`.
  case released
  /// The shell reported something that cannot be: a defect of vxd, for its log.
  case unexpected(String)

  package enum Acknowledgement: Hashable, Sendable {
    case ok
    case wait
    case error(String)
  }
}
