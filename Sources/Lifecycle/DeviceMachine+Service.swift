/// The host's half: backends come and go.
extension DeviceMachine {
  mutating func begin(after pause: Milliseconds, fuse: String?, _ now: Moment) {
    guard case .new = service else { return effects.append(unexpected("a second begin")) }
    askForWindow()
    if let fuse {
      service = .waiting(.rest(.quarantined(fuse)))
      effects.append(.tell(.deviceQuarantined, fuse))
      releaseCreation()
    } else {
      startLater(pause > 0 ? .retry("its guest closes and opens it too often") : .first, after: pause)
    }
  }

  // MARK: Start

  private mutating func start(_ occasion: Occasion) {
    if case .failed(let reason) = bus {
      service = .waiting(.bus(occasion))
      return refuse(reason)
    }
    let id = newNumber()
    isEntryNewer = false
    service = .starting(id, .use(occasion))
    effects.append(.start(id))
  }

  private mutating func startLater(_ occasion: Occasion, after pause: Milliseconds) {
    guard pause > 0 else { return start(occasion) }
    let number = newNumber()
    service = .waiting(.start(number, occasion))
    effects.append(.schedule(.start(number), pause))
  }

  mutating func started(_ objection: String?, _ now: Moment) {
    guard case .starting(let id, let wish) = service else { return effects.append(unexpected("started")) }
    switch wish {
    case .use(let occasion):
      guard case .proving(let image) = spare else { return use(id, occasion) }
      if let objection {
        giveBack(objection)
        return stop(id, .again(.restart("nothing is attached"), after: 0))
      }
      spare = .filled
      effects += [.saveAssignment, .tell(.deviceAttached, image)]
      use(id, .restart(image))
    case .next(let next): stop(id, next)
    }
  }

  private mutating func use(_ id: BackendID, _ occasion: Occasion) {
    switch bus {
    case .pending: service = .opened(id, occasion)
    case .ready: plug(id, occasion)
    case .failed: stop(id, .bus(occasion))
    }
  }

  mutating func plug(_ id: BackendID, _ occasion: Occasion) {
    guard connection != .leaving else {
      service = .opened(id, occasion)
      return
    }
    service = .plugging(id, occasion, Early())
    guard connection == .absent else { return effects.append(.plug(id)) }
    connection = .inserting
    var needsReset = false
    if style == .registers, case .lost = earlier { needsReset = true }
    effects.append(.insert(id, needsReset: needsReset))
  }

  mutating func startFailed(_ reason: String, isFinal: Bool, _ now: Moment) {
    guard case .starting(let id, let wish) = service else { return effects.append(unexpected("start failed")) }
    effects.append(.join(id))
    switch wish {
    case .use(let occasion):
      if case .proving = spare {
        giveBack(reason)
        return start(.restart("nothing is attached"))
      }
      service = .waiting(.rest(.failed(reason)))
      if connection == .absent || isFinal {
        couldNotServe(occasion, reason, isFinal: isFinal, now)
      } else {
        backendFailed(reason, now)
      }
    case .next(let next): perform(next)
    }
  }

  /// A device that the guest cannot find: it is tried again for as long as its entry stands, ever more slowly.
  private mutating func couldNotServe(_ occasion: Occasion, _ reason: String, isFinal: Bool, _ now: Moment) {
    if occasion != .retry(reason) { refuse(reason) } else if owesCreation { releaseCreation() }
    // A correction that has not been tried yet is the remedy, perhaps.
    if isEntryNewer { return proceed(.again(.retry(reason), after: 0)) }
    guard !isFinal, rules.restart.mode != .never else { return proceed(.rest(.failed(reason))) }
    let pause = RestartBudget.pause(rules.startRetry, tries: failedStarts, at: now)
    failedStarts += 1
    // A pause of nothing would make a try that fails at once a loop.
    proceed(.again(.retry(reason), after: max(pause, 1)))
  }

  /// The entry says why the device cannot be served; the guest and its other devices do without it.
  mutating func refuse(_ reason: String) {
    effects += [.tell(.deviceFailed, reason), .writeError(reason)]
    releaseCreation()
  }

  /// `xl create` waits for state 2 and would take the whole guest down without it.
  mutating func releaseCreation() {
    switch claim {
    case .none, .held:
      owesCreation = false
      effects.append(.writeState(.initWait, over: [.initialising]))
    case .due, .asked, .delayed: owesCreation = true
    }
  }

  // MARK: Its window

  /// Has the window claimed, once there is somebody to claim it.
  private mutating func askForWindow() {
    guard bus == .ready, !isEnding else { return }
    switch claim {
    case .due, .delayed:
      claim = .asked
      effects.append(.claim)
    case .none, .asked, .held: break
    }
  }

