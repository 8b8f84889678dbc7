/// The driver's half: what the guest does with the device.
extension DeviceMachine {
  /// The transport or a backend says where the driver stands.
  mutating func note(_ driver: Driver) {
    switch connection {
    case .inserting:
      switch style {
      case .registers: connection = .inserted(told(driver, over: .absent))
      case .handshake:
        connection = .xenbus(XenbusHandshake(earlier, &effects))
        effects.append(.readFrontend)
      }
    case .inserted(let old): connection = .inserted(told(driver, over: old))
    case .xenbus(var handshake):
      guard case .broken(let reason) = told(driver, over: handshake.driver) else { return }
      handshake.fail(reason)
      connection = .xenbus(handshake)
    case .absent, .leaveDue, .leaving: break  // on its way out, or never there: nothing follows from its driver
    }
  }

  /// A report that the device is broken keeps the reason that is known.
  private func told(_ new: Driver, over old: Driver) -> Driver {
    switch (new, old) {
    case (.broken(""), .broken), (.live, .broken): return old
    case (.broken(""), .absent), (.broken(""), .live):
      if case .lost(let reason) = earlier { return .broken(reason) }
      return .broken("the guest must reset the device")
    case (.absent, _), (.live, .absent), (.live, .live), (.broken, _): return new
    }
  }

  /// By registers, the driver has started or reset the device.
  mutating func driverChanged(_ new: Driver) {
    switch connection {
    case .inserted(let old):
      switch (old, new) {
      case (.absent, .live), (.broken, .live):
        // The second: a reset and a new start whose reports were merged.
        connection = .inserted(.live)
        // The guest runs, so creation is over and nobody waits for state 2 any more.
        effects += [.writeState(.connected, over: [.initialising, .initWait]), .tell(.deviceConnected, nil)]
      case (.live, .absent), (.broken, .absent):
        connection = .inserted(.absent)
        effects.append(.tell(.deviceReset, nil))
      case (_, .broken): connection = .inserted(told(new, over: old))  // the backend's own report has the reason
      case (.absent, .absent), (.live, .live): break
      }
    case .xenbus: break  // says it in Xenstore, where it is looked at
    case .inserting: break  // `plugged` says the same
    case .absent, .leaveDue, .leaving: break  // a report that was under way when the device left
    }
  }

  /// The driver did what it must not: too often, and the device is left alone.
  mutating func driverFaulted(_ reason: String, _ now: Moment) {
    effects.append(.tell(.deviceFaulted, reason))
    guard case .restart = faults.next(rules.restart, limit: rules.faultLimit, at: now) else {
      return quarantine(
        "\(reason); that was fault \(rules.faultLimit + 1) within \(rules.restart.windowSeconds) s")
    }
    guard rules.restart.mode == .always else { return }
    switch service {
    case .plugging, .serving: backendFailed(reason, now)
    // No backend is at work that may be at fault.
    case .new, .waiting, .starting, .opened, .stopping, .ended, .clearing, .released, .gone: break
    }
  }

  // MARK: Xenbus

  mutating func frontendChanged(_ view: FrontendView, _ now: Moment) {
    switch connection {
    case .xenbus(var handshake):
      handshake.view = view
      connection = .xenbus(handshake)
      lookAtDriver(now)
    case .absent, .inserting: break  // read again when the device is offered
    case .leaveDue, .leaving: break  // the device ends whatever the driver says
    case .inserted: effects.append(unexpected("a frontend of a device with registers"))
    }
  }

  mutating func connected(_ sequence: UInt32, _ result: DeviceEvent.ConnectResult, _ now: Moment) {
    switch connection {
    case .xenbus(var handshake):
      guard case .connecting(_, sequence) = handshake.phase else {
        return effects.append(unexpected("connected"))
      }
      var delay: (BackendID, Milliseconds) = (BackendID(0), 0)
      if case .noRoom = result {
        delay = (newNumber(), max(RestartBudget.pause(rules.startRetry, tries: handshake.tries, at: now), 1))
      }
      let outcome = handshake.connected(result, delay: delay, &effects)
      connection = .xenbus(handshake)
      follow(outcome, now)
      lookAtDriver(now)
    case .leaveDue, .leaving: break  // what was connected is disconnected on the way out
    case .absent, .inserting, .inserted: effects.append(unexpected("connected"))
    }
  }

  mutating func disconnected(_ now: Moment) {
    switch connection {
    case .xenbus(var handshake):
      guard handshake.phase == .disconnecting else { return effects.append(unexpected("disconnected")) }
      handshake.disconnected(&effects)
      connection = .xenbus(handshake)
      lookAtDriver(now)
    case .leaveDue, .leaving: break  // was under way when the device left
    case .absent, .inserting, .inserted: effects.append(unexpected("disconnected"))
    }
  }

  /// Does what follows from the frontend's nodes and the backend as they are.
  mutating func lookAtDriver(_ now: Moment) {
    guard case .xenbus(var handshake) = connection, !isEnding else { return }
    let outcome = handshake.advance(isBlocked: isQuarantined, isStopping: isStopping, &effects)
    connection = .xenbus(handshake)
    follow(outcome, now)
  }

  private mutating func follow(_ outcome: XenbusHandshake.Outcome, _ now: Moment) {
    switch outcome {
    case .nothing: break
    case .fault(let reason): driverFaulted(reason, now)
    case .finished: end(.closed(isAwaited: true))
    }
  }

  var isStopping: Bool {
    switch service {
    case .stopping: true
    case .new, .waiting, .starting, .opened, .plugging, .serving, .ended, .clearing, .released, .gone: false
    }
  }
}
