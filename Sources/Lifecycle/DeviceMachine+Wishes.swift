/// What is wanted of a device: by its entry, by operators, by the end of its guest or of the daemon.
extension DeviceMachine {
  // MARK: The entry

  mutating func entryChanged(_ change: DeviceEvent.EntryChange, _ now: Moment) {
    switch change {
    case .corrected: corrected()
    case .gone, .moved: end(.closed(isAwaited: false))
    case .abandoned: end(.closed(isAwaited: true))
    case .closing:
      // A driver that is at work ends its requests first; the frontend's nodes say when.
      if case .xenbus(var handshake) = connection {
        handshake.isLeaving = true
        let waits = !handshake.mayFinish
        connection = .xenbus(handshake)
        if waits { return }
      }
      end(.closed(isAwaited: true))
    }
  }

  /// A corrected entry is always followed: at once where it may be the remedy, else with the next start.
  private mutating func corrected() {
    switch service {
    case .new, .plugging, .serving, .waiting(.bus): isEntryNewer = true
    case .waiting(.rest(.paused)): isEntryNewer = true
    case .starting(_, .next(.rest(.paused))), .stopping(_, .rest(.paused)): isEntryNewer = true
    case .starting(_, .next(.bus)), .stopping(_, .bus): isEntryNewer = true
    case .waiting(.start(_, let occasion)), .starting(_, .use(let occasion)), .opened(_, let occasion),
      .starting(_, .next(.again(let occasion, _))), .stopping(_, .again(let occasion, _)):
      follow(occasion)
    case .waiting(.rest(.failed(let reason))), .starting(_, .next(.rest(.failed(let reason)))),
      .stopping(_, .rest(.failed(let reason))), .waiting(.rest(.displaced(let reason))),
      .starting(_, .next(.rest(.displaced(let reason)))), .stopping(_, .rest(.displaced(let reason))):
      follow(.retry(reason))
    case .waiting(.rest(.quarantined)), .starting(_, .next(.rest(.quarantined))), .stopping(_, .rest(.quarantined)):
      restarts.forgive()
      faults.forgive()
      follow(connection == .absent ? .first : .restart("the entry was corrected"))
    case .starting(_, .next(.end)), .stopping(_, .end), .ended, .clearing, .released, .gone:
      break  // looked at again when the device is gone
    }
  }

  private mutating func follow(_ occasion: Occasion) {
    isEntryNewer = true
    failedStarts = 0
    proceed(.again(occasion, after: 0))
  }

  mutating func follow(_ restart: RestartPolicy, _ limits: RateLimits, isNews: Bool) {
    rules.restart = restart
    if limits != rules.limits { limit(limits, isNews: isNews) }
  }

  private mutating func limit(_ limits: RateLimits, isNews: Bool) {
    rules.limits = limits
    effects.append(.limit(limits, isNews: isNews))
    if spare == .filled { effects.append(.saveAssignment) }
  }

  // MARK: Operators

  mutating func obey(_ command: DeviceEvent.Command, _ now: Moment) {
    if case .end(let departure) = command { return end(departure) }
    if case .displace = command, isEnding { return displaceAtTheEnd() }
    guard !isEnding else { return }
    switch command {
    case .restart:
      effects.append(.forgive)
      restart("restarted by an operator")
    case .displace(let reason): displace(reason)
    case .pause: pause()
    case .resume: resume()
    case .adjust(let adjustment): adjust(adjustment)
    case .limit(let limits): limit(limits, isNews: true)
    case .fill(let image, let limits): fill(image, limits)
    case .detach(let deadline): detach(deadline)
    case .end: break  // done above
    }
  }

