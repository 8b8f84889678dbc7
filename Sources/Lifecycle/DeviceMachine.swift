/// A device's life: what happens to it goes in as events, what is to be done comes out as effects. A value: no thread, clock, Xenstore or log.
///
/// Two halves stand side by side. `service` is the host's: which backend there is, and what comes when it has ended. `connection` is the
/// driver's: whether the guest can find the device, and what its driver has said. At any moment there is at most one backend, and
/// a state names the backend exactly where its threads exist, so that none can be forgotten.
package struct DeviceMachine: Hashable, Sendable {
  /// The host's half.
  package enum Service: Hashable, Sendable {
    /// Nothing has happened yet.
    case new
    /// There is no backend.
    case waiting(Need)
    /// Its threads exist, its image is being opened. It cannot be stopped before that is over.
    case starting(BackendID, Wish)
    /// Open, while the guest's bus is not there yet.
    case opened(BackendID, Occasion)
    /// On its way into the transport, on the guest's thread.
    case plugging(BackendID, Occasion, Early)
    /// Behind the transport. `held`: queues that an error of the storage has stopped, and why.
    case serving(BackendID, held: [Int: String])
    /// Taken off the transport, closed by its threads; then joined.
    case stopping(BackendID, Next)
    /// It is joined; the guest's side is being given back.
    case ended(Departure)
    /// Nothing of the guest is held any more; what outlives backends is being removed.
    case clearing(Departure)
    /// Everything of the device is given back; the guest decides when it may be forgotten.
    case released(Departure)
    case gone
  }

  /// What a backend reported before the guest's thread said that it is behind the transport.
  package struct Early: Hashable, Sendable {
    package var held: [Int: String] = [:]
    package var fault: String?
  }

  /// What a device without a backend waits for.
  package enum Need: Hashable, Sendable {
    /// The end of a pause, which is numbered.
    case start(BackendID, Occasion)
    /// The guest's bus, which has failed.
    case bus(Occasion)
    /// An operator, or a corrected entry.
    case rest(Rest)
  }

  package enum Rest: Hashable, Sendable {
    case failed(String)
    /// Its place is another's, for this reason.
    case displaced(String)
    case quarantined(String)
    case paused
  }

  /// What comes when a backend that is being opened is open.
  package enum Wish: Hashable, Sendable {
    case use(Occasion)
    /// It is not wanted any more: it is stopped, then this.
    case next(Next)
  }

  /// What comes when there is no backend any more.
  package enum Next: Hashable, Sendable {
    case again(Occasion, after: Milliseconds)
    case bus(Occasion)
    case rest(Rest)
    case end(Departure)
  }

  /// Why a backend is started.
  package enum Occasion: Hashable, Sendable {
    case first
    /// It could not be started before, for this reason.
    case retry(String)
    /// One before it failed or was in the way.
    case restart(String)
    /// A spare disk gets an image, which has to prove itself.
    case fill(String)
    /// A spare disk becomes empty.
    case empty(String)
  }

  /// What a spare disk has of an image.
  package enum Spare: Hashable, Sendable {
    case empty
    /// It gets this one, which has to prove itself: the first backend that opens it says, whatever it was started for.
    case proving(String)
    case filled
  }

  /// The driver's half.
  package enum Connection: Hashable, Sendable {
    /// The guest cannot find the device.
    case absent
    /// The guest's thread puts it there.
    case inserting
    /// In its place, with a driver that works by registers.
    case inserted(Driver)
    case xenbus(XenbusHandshake)
    /// To be taken away once the backend is joined.
    case leaveDue
    /// The guest's thread takes it away.
    case leaving
  }

  /// The window of a device that its guest looks for at once and whatever becomes of it (a node of its device tree). Where nobody answers
  /// there, the guest's kernel dies: so nobody may be told to go on with the guest before it is claimed.
  package enum Claim: Hashable, Sendable {
    /// There is none, or nothing comes of accesses that nobody answers.
    case none
    case due
    case asked
    /// It could not be claimed, and is tried again after a pause, which is numbered.
    case delayed(BackendID)
    case held
  }

  package internal(set) var service = Service.new
  package internal(set) var connection: Connection
  package internal(set) var bus: Bus
  package let style: BusStyle
  /// Whether its bus is there only when the server of the guest's accesses is.
  package let needsServer: Bool
  package internal(set) var claim: Claim
  /// Tries to claim the window that failed.
  package internal(set) var failedClaims = 0
  /// State 2 is to be written as soon as the window is claimed.
  package internal(set) var owesCreation = false
  /// Policies and limits; they may change at any time.
  package internal(set) var rules: DeviceRules
  /// Failures of backends, and restarts.
  package internal(set) var restarts = RestartBudget()
  /// Faults of the driver.
  package internal(set) var faults = RestartBudget()
  /// Tries to start it that failed since it was last served.
  package internal(set) var failedStarts = 0
  /// What was there of the device before this daemon, until it is served.
  package internal(set) var earlier: Earlier
  /// nil for a device that is no spare disk.
  package internal(set) var spare: Spare?
  /// The entry has changed since the last start, or what else it was started by: what is being opened is not used.
  package internal(set) var isEntryNewer = false
  /// A backend may have saved a place that is another's: that is forgotten again as soon as it has ended, whatever comes next.
  package internal(set) var owesForgetting = false
  /// A detach waits for the device's requests, under this number.
  package internal(set) var drain: BackendID?
  /// Of the timer that began with the device's end.
  package internal(set) var endNumber: BackendID?
  /// The last number that was given away.
  package internal(set) var lastNumber: UInt64
  /// Collected while an event is handled; empty between events.
  var effects: [DeviceEffect] = []

  /// - Parameters:
  ///   - needsServer: nil where devices of the style do.
  ///   - hasWindow: its guest looks for it where nobody else answers, see `Claim`.
  ///   - numbersAfter: where its numbers begin: they must differ from those of every earlier device of the same name, whose timers may
  ///     still run.
  package init(
    _ style: BusStyle, _ rules: DeviceRules, needsServer: Bool? = nil, hasWindow: Bool = false,
    bus: Bus = .pending, earlier: Earlier = .nothing, spare: Spare? = nil, numbersAfter: UInt64 = 0
  ) {
    self.style = style
    self.needsServer = needsServer ?? (style == .registers)
    lastNumber = numbersAfter
    self.rules = rules
    claim = hasWindow ? .due : .none
    self.bus = bus
    self.earlier = earlier
    self.spare = spare
    connection = .absent
    if style == .registers, case .adoptable(let driver) = earlier { connection = .inserted(driver) }
  }

  /// The backend whose threads exist.
  package var backend: BackendID? {
    switch service {
    case .starting(let id, _), .opened(let id, _), .plugging(let id, _, _), .serving(let id, _), .stopping(let id, _):
      id
    case .new, .waiting, .ended, .clearing, .released, .gone: nil
    }
  }

  /// How the device ends, once it does.
  package var departure: Departure? {
    switch service {
    case .starting(_, .next(.end(let departure))), .stopping(_, .end(let departure)), .ended(let departure),
      .clearing(let departure), .released(let departure):
      departure
    case .gone: .closed(isAwaited: false)
    case .new, .waiting, .starting, .opened, .plugging, .serving, .stopping: nil
    }
  }

  package var isEnding: Bool { departure != nil }

  /// Where the driver stands.
  package var driver: Driver {
    switch connection {
    case .inserted(let driver): driver
    case .xenbus(let handshake): handshake.driver
    case .absent, .inserting, .leaveDue, .leaving: .absent
    }
  }

  /// What happens at an event. Events that say something of another backend than the present one change nothing.
  ///
  /// - Returns: what is to be done, in this order.
  package mutating func handle(_ event: DeviceEvent, at now: Moment) -> [DeviceEffect] {
    if let id = event.backend, id != backend { return [] }
    switch event {
    case .begin(let pause, let fuse): begin(after: pause, fuse: fuse, now)
    case .entry(let change): entryChanged(change, now)
    case .rules(let restart, let limits, let isNews): follow(restart, limits, isNews: isNews)
    case .command(let command): obey(command, now)
    case .busReady: busIsReady(now)
    case .busFailed(let reason): busHasFailed(reason, now)
    case .started(_, let objection): started(objection, now)
    case .startFailed(_, let reason, let isFinal): startFailed(reason, isFinal: isFinal, now)
    case .stopped: stopped(now)
    case .report(_, let report): reported(report, now)
    case .adjusted(_, let adjustment, let outcome): effects.append(adjustment.news(outcome))
    case .plugged(_, let driver): plugged(driver, now)
    case .insertFailed(_, let reason): insertFailed(reason, now)
    case .claimed(let reason): claimed(reason, now)
    case .removed: removed()
    case .cleared: cleared()
    case .driver(let driver): driverChanged(driver)
    case .frontend(let view): frontendChanged(view, now)
    case .connected(let sequence, let result): connected(sequence, result, now)
    case .disconnected: disconnected(now)
    case .timer(let timer): expired(timer, now)
    case .drained(let number): drained(number, "detached", now)
    case .dismissed: dismissed()
    }
    settle()
    defer { effects = [] }
    return effects
  }

  func unexpected(_ event: String) -> DeviceEffect { .unexpected("\(event) while \(service), \(connection)") }

  /// A number that no backend, timer or drain of the device has had.
  mutating func newNumber() -> BackendID {
    lastNumber += 1
    return BackendID(lastNumber)
  }
}

