@testable import Lifecycle

/// Everything that can happen next.
enum Action: Hashable {
  case work(PlayedGuest.Outcome)
  case opened(Int, BackendID, objection: Bool)
  case openFailed(Int, BackendID, isFinal: Bool)
  case closed(Int, BackendID)
  case report(Int, BackendID, DeviceEvent.Report)
  case timer(Int, DeviceTimer)
  case serverTimer(UInt64)
  case drained(Int, BackendID)
  case adjusted(Int, BackendID)
  case driver(Int, Driver)
  case frontend(Int, FrontendView)
  case entry(Int, DeviceEvent.EntryChange)
  /// A device that left for another bus is there, or its entry is not.
  case again(Int)
  case absent(Int)
  case command(Int, DeviceEvent.Command)
  case domainGone
  case end(Departure)
}

extension PlayedGuest {
  private static let reports: [DeviceEvent.Report] = [
    .fault("ring"), .gone("io"), .held(queue: 0, "full"), .resumed(queue: 0),
  ]

  private static let views: [FrontendView] = [
    FrontendView(state: .initialising), FrontendView(state: .initialised, setup: .page(sequence: 1, reference: 8)),
    FrontendView(state: .connected, setup: .page(sequence: 2, reference: 9)),
    FrontendView(state: .initialised, setup: .malformed), FrontendView(state: .closing), FrontendView(state: .closed),
    FrontendView(
      state: .connected, setup: .page(sequence: 2, reference: 9), write: .init(number: 1, offset: 32, bytes: [0])),
  ]

  private static let commands: [DeviceEvent.Command] = [
    .restart, .pause, .resume, .adjust(.resize(bytes: nil)), .limit(.reads(2)),
    .displace("QEMU's"),
  ]

  /// - Parameter wishes: also what entries, operators and the daemon may want.
  func actions(wishes: Bool = true) -> [Action] {
    guard !isGone else { return [] }
    var actions: [Action] = []
    switch queue.first {
    case nil: break
    case .startServer, .insert, .plug, .claim: actions += [.work(.good), .work(.bad)]
    case .connect: actions += [.work(.good), .work(.bad), .work(.noRoom)]
    case .unplug, .remove, .leave, .disconnect, .removeTraces, .leaveServer, .closeServer, .releaseMemory:
      actions.append(.work(.good))
    }
    for (key, device) in devices.sorted(by: { $0.key < $1.key }) {
      actions += self.actions(of: key, device, wishes: wishes)
    }
    actions += timers.sorted().map { .serverTimer($0) }
    if wishes { actions += [.domainGone, .end(.closed(isAwaited: false)), .end(.handedOver)] }
    return actions
  }

  private func actions(of key: Int, _ device: Device, wishes: Bool) -> [Action] {
    guard let machine = machine[key] else {
      guard wishes, self.machine.moving.contains(key) else { return [] }
      return self.machine.acceptsDevices ? [.again(key), .absent(key)] : [.absent(key)]
    }
    var actions: [Action] = []
    for (id, stage) in device.backends.sorted(by: { $0.key.number < $1.key.number }) {
      switch stage {
      case .opening:
        actions += [
          .opened(key, id, objection: false), .openFailed(key, id, isFinal: false), .openFailed(key, id, isFinal: true),
        ]
        if device.isFilling { actions.append(.opened(key, id, objection: true)) }
      case .open: actions += Self.reports.map { .report(key, id, $0) }
      case .stopAsked: actions.append(.report(key, id, .gone("io")))
      case .closing: actions += [.closed(key, id), .report(key, id, .fault("late"))]
      case .finished: break
      }
    }
    actions += device.timers.sorted { "\($0)" < "\($1)" }.map { .timer(key, $0) }
    actions += device.drains.sorted { $0.number < $1.number }.map { .drained(key, $0) }
    actions += device.adjusting.sorted { $0.number < $1.number }.map { .adjusted(key, $0) }
    if device.isInserted {
      switch device.style {
      case .registers: actions += [.driver(key, .live), .driver(key, .absent)]
      case .handshake: actions += Self.views.filter { $0 != device.frontend }.map { .frontend(key, $0) }
      }
    }
    if device.isReading { actions.append(.frontend(key, device.frontend)) }
    guard wishes else { return actions }
    if device.isSpare {
      actions += [.command(key, .fill(image: "image", limits: .reads(1))), .command(key, .detach(deadline: 10))]
    } else {
      actions += [.entry(key, .corrected), .entry(key, .closing), .entry(key, .abandoned), .entry(key, .gone)]
      if machine.connection == .absent, !machine.isEnding { actions.append(.entry(key, .moved)) }
    }
    return actions + Self.commands.map { .command(key, $0) }
  }