  /// The budgets are whole again, and what waits is tried.
  private mutating func restart(_ reason: String) {
    restarts.forgive()
    faults.forgive()
    switch service {
    case .waiting(.bus), .starting(_, .next(.bus)), .stopping(_, .bus): return effects.append(.retryBus)
    case .opened: return  // open, and waits for the bus alone
    case .new: return  // is being started as it is
    case .waiting, .starting, .plugging, .serving, .stopping: break
    case .ended, .clearing, .released, .gone: return  // `obey` has returned
    }
    guard connection != .absent else {
      failedStarts = 0
      return proceed(.again(.first, after: 0))
    }
    restarts.noteRestart()
    effects.append(.tell(.deviceRestarting, reason))
    proceed(.again(.restart(reason), after: 0))
  }

  /// The place is another's: the device is taken out of it, and fails until an operator or its entry says otherwise.
  private mutating func displace(_ reason: String) {
    if isDisplaced { return }
    switch connection {
    // At once, also while a backend is being stopped: no driver has found the device, so nothing is written to the guest's memory.
    case .inserting, .inserted:
      connection = .leaving
      effects.append(.remove)
    case .absent, .leaveDue, .leaving, .xenbus: break
    }
    earlier = .nothing
    forgetPlace()
    dropWhatIsBeingOpened()
    if case .proving = spare { giveBack(reason) }
    if isQuarantined { return }
    refuse(reason)
    proceed(.rest(.displaced(reason)))
  }

  /// The guest does not find the device any more, which was to be left to the next daemon.
  private mutating func displaceAtTheEnd() { if departure == .handedOver { forgetPlace() } }

  private var isDisplaced: Bool {
    switch service {
    case .waiting(.rest(.displaced)), .starting(_, .next(.rest(.displaced))), .stopping(_, .rest(.displaced)): true
    case .new, .waiting, .starting, .opened, .plugging, .serving, .stopping, .ended, .clearing, .released, .gone: false
    }
  }

  /// It was started by what does not hold any more, and is not used, whatever comes before it is open.
  private mutating func dropWhatIsBeingOpened() { if case .starting = service { isEntryNewer = true } }

  /// The backend ends; the guest's requests wait.
  private mutating func pause() {
    switch service {
    case .plugging, .serving: break
    case .waiting(.start), .starting, .stopping(_, .again):
      guard connection != .absent else { return }  // nobody's requests wait
    case .stopping(_, .rest), .stopping(_, .bus), .waiting(.rest), .waiting(.bus): return  // rests already
    case .new, .opened: return  // the guest does not know it yet
    case .stopping(_, .end), .ended, .clearing, .released, .gone: return  // `obey` has returned
    }
    effects.append(.tell(.devicePaused, nil))
    proceed(.rest(.paused))
  }

  private mutating func adjust(_ adjustment: Adjustment) {
    switch service {
    case .opened(let id, _), .plugging(let id, _, _), .serving(let id, _): effects.append(.adjust(id, adjustment))
    case .new, .waiting, .starting, .stopping:
      effects.append(adjustment.news(.failed("the device is not served now")))
    case .ended, .clearing, .released, .gone: break  // `obey` has returned
    }
  }

  private mutating func resume() {
    switch service {
    case .serving(let id, let held): if !held.isEmpty { effects.append(.resume(id)) }
    case .plugging(let id, _, let early): if !early.held.isEmpty { effects.append(.resume(id)) }
    case .waiting(.rest(.paused)), .starting(_, .next(.rest(.paused))), .stopping(_, .rest(.paused)):
      restart("restarted by an operator")
    case .new, .waiting, .starting, .opened, .stopping: break  // neither held nor paused
    case .ended, .clearing, .released, .gone: break  // `obey` has returned
    }
  }

  // MARK: Spare disks

  private mutating func fill(_ image: String, _ limits: RateLimits?) {
    let objection: String? =
      switch spare {
      case nil: "the device is not a spare disk"
      case .proving, .filled: "the spare disk is in use"
      case .empty: isQuarantined ? "the spare disk is quarantined: restart it first" : nil
      }
    if let objection { return effects.append(.tell(.deviceNotAttached, objection)) }
    // No backend comes any more that would say so.
    if isBeingEmptied { effects.append(.tell(.deviceDetached, nil)) }
    if let limits { limit(limits, isNews: false) }
    spare = .proving(image)
    effects.append(.assign(image: image))
    dropWhatIsBeingOpened()
    proceed(.again(.fill(image), after: 0))
  }