/// How a guest's bus lets a driver take a device.
package enum BusStyle: Hashable, Sendable {
  /// Registers that trap: the device is there as soon as it is in its place.
  case registers
  /// Offers and answers in Xenstore.
  case handshake
}

/// The bus of the device's guest.
package enum Bus: Hashable, Sendable {
  case pending
  case ready
  case failed(String)
}

/// What an earlier daemon left of a device.
package enum Earlier: Hashable, Sendable {
  case nothing
  /// State that fits: by registers, the device is in its place already.
  case adoptable(Driver)
  /// An offer that nobody took, or perhaps just now.
  case offered
  /// The driver takes the device for live, and what is known of it cannot be used.
  case lost(String)
}

/// What operators decide about a device's life.
package struct DeviceRules: Hashable, Sendable {
  package var restart = RestartPolicy()
  package var limits = RateLimits()
  /// Faults of the driver within the window of the restart policy; one more, and the device is quarantined.
  package var faultLimit = 50
  /// Pauses between tries to start a device that was never served, and to connect a driver for which there is no room.
  package var startRetry: RestartPolicy = {
    var policy = RestartPolicy()
    policy.firstPause = 1000
    return policy
  }()
  /// After which the end of a device is worth an operator's attention.
  package var slowEnd: Milliseconds = 30_000

  package init() {}
}
