/// A guest's life with those of its devices: the server comes with the first device that needs it, the memory goes last. A value, as
/// `DeviceMachine` is.
///
/// `Key` names a device within the guest.
package struct GuestMachine<Key: Hashable & Sendable>: Hashable, Sendable {
  package enum Phase: Hashable, Sendable {
    /// No device of it has needed a server so far.
    case bare
    /// The server of its accesses is being made.
    case starting
    case running
    /// It cannot be made: `reason`; tried again after a pause, which is numbered.
    case failed(reason: String, retry: UInt64)
    /// Nothing uses the guest's memory any more: server and memory are being given back.
    case closing(Departure)
    case gone
  }

  /// Who wants a device to be there.
  package enum Origin: Hashable, Sendable {
    /// An entry in Xenstore.
    case toolstack
    /// A profile: it is there for as long as the toolstack's devices are, or, where there were none, for as long as the guest is.
    case profile
  }

  /// Whether the guest looks for devices where nobody answers but the server (`DeviceMachine.Claim`).
  package enum Windows: Hashable, Sendable {
    case none
    /// It does: the server stays for as long as the guest runs, with or without devices.
    case held
    /// It does, and mappings are being given back while the server stays.
    case releasing
    /// The domain is no more, so that nobody looks for anything.
    case over
  }

  package struct Member: Hashable, Sendable {
    package let key: Key
    package let origin: Origin
    package internal(set) var machine: DeviceMachine
  }

  package internal(set) var phase: Phase
  /// In the order in which they came.
  package internal(set) var members: [Member] = []
  /// Pauses between tries to make the server.
  package let retry: RestartPolicy
  /// Tries to make the server that failed.
  package internal(set) var tries = 0
  /// What the end of the daemon makes of the guest: it is for the next one, or there will be none; nil while the daemon stays.
  package internal(set) var daemonEnd: Departure?
  package internal(set) var windows: Windows
  /// Of its devices together.
  package internal(set) var limits = RateLimits()
  /// Devices of the toolstack's that left for another bus and have not come again so far.
  package internal(set) var moving: Set<Key> = []
  var lastNumber: UInt64
  /// Collected while an event is handled; empty between events.
  var effects: [GuestEffect<Key>] = []

  /// - Parameters:
  ///   - hasServer: the server is made at once: an earlier daemon left one. Else it is made with the first device that needs it.
  ///   - numbersAfter: as with `DeviceMachine`.
  ///   - holdsWindows: of an earlier daemon.
  package init(
    hasServer: Bool, holdsWindows: Bool = false, retry: RestartPolicy = DeviceRules().startRetry,
    numbersAfter: UInt64 = 0
  ) {
    self.retry = retry
    lastNumber = numbersAfter
    windows = holdsWindows ? .held : .none
    phase = hasServer ? .starting : .bare
  }

  package subscript(key: Key) -> DeviceMachine? { members.first { $0.key == key }?.machine }

  /// Whether devices may be added: not while the guest ends. Its entries are looked at again when it is gone.
  package var acceptsDevices: Bool {
    switch phase {
    case .bare, .starting, .running, .failed: !isHandedOver
    case .closing, .gone: false
    }
  }

  private var isHandedOver: Bool { daemonEnd == .handedOver }

  private func bus(of machine: DeviceMachine) -> Bus {
    switch phase {
    case .bare, .starting, .running, .failed: if !machine.needsServer { return .ready }
    case .closing, .gone: break
    }
    return switch phase {
    case .bare, .starting: .pending
    case .running: .ready
    case .failed(let reason, _): .failed(reason)
    case .closing, .gone: .pending
    }
  }

  /// What happens at an event.
  ///
  /// - Returns: what is to be done, in this order.
  package mutating func handle(_ event: GuestEvent<Key>, at now: Moment) -> [GuestEffect<Key>] {
    switch event {
    case .begin: begin()
    case .add(let key, let origin, var machine, let pause, let fuse):
      guard acceptsDevices, self[key] == nil else { return [.unexpected("add while \(phase)")] }
      if machine.needsServer, phase == .bare { startServer() }
      moving.remove(key)
      if machine.claim != .none, windows == .none { windows = .held }
      machine.bus = bus(of: machine)
      members.append(Member(key: key, origin: origin, machine: machine))
      tell(key, .begin(after: pause, fuse: fuse), now)
    case .device(let key, let event):
      note(event, of: key, now)
      tell(key, event, now)
    case .absent(let key): doesNotComeAgain(key, now)
    case .limit(let limits):
      self.limits = limits
      effects.append(.limit(limits))
    case .limitsAbove: effects.append(.reconsider)
    case .serverStarted: serverStarted(now)
    case .serverFailed(let reason): serverFailed(reason, now)
    case .serverClosed: serverClosed(now)
    case .memoryReleased:
      switch windows {
      case .releasing: windows = .held
      case .over: break  // the domain went meanwhile
      case .none, .held: effects.append(.unexpected("memory released while \(windows)"))
      }
      dismiss(now)
    case .retryServer(let number):
      // Else it has been tried since, or the guest ends, or it is the next daemon's to try.
      guard case .failed(_, number) = phase, !isHandedOver else { break }
      startServer()
    case .settle: closeIfAllGivenBack()
    case .domainGone:
      windows = .over
      endAll(.closed(isAwaited: false), now) { $0.origin == .profile }
      closeIfAllGivenBack()
    case .end(.handedOver): handOver(now)
    case .end(let departure):
      if daemonEnd == nil { daemonEnd = departure }
      endAll(departure, now) { _ in true }
      closeIfAllGivenBack()
    }
    if !members.isEmpty { settle(now) }
    defer { effects = [] }
    return effects
  }

  // MARK: The server

  private mutating func begin() {
    switch phase {
    case .bare: break
    case .starting: effects.append(.startServer)
    case .running, .failed, .closing, .gone: effects.append(.unexpected("begin while \(phase)"))
    }
    effects.append(.tell(.guestAppeared, nil))
  }

  private mutating func startServer() {
    phase = .starting
    effects.append(.startServer)
  }

  private mutating func serverStarted(_ now: Moment) {
    switch phase {
    case .starting:
      phase = .running
      tries = 0
      for member in members where member.machine.needsServer { tell(member.key, .busReady, now) }
    case .closing: break  // the guest ended meanwhile; what was made is given back by what was asked for then
    case .bare, .running, .failed, .gone: effects.append(.unexpected("server started while \(phase)"))
    }
  }

  private mutating func serverFailed(_ reason: String, _ now: Moment) {
    switch phase {
    case .starting:
      lastNumber += 1
      phase = .failed(reason: reason, retry: lastNumber)
      if tries == 0 { effects.append(.tell(.guestFailed, reason)) }
      effects.append(.scheduleServer(lastNumber, max(RestartBudget.pause(retry, tries: tries, at: now), 1)))
      tries += 1
      for member in members where member.machine.needsServer { tell(member.key, .busFailed(reason), now) }
    case .closing: break  // the guest ended meanwhile
    case .bare, .running, .failed, .gone: effects.append(.unexpected("server failed while \(phase)"))
    }
  }

  // MARK: Devices

  private mutating func tell(_ key: Key, _ event: DeviceEvent, _ now: Moment) {
    guard let index = members.firstIndex(where: { $0.key == key }) else { return }  // it is gone
    for effect in members[index].machine.handle(event, at: now) {
      switch effect {
      case .retryBus:
        if case .failed = phase, !isHandedOver { startServer() }
      case .leaving: if members[index].origin == .toolstack { endProfilesAlone(now) }
      case .released: break  // `settle` looks at all of them
      default: effects.append(.device(key, effect))
      }
    }
  }

  private mutating func endAll(_ departure: Departure, _ now: Moment, _ isMeant: (Member) -> Bool) {
    for member in members where isMeant(member) { tell(member.key, .command(.end(departure)), now) }
  }

  /// Whether a device that ends comes again.
  private mutating func note(_ event: DeviceEvent, of key: Key, _ now: Moment) {
    guard case .entry(let change) = event else { return }
    switch change {
    case .moved: if self[key]?.isEnding == false { moving.insert(key) }
    case .gone, .abandoned, .closing: doesNotComeAgain(key, now)
    case .corrected: break
    }
  }

  private mutating func doesNotComeAgain(_ key: Key, _ now: Moment) {
    if moving.remove(key) != nil { endProfilesAlone(now) }
  }

  /// The profile's devices end with the last of the toolstack's.
  private mutating func endProfilesAlone(_ now: Moment) {
    let others = members.filter { $0.origin == .toolstack }
    guard !isHandedOver, moving.isEmpty, others.allSatisfy(\.machine.isEnding) else { return }
    endAll(.closed(isAwaited: false), now) { $0.origin == .profile && !$0.machine.isEnding }
  }

  // MARK: The end

  private mutating func handOver(_ now: Moment) {
    guard !isHandedOver else { return }
    daemonEnd = .handedOver
    switch phase {
    // No vCPU is answered from here on: what a device does last is in its journals.
    case .bare, .starting, .running, .failed: effects.append(.leaveServer)
    case .closing, .gone: return  // there is nothing left to hand over
    }
    endAll(.handedOver, now) { _ in true }
    closeIfAllGivenBack()
  }

  /// Lets devices go that are given back; with the last one, server and memory go first.
  private mutating func settle(_ now: Moment) {
    switch phase {
    case .bare, .starting, .running, .failed: break
    case .closing, .gone: return
    }
    if members.allSatisfy(\.machine.isEnding) { closeIfAllGivenBack() } else { dismiss(now) }
  }

  private mutating func closeIfAllGivenBack() {
    guard members.allSatisfy(\.machine.isReleased) else { return }
    switch phase {
    case .bare, .starting, .running, .failed: break
    case .closing, .gone: return
    }
    switch windows {
    case .none, .over: break
    case .held, .releasing:
      guard let end = daemonEnd else { return releaseMemory() }
      if end == .handedOver { break }
      // Its accesses wait rather than that the guest's kernel dies of them.
      daemonEnd = .handedOver
      effects.append(.leaveServer)
    }
    phase = .closing(isHandedOver ? .handedOver : .closed(isAwaited: false))
    effects.append(.closeServer)
  }

  /// With the last device, while the server stays.
  private mutating func releaseMemory() {
    guard !members.isEmpty, windows == .held else { return }
    windows = .releasing
    effects.append(.releaseMemory)
  }

  private mutating func dismiss(_ now: Moment) {
    for member in members where member.machine.isReleased { tell(member.key, .dismissed, now) }
    members.removeAll { $0.machine.service == .gone }
  }

  private mutating func serverClosed(_ now: Moment) {
    guard case .closing(let departure) = phase else {
      return effects.append(.unexpected("server closed while \(phase)"))
    }
    phase = .gone
    effects.append(.joinThread)
    dismiss(now)
    if departure != .handedOver { effects.append(.forgetState) }
    effects += [.tell(.guestGone, nil), .gone]
  }
}