  private mutating func detach(_ deadline: Milliseconds) {
    switch spare {
    case .filled:
      let number = newNumber()
      drain = number
      effects += [.watchDrain(number), .schedule(.drain(number), deadline)]
    case .proving:
      giveBack("detached before it was open")
      dropWhatIsBeingOpened()
      proceed(.again(.empty("detached"), after: 0))
    case .empty, nil: break  // as it is to be
    }
  }

  /// The image that a spare disk was to get is not attached.
  mutating func giveBack(_ reason: String) {
    spare = .empty
    effects += [.tell(.deviceNotAttached, reason), .empty]
  }

  private var isBeingEmptied: Bool {
    switch service {
    case .waiting(.start(_, .empty)), .waiting(.bus(.empty)), .starting(_, .use(.empty)),
      .starting(_, .next(.again(.empty, _))), .starting(_, .next(.bus(.empty))), .opened(_, .empty),
      .plugging(_, .empty, _), .stopping(_, .again(.empty, _)), .stopping(_, .bus(.empty)):
      true
    case .new, .waiting, .starting, .opened, .plugging, .serving, .stopping, .ended, .clearing, .released, .gone: false
    }
  }

  // MARK: Time

  mutating func expired(_ timer: DeviceTimer, _ now: Moment) {
    switch timer {
    case .start(let number):
      // Another start, a rest or the end has come meanwhile where this is not the one.
      guard case .waiting(.start(number, let occasion)) = service else { return }
      proceed(.again(occasion, after: 0))
    case .room(let number):
      guard case .xenbus(var handshake) = connection else { return }
      handshake.pauseIsOver(number)
      connection = .xenbus(handshake)
      lookAtDriver(now)
    case .drain(let number): drained(number, "detached by force", now)
    case .claim(let number): claimAgain(number)
    case .end(let number):
      guard number == endNumber else { return }  // of another device, which had this name before
      switch service {
      case .starting(_, .next(.end)), .stopping(_, .end):
        effects.append(.tell(.deviceClosesSlowly, "its storage does not answer"))
      case .ended: effects.append(.tell(.deviceClosesSlowly, "its guest's thread does not answer"))
      case .clearing: effects.append(.tell(.deviceClosesSlowly, "its interface or files are not removed"))
      case .released, .gone: break  // done
      case .new, .waiting, .starting, .opened, .plugging, .serving, .stopping: effects.append(unexpected("end timer"))
      }
    }
  }

  mutating func drained(_ number: BackendID, _ words: String, _ now: Moment) {
    guard drain == number else { return }  // the other of deadline and drain came first, or another detach
    drain = nil
    spare = .empty
    effects += [.empty, .forgetAssignment]
    dropWhatIsBeingOpened()
    proceed(.again(.empty(words), after: 0))
  }

  // MARK: The end

  /// Ends the device. The guest's side is taken away first, so that what is behind the transport is quiet, unless a backend is being
  /// stopped that may still write to the guest's memory: then that is joined first.
  mutating func end(_ departure: Departure) {
    guard !isEnding else { return merge(departure) }
    drain = nil
    if case .proving = spare { giveBack("the device ends") }
    if departure != .handedOver { effects.append(.tell(.deviceClosing, nil)) }
    switch connection {
    case .absent: break
    case .inserting, .inserted, .xenbus:
      if departure == .handedOver || isStopping {
        connection = .leaveDue
      } else {
        connection = .leaving
        effects.append(.remove)
      }
    case .leaveDue, .leaving: break  // its place was another's
    }
    proceed(.end(departure))
    let number = newNumber()
    endNumber = number
    effects += [.schedule(.end(number), rules.slowEnd), .leaving]
  }