  mutating func claimed(_ reason: String?, _ now: Moment) {
    guard claim == .asked else { return }  // it is held since the device is in its place
    guard let reason else { return holdWindow() }
    let number = newNumber()
    claim = .delayed(number)
    if failedClaims == 0 { effects += [.tell(.deviceFailed, reason), .writeError(reason)] }
    effects.append(
      .schedule(.claim(number), max(RestartBudget.pause(rules.startRetry, tries: failedClaims, at: now), 1)))
    failedClaims += 1
  }

  mutating func claimAgain(_ number: BackendID) {
    guard claim == .delayed(number) else { return }  // it has been tried since
    claim = .due
    askForWindow()
  }

  private mutating func holdWindow() {
    claim = .held
    switch service {
    // On its way: the guest should find it.
    case .starting(_, .use), .opened, .plugging: break
    case .new, .waiting, .starting, .serving, .stopping: if owesCreation { releaseCreation() }
    case .ended, .clearing, .released, .gone: break
    }
  }

  // MARK: In its place

  mutating func plugged(_ driver: Driver, _ now: Moment) {
    switch service {
    case .plugging(let id, let occasion, let early):
      service = .serving(id, held: early.held)
      failedStarts = 0
      let isFirst = connection == .inserting
      note(driver)
      if claim != .none { holdWindow() }
      if let fault = early.fault { note(.broken(fault)) }
      effects.append(.writeError(nil))
      if style == .registers { releaseCreation() }
      announce(occasion, isFirst: isFirst)
      if case .lost(let reason) = earlier, isFirst, style == .handshake { driverFaulted(reason, now) }
      earlier = .nothing
      lookAtDriver(now)
    case .stopping:
      // The guest's thread had done it before it took the backend off again.
      note(driver)
      earlier = .nothing
    case .starting, .opened, .serving: effects.append(unexpected("plugged"))
    case .new, .waiting, .ended, .clearing, .released, .gone: break  // has no backend: `handle` has dropped it
    }
  }

  private mutating func announce(_ occasion: Occasion, isFirst: Bool) {
    if case .empty = occasion { return effects.append(.tell(.deviceDetached, nil)) }
    switch (driver, style) {
    case (.broken(let reason), .registers): return effects.append(.tell(.deviceFaulted, reason))
    case (.broken, .handshake): if isFirst { return }  // `driverFaulted` says it
    case (.absent, _), (.live, _): break
    }
    switch occasion {
    case .first, .retry:
      let isAdopted: Bool
      if case .adoptable(let driver) = earlier { isAdopted = driver == .live } else { isAdopted = false }
      effects.append(.tell(isAdopted ? .deviceAdopted : .deviceReady, nil))
    case .restart, .fill, .empty: effects.append(.tell(.deviceRestarted, nil))
    }
  }

  mutating func insertFailed(_ reason: String, _ now: Moment) {
    switch service {
    case .plugging(_, let occasion, _):
      connection = .absent
      couldNotServe(occasion, reason, isFinal: false, now)
    case .stopping:
      // While the device ends the guest's side is taken away in any case, and says so by itself.
      if connection == .inserting { connection = .absent }
    case .starting, .opened, .serving: effects.append(unexpected("insert failed"))
    case .new, .waiting, .ended, .clearing, .released, .gone: break  // has no backend: `handle` has dropped it
    }
  }

  // MARK: Failures

  mutating func reported(_ report: DeviceEvent.Report, _ now: Moment) {
    switch service {
    case .starting(_, .use), .opened, .plugging, .serving: break
    // Has nothing to say any more: each of its queues may report the same.
    case .starting(_, .next), .stopping: return
    case .new, .waiting, .ended, .clearing, .released, .gone: return  // has no backend: `handle` has dropped it
    }
    switch report {
    case .fault(let reason):
      if case .plugging(let id, let occasion, var early) = service {
        early.fault = reason
        service = .plugging(id, occasion, early)
      } else {
        note(.broken(reason))
      }
      driverFaulted(reason, now)
    case .gone(let reason): backendFailed(reason, now)
    case .held(let queue, let reason):
      hold(queue, reason)
      effects.append(.tell(.deviceHeld, reason))
    case .resumed(let queue):
      if hold(queue, nil) { effects.append(.tell(.deviceResumed, nil)) }
    case .lost(let reason): effects.append(.tell(.deviceStorageLost, reason))
    case .back: effects.append(.tell(.deviceStorageBack, nil))
    case .ports(let words): effects.append(.tell(.devicePorts, words))
    }
  }

  /// - Returns: whether the last queue that was held is free again.
  @discardableResult
  private mutating func hold(_ queue: Int, _ reason: String?) -> Bool {
    switch service {
    case .plugging(let id, let occasion, var early):
      let was = early.held.isEmpty
      early.held[queue] = reason
      service = .plugging(id, occasion, early)
      return !was && early.held.isEmpty
    case .serving(let id, var held):
      let was = held.isEmpty
      held[queue] = reason
      service = .serving(id, held: held)
      return !was && held.isEmpty
    case .new, .waiting, .starting, .opened, .stopping, .ended, .clearing, .released, .gone: return false
    }
  }