  mutating func perform(_ action: Action) {
    switch action {
    case .work(let outcome): work(outcome)
    case .opened(let key, let id, let objection):
      devices[key]?.backends[id] = .open
      tell(key, .started(id, objection: objection ? "odd blocks" : nil))
    case .openFailed(let key, let id, let isFinal):
      devices[key]?.backends[id] = .finished
      tell(key, .startFailed(id, "no image", isFinal: isFinal))
    case .closed(let key, let id):
      devices[key]?.backends[id] = .finished
      tell(key, .stopped(id))
    case .report(let key, let id, let report): tell(key, .report(id, report))
    case .timer(let key, let timer):
      devices[key]?.timers.remove(timer)
      tell(key, .timer(timer))
    case .serverTimer(let number):
      timers.remove(number)
      handle(.retryServer(number))
    case .drained(let key, let number):
      devices[key]?.drains.remove(number)
      tell(key, .drained(number))
    case .adjusted(let key, let id):
      devices[key]?.adjusting.remove(id)
      tell(key, .adjusted(id, .resize(bytes: nil), .done("1 byte")))
    case .driver(let key, let driver): tell(key, .driver(driver))
    case .frontend(let key, let view):
      devices[key]?.frontend = view
      devices[key]?.isReading = false
      tell(key, .frontend(view))
    case .entry(let key, let change):
      if change == .corrected { devices[key]?.isCorrected = true }
      tell(key, .entry(change))
    case .again(let key): if let old = devices[key] { add(key, .toolstack, old.style, hasWindow: old.hasWindow) }
    case .absent(let key): handle(.absent(key))
    case .command(let key, let command):
      if case .displace = command, let device = devices[key], machine[key]?.isEnding == false {
        if !device.backends.isEmpty, !device.isInserted { devices[key]?.isDisplaced = true }
        let isBeingInserted = queue.contains { if case .insert(key, _) = $0 { true } else { false } }
        devices[key]?.hasLostState = device.hasState
        if isBeingInserted || device.isInserted && device.style == .registers { devices[key]?.isInOthersPlace = true }
      }
      tell(key, .command(command))
    case .domainGone: handle(.domainGone)
    case .end(let departure): handle(.end(departure))
    }
  }

  // MARK: Ways to an end

  /// Lets everything that is under way come to its end, well.
  ///
  /// - Parameter timers: pauses end too.
  mutating func settle(timers firesTimers: Bool, limit: Int = 80) {
    for _ in 0..<limit where violations.isEmpty {
      let next = actions(wishes: false).first { action in
        switch action {
        case .work(let outcome): outcome == .good
        case .opened(_, _, let objection): !objection
        case .closed: true
        case .timer(_, .start), .timer(_, .room), .timer(_, .claim), .serverTimer: firesTimers
        case .frontend(let key, let view): devices[key]?.isReading == true && devices[key]?.frontend == view
        case .openFailed, .report, .timer, .drained, .adjusted, .driver, .entry, .again, .absent, .command, .domainGone,
          .end:
          false
        }
      }
      guard let next else { return }
      perform(next)
    }
  }