  /// Somebody waits for state 6 of a device that is ending already.
  private mutating func merge(_ departure: Departure) {
    guard departure == .closed(isAwaited: true) else { return }
    switch service {
    case .starting(let id, .next(.end(.closed))): service = .starting(id, .next(.end(departure)))
    case .stopping(let id, .end(.closed)): service = .stopping(id, .end(departure))
    case .ended(.closed): service = .ended(departure)
    case .clearing(.closed): service = .clearing(departure)
    case .released(.closed): service = .released(departure)
    case .starting, .stopping, .ended, .clearing, .released: break  // handed over
    case .gone: break
    case .new, .waiting, .opened, .plugging, .serving: effects.append(unexpected("merge"))
    }
  }

  mutating func removed() {
    guard connection == .leaving else { return effects.append(unexpected("removed")) }
    connection = .absent
    // Another backend was quicker than the guest's thread.
    if case .opened(let id, let occasion) = service, bus == .ready { plug(id, occasion) }
  }

  /// Gives back what is left once there is no backend.
  mutating func settle() {
    guard case .ended(let departure) = service else { return }
    if connection == .leaveDue {
      switch (departure, style) {
      case (.handedOver, .registers):
        // The guest keeps the device where it is: its accesses wait for the next daemon.
        connection = .absent
      case (.handedOver, .handshake):
        connection = .leaving
        effects.append(.leave)
      case (.closed, _):
        connection = .leaving
        effects.append(.remove)
      }
    }
    guard connection == .absent else { return }
    switch departure {
    case .handedOver:
      service = .released(departure)
      effects.append(.released)
    case .closed:
      service = .clearing(departure)
      effects.append(.removeTraces)
    }
  }

  mutating func cleared() {
    guard case .clearing(let departure) = service else { return effects.append(unexpected("cleared")) }
    service = .released(departure)
    effects.append(.released)
  }

  mutating func dismissed() {
    guard case .released(let departure) = service else { return effects.append(unexpected("dismissed")) }
    service = .gone
    switch departure {
    case .handedOver: break
    case .closed(let isAwaited):
      effects += [.forgetState, .forgetAssignment]
      if isAwaited { effects.append(.writeClosed) }
      effects += [.removeEntry, .tell(.deviceGone, nil), .lookAgain]
    }
  }
}

extension DeviceMachine {
  /// What operators see.
  package var phase: DevicePhase {
    switch service {
    case .new: .opening
    case .waiting(.start(_, let occasion)), .starting(_, .use(let occasion)): Self.phase(occasion)
    case .waiting(.bus), .starting(_, .next(.bus)), .stopping(_, .bus): busPhase
    case .waiting(.rest(let rest)), .starting(_, .next(.rest(let rest))), .stopping(_, .rest(let rest)):
      Self.phase(rest)
    case .starting(_, .next(.again(let occasion, _))), .stopping(_, .again(let occasion, _)): Self.phase(occasion)
    case .opened(_, .retry), .plugging(_, .retry, _): .opening
    case .opened(_, let occasion), .plugging(_, let occasion, _): Self.phase(occasion)
    case .serving(_, let held):
      switch driver {
      case .broken(let reason): .faulted(reason: reason)
      case .live: held.min { $0.key < $1.key }.map { .held(reason: $0.value) } ?? .connected
      case .absent: .ready
      }
    case .starting(_, .next(.end)), .stopping(_, .end), .ended, .clearing, .released, .gone: .closing
    }
  }

  private var busPhase: DevicePhase {
    if case .failed(let reason) = bus { .failed(reason: reason) } else { .opening }
  }

  private static func phase(_ rest: Rest) -> DevicePhase {
    switch rest {
    case .failed(let reason), .displaced(let reason): .failed(reason: reason)
    case .quarantined(let reason): .quarantined(reason: reason)
    case .paused: .paused
    }
  }

  private static func phase(_ occasion: Occasion) -> DevicePhase {
    switch occasion {
    case .first: .opening
    // A device in trouble must not look well for the moment of another try.
    case .retry(let reason): .failed(reason: reason)
    case .restart(let reason), .fill(let reason), .empty(let reason): .restarting(reason: reason)
    }
  }
}
