/// Where the handshake with a Xenbus driver stands, and what follows from what the driver says (deploy/guest-module/PROTOCOL.md, 3).
package struct XenbusHandshake: Hashable, Sendable {
  package enum Phase: Hashable, Sendable {
    /// The driver may set the device up; state 2.
    case offered(Offer)
    /// There was no room for the driver's pages: tried again after a pause, which is numbered.
    case delayed(Offer, BackendID)
    /// The guest's thread maps and binds.
    case connecting(Offer, sequence: UInt32)
    /// State 4. `lastWrite`: the last configuration write that was passed on.
    case connected(Driver, lastWrite: UInt32?)
    /// The driver resets the device, and a backend that may still write to its memory is being stopped: it is joined first.
    case resetDue
    /// The guest's thread resets and unmaps.
    case disconnecting
    /// All is given back; state 6. The driver may begin again.
    case closed
  }

  package struct Offer: Hashable, Sendable {
    /// This incarnation began with an earlier daemon, and the queues' positions are those that it left.
    package var adopts = false
    /// The setup that was refused: only another one is looked at.
    package var refusal: Refusal?
    /// Tries to connect that failed for lack of room.
    package var tries = 0
  }

  package struct Refusal: Hashable, Sendable {
    package var sequence: UInt32
    package var reason: String
  }

  /// What the machine around has to do beside the effects.
  enum Outcome: Hashable {
    case nothing
    /// The driver did what it must not.
    case fault(String)
    /// The driver has let go of a device that the toolstack wants gone.
    case finished
  }

  package internal(set) var phase: Phase
  /// What the frontend said last; nil until it has been read.
  package internal(set) var view: FrontendView?
  /// The toolstack wants the device gone; its driver ends its requests first.
  package internal(set) var isLeaving = false

  /// A device that has just been put there.
  init(_ earlier: Earlier, _ effects: inout [DeviceEffect]) {
    switch earlier {
    case .nothing:
      phase = .offered(Offer())
      effects.append(.offer)
    case .offered:
      phase = .offered(Offer())
      effects.append(.publishConfiguration)
    case .adoptable:
      phase = .offered(Offer(adopts: true))
      effects.append(.publishConfiguration)
    case .lost(let reason):
      // As with a device that is connected and broken: the driver's reset leads to a new incarnation.
      phase = .connected(.broken(reason), lastWrite: nil)
      effects += [.needReset, .publishConfiguration]
    }
  }

  package var driver: Driver {
    switch phase {
    case .offered(let offer): offer.refusal.map { .broken($0.reason) } ?? .absent
    case .connected(let driver, _): driver
    case .delayed, .connecting, .resetDue, .disconnecting, .closed: .absent
    }
  }

  /// Whether pages of the guest may be mapped.
  package var isMapped: Bool {
    switch phase {
    case .connecting, .connected, .resetDue, .disconnecting: true
    case .offered, .delayed, .closed: false
    }
  }

  mutating func fail(_ reason: String) {
    guard case .connected(_, let lastWrite) = phase else { return }
    phase = .connected(.broken(reason), lastWrite: lastWrite)
  }

  /// Does what follows from the frontend's nodes as they are.
  ///
  /// - Parameters:
  ///   - isBlocked: no driver is connected: the device is quarantined.
  ///   - isStopping: a backend that was behind the transport is being stopped.
  mutating func advance(isBlocked: Bool, isStopping: Bool, _ effects: inout [DeviceEffect]) -> Outcome {
    guard let view else { return .nothing }
    switch (phase, view.state) {
    case (.offered(let offer), .initialised), (.offered(let offer), .connected):
      return setUp(offer, view, isBlocked: isBlocked, &effects)
    case (.connected(let driver, let lastWrite), .initialised), (.connected(let driver, let lastWrite), .connected):
      guard let write = view.write, write.number != lastWrite else { break }
      phase = .connected(driver, lastWrite: write.number)
      effects.append(.writeConfiguration(write))
    case (.connected, _), (.resetDue, _):
      // Anything else is a reset: another kernel may have been started.
      guard !isStopping else {
        phase = .resetDue
        break
      }
      phase = .disconnecting
      effects.append(.disconnect)
    case (.closed, .initialising):
      if !isLeaving { offer(&effects) }
    case (.offered(let old), .initialising), (.offered(let old), .closing), (.offered(let old), .closed):
      // A driver that was refused, and begins again.
      if old.refusal != nil, !isLeaving { offer(&effects) }
    case (.offered, .initWait), (.offered, nil), (.closed, _), (.delayed, _), (.connecting, _), (.disconnecting, _):
      break
    }
    return mayFinish ? .finished : .nothing
  }

  /// Whether a device that the toolstack wants gone may go: the driver is not at work, nor about to be.
  var mayFinish: Bool {
    guard isLeaving, let view else { return false }
    switch phase {
    case .offered, .closed: return view.state?.isSetUp != true
    case .delayed, .connecting, .connected, .resetDue, .disconnecting: return false
    }
  }

  private mutating func offer(_ effects: inout [DeviceEffect]) {
    phase = .offered(Offer())
    effects.append(.offer)
  }

  private mutating func setUp(
    _ offer: Offer, _ view: FrontendView, isBlocked: Bool, _ effects: inout [DeviceEffect]
  ) -> Outcome {
    switch view.setup {
    case .absent: return .nothing
    case .malformed:
      guard offer.refusal?.sequence != 0 else { return .nothing }
      return refuse(offer, sequence: 0, "vx-setup is not 'SEQUENCE GRANT'", &effects)
    case .page(let sequence, let reference):
      guard sequence != offer.refusal?.sequence, !isBlocked else { return .nothing }
      phase = .connecting(offer, sequence: sequence)
      effects.append(.connect(sequence: sequence, reference: reference, adopts: offer.adopts))
      return .nothing
    }
  }

  private mutating func refuse(_ offer: Offer, sequence: UInt32, _ reason: String, _ effects: inout [DeviceEffect])
    -> Outcome
  {
    let words = "the guest's setup is refused: \(reason)"
    effects.append(.acknowledge(sequence: sequence, .error(reason)))
    if offer.adopts {
      // What was connected to the earlier daemon is not what it was: only a reset helps.
      phase = .connected(.broken(words), lastWrite: nil)
      effects += [.needReset, .publishConfiguration]
    } else {
      phase = .offered(Offer(refusal: Refusal(sequence: sequence, reason: words)))
    }
    return .fault(words)
  }

  /// What became of the setup page.
  ///
  /// - Parameter delay: the number of the pause and its length, for a driver for which there is no room.
  mutating func connected(
    _ result: DeviceEvent.ConnectResult, delay: (BackendID, Milliseconds), _ effects: inout [DeviceEffect]
  ) -> Outcome {
    guard case .connecting(var offer, let sequence) = phase else { return .nothing }
    switch result {
    case .connected:
      phase = .connected(.live, lastWrite: nil)
      effects.append(.acknowledge(sequence: sequence, .ok))
      if !isLeaving { effects.append(.writeState(.connected, over: [.initWait, .connected])) }
      effects += [.publishConfiguration, .tell(.deviceConnected, nil)]
      return .nothing
    case .noRoom:
      offer.tries += 1
      phase = .delayed(offer, delay.0)
      effects += [.acknowledge(sequence: sequence, .wait), .schedule(.room(delay.0), delay.1)]
      return .nothing
    case .refused(let reason): return refuse(offer, sequence: sequence, reason, &effects)
    }
  }

  /// Tries so far, for the next pause.
  var tries: Int { if case .connecting(let offer, _) = phase { offer.tries } else { 0 } }

  /// The pause of a driver for which there was no room is over.
  mutating func pauseIsOver(_ number: BackendID) {
    guard case .delayed(let offer, number) = phase else { return }
    phase = .offered(offer)
  }

  mutating func disconnected(_ effects: inout [DeviceEffect]) {
    phase = .closed
    if !isLeaving { effects.append(.writeState(.closed, over: [.initWait, .connected])) }
    effects.append(.tell(.deviceReset, nil))
  }
}
