/// What can happen to a device. Every event comes from the shell: Xenstore, the guest's thread, the data threads, a timer, an operator.
package enum DeviceEvent: Hashable, Sendable {
  // MARK: What is wanted

  /// The device's first event.
  ///
  /// - Parameters:
  ///   - after: a pause before the first backend is started: the guest opens and closes its device too often.
  ///   - fuse: why no backend is to be started until an operator says so; nil for a device that may be.
  case begin(after: Milliseconds, fuse: String?)
  case entry(EntryChange)
  /// What the profiles and the entry say of failures and limits, from now on.
  /// - Parameter isNews: operators are told of limits that change.
  case rules(RestartPolicy, RateLimits, isNews: Bool)
  case command(Command)

  // MARK: The guest's bus

  /// What the guest reaches devices by is there: its ioreq server, its Xenbus.
  case busReady
  case busFailed(String)

  // MARK: The backend

  /// It is open. `objection` says why it does not do for a spare disk that is being filled.
  case started(BackendID, objection: String?)
  /// It could not be opened; its threads have nothing left to do. `isFinal`: the entry itself is wrong, another try is no use.
  case startFailed(BackendID, String, isFinal: Bool)
  /// It was taken off its transport and has closed what it had open; its threads have nothing left to do.
  case stopped(BackendID)
  case report(BackendID, Report)
  /// What became of an `adjust`.
  case adjusted(BackendID, Adjustment, Adjustment.Outcome)

  // MARK: The guest's thread

  /// The backend is behind the transport, and where the driver stood then.
  case plugged(BackendID, Driver)
  /// The device could not be put where the guest finds it.
  case insertFailed(BackendID, String)
  /// The guest's accesses to the device's window are answered from now on, whatever becomes of the device; or why not.
  case claimed(String?)
  /// Nothing of the device is where the guest could reach it; over Xenbus, no page of the guest is mapped.
  case removed
  /// What outlives backends is removed.
  case cleared
  /// The driver started or reset the device by its registers.
  case driver(Driver)
  case frontend(FrontendView)
  case connected(sequence: UInt32, ConnectResult)
  case disconnected

  // MARK: Time

  case timer(DeviceTimer)
  /// Nothing is under way any more in a device that is to be detached.
  case drained(BackendID)

  // MARK: The guest as a whole

  /// Everything that had to be given back before the device may be forgotten is.
  case dismissed

  /// What became of the entry in Xenstore, as `Reconciler` sees it.
  package enum EntryChange: Hashable, Sendable {
    /// What describes the device is another than before.
    case corrected
    /// The toolstack wants the device gone and waits for state 6.
    case closing
    /// The guest's side is gone, without a word of the toolstack.
    case abandoned
    /// The entry itself is gone: nobody waits for anything.
    case gone
    /// The entry is for another bus now, and the guest does not know the device yet: it ends here and comes again there.
    case moved
  }

  /// What an operator can do to a device.
  package enum Command: Hashable, Sendable {
    case restart
    /// The device is in another's place, and is taken out of it: it fails for this reason.
    case displace(String)
    case pause
    /// After a hold or a pause.
    case resume
    /// Changes something of a device that is served.
    case adjust(Adjustment)
    /// For requests from now on, until the profiles are loaded again.
    case limit(RateLimits)
    /// A spare disk gets an image, with other limits where they are given.
    case fill(image: String, limits: RateLimits?)
    /// A spare disk becomes empty once its requests are answered, or by force after the deadline.
    case detach(deadline: Milliseconds)
    /// The daemon ends, or the guest has.
    case end(Departure)
  }

  /// What a backend has to say.
  package enum Report: Hashable, Sendable {
    /// The guest broke a queue: the device waits for a reset.
    case fault(String)
    /// What it works with is gone for good.
    case gone(String)
    /// A queue stopped at an error and waits for an operator.
    case held(queue: Int, String)
    case resumed(queue: Int)
    /// A server is out of reach; requests wait.
    case lost(String)
    case back
    case ports(String)
  }

  package enum ConnectResult: Hashable, Sendable {
    case connected
    /// No room now; another try later may do.
    case noRoom(String)
    /// The setup page is wrong.
    case refused(String)
  }

  /// The backend that the event is about, where it is about one.
  var backend: BackendID? {
    switch self {
    case .started(let id, _), .startFailed(let id, _, _), .stopped(let id), .report(let id, _), .plugged(let id, _),
      .insertFailed(let id, _), .adjusted(let id, _, _):
      id
    case .begin, .entry, .rules, .command, .busReady, .busFailed, .claimed, .removed, .cleared, .driver, .frontend,
      .connected,
      .disconnected,
      .timer, .drained, .dismissed:
      nil
    }
  }
}

/// Where the guest's driver stands.
package enum Driver: Hashable, Sendable {
  /// No driver has started the device, or it has reset it.
  case absent
  /// DRIVER_OK.
  case live
  /// DEVICE_NEEDS_RESET, and why where that is known.
  case broken(String)
}

/// How a device ends.
package enum Departure: Hashable, Sendable {
  /// For good. `isAwaited`: somebody waits for state 6.
  case closed(isAwaited: Bool)
  /// The daemon ends; the guest keeps the device, and the next daemon serves it.
  case handedOver
}

package enum DeviceTimer: Hashable, Sendable {
  /// The pause before a start is over.
  case start(BackendID)
  /// Another try to connect a driver for which there was no room.
  case room(BackendID)
  /// The deadline of a detach.
  case drain(BackendID)
  /// Another try to claim the device's window.
  case claim(BackendID)
  /// The end should have been reached by now.
  case end(BackendID)
}