extension DeviceMachine {
  /// Whether everything of the device is given back.
  package var isReleased: Bool {
    switch service {
    case .released: true
    case .new, .waiting, .starting, .opened, .plugging, .serving, .stopping, .ended, .clearing, .gone: false
    }
  }
}

package enum GuestEvent<Key: Hashable & Sendable>: Hashable, Sendable {
  case begin
  /// A device appears. `after` and `fuse` as in `DeviceEvent.begin`.
  case add(Key, GuestMachine<Key>.Origin, DeviceMachine, after: Milliseconds, fuse: String?)
  case device(Key, DeviceEvent)
  /// There is neither a device nor an entry of this name.
  case absent(Key)
  /// Limits of its devices together, for requests from now on.
  case limit(RateLimits)
  /// Those of all guests together have changed.
  case limitsAbove
  case serverStarted
  case serverFailed(String)
  /// Server and memory are given back.
  case serverClosed
  /// Nothing of the guest's memory is mapped any more.
  case memoryReleased
  case retryServer(UInt64)
  /// Every device that the guest is to have has been added: a guest without one ends.
  case settle
  /// Xen's domain is gone; devices in Xenstore end with their entries.
  case domainGone
  /// The daemon ends.
  case end(Departure)
}

package enum GuestEffect<Key: Hashable & Sendable>: Hashable, Sendable {
  case device(Key, DeviceEffect)
  /// Makes the server on the guest's thread, or takes over that of an earlier daemon. Answered by `serverStarted` or `serverFailed`.
  case startServer
  /// Lets go of the server on the guest's thread: it stays in Xen for the next daemon. Not answered.
  case leaveServer
  /// Closes the server, unless it was left, then the guest's memory, on the guest's thread. Answered by `serverClosed`.
  case closeServer
  /// Gives all mappings back while the server stays. Answered by `memoryReleased`.
  case releaseMemory
  /// The guest's thread has nothing left to do: joins it.
  case joinThread
  case scheduleServer(UInt64, Milliseconds)
  /// Requests of its devices keep to these together.
  case limit(RateLimits)
  /// Requests that wait for a limit may go earlier: they ask again.
  case reconsider
  /// What is kept of the guest for a later daemon.
  case forgetState
  case tell(News, String?)
  /// The guest is to be forgotten; entries of its number may have come meanwhile and are looked at again.
  case gone
  case unexpected(String)
}