  // MARK: Sameness

  /// The same state with its numbers counted from the last one given away, and with counts cut off that only grow.
  var canonical: PlayedGuest {
    var copy = self
    for index in copy.machine.members.indices {
      let key = copy.machine.members[index].key
      let shift = Shift(from: copy.machine.members[index].machine.lastNumber)
      copy.machine.members[index].machine.shift(shift)
      guard var device = copy.devices[key] else { continue }
      device.backends = Dictionary(uniqueKeysWithValues: device.backends.map { (shift($0.key), $0.value) })
      device.behindTransport = device.behindTransport.map { shift($0) }
      device.timers = Set(device.timers.map { shift($0) }.filter { shift.isRecent($0) })
      device.drains = Set(device.drains.map { shift($0) })
      // The answers of backends that are gone differ in nothing but their numbers.
      device.adjusting = Set(device.adjusting.map { shift($0) }.filter { device.backends[$0] != nil })
      copy.devices[key] = device
      copy.queue = copy.queue.map { operation in
        switch operation {
        case .insert(key, let id): .insert(key, shift(id))
        case .plug(key, let id): .plug(key, shift(id))
        case .unplug(key, let id): .unplug(key, shift(id))
        default: operation
        }
      }
    }
    return copy
  }
}

/// Counts numbers from the last one given away.
struct Shift {
  private static let base: UInt64 = 1 << 32
  let last: UInt64

  init(from last: UInt64) { self.last = last }

  func callAsFunction(_ id: BackendID) -> BackendID { BackendID(Self.base + id.number - last) }

  func callAsFunction(_ timer: DeviceTimer) -> DeviceTimer {
    switch timer {
    case .start(let id): .start(self(id))
    case .room(let id): .room(self(id))
    case .drain(let id): .drain(self(id))
    case .end(let id): .end(self(id))
    case .claim(let id): .claim(self(id))
    }
  }

  /// Timers that nobody waits for any more differ in nothing but their numbers: one of them is enough.
  func isRecent(_ timer: DeviceTimer) -> Bool {
    switch timer {
    case .start(let id), .room(let id), .drain(let id), .end(let id), .claim(let id): Self.base - id.number < 2
    }
  }
}

extension DeviceMachine {
  fileprivate mutating func shift(_ shift: Shift) {
    switch service {
    case .waiting(.start(let id, let occasion)): service = .waiting(.start(shift(id), occasion))
    case .starting(let id, let wish): service = .starting(shift(id), wish)
    case .opened(let id, let occasion): service = .opened(shift(id), occasion)
    case .plugging(let id, let occasion, let early): service = .plugging(shift(id), occasion, early)
    case .serving(let id, let held): service = .serving(shift(id), held: held)
    case .stopping(let id, let next): service = .stopping(shift(id), next)
    case .new, .waiting, .ended, .clearing, .released, .gone: break
    }
    if case .xenbus(var handshake) = connection {
      switch handshake.phase {
      case .offered(var offer):
        offer.tries = min(offer.tries, 1)
        handshake.phase = .offered(offer)
      case .delayed(var offer, let id):
        offer.tries = min(offer.tries, 1)
        handshake.phase = .delayed(offer, shift(id))
      case .connecting(var offer, let sequence):
        offer.tries = min(offer.tries, 1)
        handshake.phase = .connecting(offer, sequence: sequence)
      case .connected, .resetDue, .disconnecting, .closed: break
      }
      connection = .xenbus(handshake)
    }
    if case .delayed(let id) = claim { claim = .delayed(shift(id)) }
    failedClaims = min(failedClaims, 1)
    drain = drain.map { shift($0) }
    endNumber = endNumber.map { shift($0) }
    restarts.count = 0
    faults.count = 0
    failedStarts = min(failedStarts, 1)
    lastNumber = 0
  }
}