  /// A backend cannot go on: its requests wait in the journals.
  mutating func backendFailed(_ reason: String, _ now: Moment) {
    if connection == .absent, let occasion = occasionOfStart {
      return couldNotServe(occasion, reason, isFinal: false, now)
    }
    var pause: Milliseconds = 0
    // A correction that has not been tried yet is tried whatever the budget says.
    if !isEntryNewer {
      guard rules.restart.mode != .never, case .restart(let some) = restarts.next(rules.restart, at: now) else {
        return quarantine(reason)
      }
      pause = max(some, 1)
    }
    effects.append(.tell(.deviceRestarting, "\(reason); again in \(pause) ms"))
    proceed(.again(.restart(reason), after: pause))
  }

  private var occasionOfStart: Occasion? {
    switch service {
    case .starting(_, .use(let occasion)), .opened(_, let occasion): occasion
    case .new, .waiting, .starting, .plugging, .serving, .stopping, .ended, .clearing, .released, .gone: nil
    }
  }

  mutating func quarantine(_ reason: String) {
    guard !isQuarantined else { return }
    effects.append(.tell(.deviceQuarantined, reason))
    proceed(.rest(.quarantined(reason)))
  }

  var isQuarantined: Bool {
    switch service {
    case .waiting(.rest(.quarantined)), .stopping(_, .rest(.quarantined)), .starting(_, .next(.rest(.quarantined))):
      true
    case .new, .waiting, .starting, .opened, .plugging, .serving, .stopping, .ended, .clearing, .released, .gone: false
    }
  }

  // MARK: Stop

  mutating func stop(_ id: BackendID, _ next: Next) {
    service = .stopping(id, next)
    effects.append(.stop(id))
  }

  mutating func stopped(_ now: Moment) {
    guard case .stopping(let id, let next) = service else { return effects.append(unexpected("stopped")) }
    effects.append(.join(id))
    perform(next)
    lookAtDriver(now)
  }

  /// Goes on with `next` from wherever the device is: at once, or as soon as its backend has ended.
  mutating func proceed(_ next: Next) {
    switch service {
    case .new, .waiting: perform(next)
    case .starting(let id, _): service = .starting(id, .next(next))
    case .opened(let id, _), .plugging(let id, _, _), .serving(let id, _): stop(id, next)
    case .stopping(let id, _): service = .stopping(id, next)
    case .ended, .clearing, .released, .gone: effects.append(unexpected("\(next)"))
    }
  }

  /// What comes when there is no backend.
  private mutating func perform(_ next: Next) {
    if owesForgetting {
      owesForgetting = false
      effects.append(.forgetState)
    }
    switch next {
    case .again(let occasion, let pause): startLater(occasion, after: pause)
    case .bus(let occasion): service = .waiting(.bus(occasion))
    case .rest(let rest): service = .waiting(.rest(rest))
    case .end(let departure): service = .ended(departure)
    }
  }

  /// Its place is another's: no later daemon puts it there, whenever that comes. A backend that is being opened may save it once more.
  mutating func forgetPlace() {
    effects.append(.forgetState)
    owesForgetting = backend != nil
  }

  // MARK: The bus

  mutating func busIsReady(_ now: Moment) {
    bus = .ready
    askForWindow()
    switch service {
    case .opened(let id, let occasion): plug(id, occasion)
    case .waiting(.bus(let occasion)): start(occasion)
    case .starting(let id, .next(.bus(let occasion))):
      // It was given up when the bus had failed, which may be mended before the image is open. An older entry's is not used.
      service = .starting(id, isEntryNewer ? .next(.again(occasion, after: 0)) : .use(occasion))
    case .stopping(let id, .bus(let occasion)): service = .stopping(id, .again(occasion, after: 0))
    case .new, .waiting, .starting, .plugging, .serving, .stopping, .ended, .clearing, .released, .gone: break
    }
  }

  mutating func busHasFailed(_ reason: String, _ now: Moment) {
    let wasFailed: Bool
    if case .failed = bus { wasFailed = true } else { wasFailed = false }
    bus = .failed(reason)
    switch service {
    case .waiting(.start(_, let occasion)), .starting(_, .use(let occasion)),
      .starting(_, .next(.again(let occasion, _))),
      .opened(_, let occasion), .stopping(_, .again(let occasion, _)):
      proceed(.bus(occasion))
      if !wasFailed { refuse(reason) }
    case .waiting(.bus), .starting(_, .next(.bus)), .stopping(_, .bus): break
    case .waiting(.rest), .starting(_, .next(.rest)), .stopping(_, .rest): break  // comes to it when it is started
    case .starting(_, .next(.end)), .stopping(_, .end), .ended, .clearing, .released, .gone: break
    case .new: break  // `begin` looks at the bus
    case .plugging, .serving: effects.append(unexpected("bus failed"))
    }
  }
}
