import Testing

@testable import Lifecycle

@Suite struct GuestMachineTests {
  private typealias Guest = GuestMachine<Int>

  private func run(_ guest: inout GuestMachine<Int>, _ events: GuestEvent<Int>...) -> [GuestEffect<Int>] {
    events.flatMap { guest.handle($0, at: now) }
  }

  private func add(
    _ key: Int, _ origin: GuestMachine<Int>.Origin = .toolstack, style: BusStyle = .registers
  ) -> GuestEvent<Int> {
    .add(key, origin, DeviceMachine(style, DeviceRules()), after: 0, fuse: nil)
  }

  private func served(_ keys: Int..., profile: [Int] = []) -> GuestMachine<Int> {
    var guest = Guest(hasServer: true)
    _ = run(&guest, .begin, .serverStarted)
    for key in keys + profile {
      _ = run(
        &guest, add(key, profile.contains(key) ? .profile : .toolstack), .device(key, .started(id(1), objection: nil)),
        .device(key, .plugged(id(1), .absent)))
    }
    return guest
  }

  /// What a device does at its end.
  private func ended(_ key: Int, closed: Bool) -> [GuestEffect<Int>] {
    var effects: [DeviceEffect] = [.forgetState, .forgetAssignment]
    if closed { effects.append(.writeClosed) }
    return (effects + [.removeEntry, .tell(.deviceGone, nil), .lookAgain]).map { .device(key, $0) }
  }

  @Test func serverIsMadeBeforeDevicesAreInTheirPlaces() {
    var guest = Guest(hasServer: true)
    #expect(run(&guest, .begin) == [.startServer, .tell(.guestAppeared, nil)])
    #expect(run(&guest, add(1)) == [.device(1, .start(id(1)))])
    #expect(run(&guest, .device(1, .started(id(1), objection: nil))) == [])
    #expect(run(&guest, .serverStarted) == [.device(1, .insert(id(1), needsReset: false))])
    #expect(guest.phase == .running)
  }

  @Test func guestOverXenbusNeedsNoServer() {
    var guest = Guest(hasServer: false)
    #expect(run(&guest, .begin) == [.tell(.guestAppeared, nil)])
    #expect(
      run(&guest, add(1, style: .handshake), .device(1, .started(id(1), objection: nil))) == [
        .device(1, .start(id(1))), .device(1, .insert(id(1), needsReset: false)),
      ])
  }

  /// An ioreq server that cannot be made: the devices say so, and it is tried again.
  @Test func serverThatCannotBeMadeIsTriedAgain() {
    var guest = Guest(hasServer: true)
    _ = run(&guest, .begin, add(1))
    #expect(
      run(&guest, .serverFailed("no memory")) == [
        .tell(.guestFailed, "no memory"), .scheduleServer(1, 1000), .device(1, .tell(.deviceFailed, "no memory")),
        .device(1, .writeError("no memory")), .device(1, .writeState(.initWait, over: [.initialising])),
      ])
    #expect(guest[1]?.phase == .failed(reason: "no memory"))
    // What is opened for nothing is closed.
    #expect(run(&guest, .device(1, .started(id(1), objection: nil))) == [.device(1, .stop(id(1)))])
    #expect(run(&guest, .device(1, .stopped(id(1)))) == [.device(1, .join(id(1)))])
    // A device that comes now is failed from the start.
    #expect(
      run(&guest, add(2)).contains(.device(2, .tell(.deviceFailed, "no memory"))))
    #expect(guest[2]?.backend == nil)
    // It fails again, more quietly and after a longer pause.
    #expect(run(&guest, .retryServer(1), .serverFailed("no memory")) == [.startServer, .scheduleServer(2, 2000)])
    #expect(run(&guest, .retryServer(1)) == [])
    #expect(
      run(&guest, .retryServer(2), .serverStarted) == [
        .startServer, .device(1, .start(id(2))), .device(2, .start(id(1))),
      ])
  }

  /// vCPUs may wait in the server that could not be adopted: one that is made while the daemon hands over would be taken for it by the next one.
  @Test func daemonThatHandsOverMakesNoServer() {
    var guest = Guest(hasServer: true)
    _ = run(&guest, .begin, add(1), .serverFailed("no memory"))
    #expect(run(&guest, .end(.handedOver)).first == .leaveServer)
    #expect(run(&guest, .retryServer(1)) == [])
    #expect(
      run(&guest, .device(1, .started(id(1), objection: nil)), .device(1, .stopped(id(1)))).suffix(2) == [
        .device(1, .join(id(1))), .closeServer,
      ])
  }

  @Test func operatorNeedNotWaitForTheServersNextTry() {
    var guest = Guest(hasServer: true)
    _ = run(&guest, .begin, .serverFailed("no memory"), add(1))
    #expect(run(&guest, .device(1, .command(.restart))) == [.device(1, .forgive), .startServer])
    #expect(run(&guest, .retryServer(1)) == [])
  }

  @Test func closedIsWrittenWhenServerAndMemoryAreGivenBack() {
    var guest = served(1)
    #expect(
      run(&guest, .device(1, .entry(.closing))) == [
        .device(1, .tell(.deviceClosing, nil)), .device(1, .remove), .device(1, .stop(id(1))),
        .device(1, .schedule(.end(id(2)), 30_000)),
      ])
    #expect(run(&guest, .device(1, .removed)) == [])
    #expect(run(&guest, .device(1, .stopped(id(1)))) == [.device(1, .join(id(1))), .device(1, .removeTraces)])
    #expect(run(&guest, .device(1, .cleared)) == [.closeServer])
    #expect(!guest.acceptsDevices)
    #expect(
      run(&guest, .serverClosed) == [.joinThread] + ended(1, closed: true) + [
        .forgetState, .tell(.guestGone, nil), .gone,
      ])
    #expect(guest.phase == .gone && guest.members.isEmpty)
  }

  @Test func deviceGoesAtOnceWhileAnotherStays() {
    var guest = served(1, 2)
    #expect(
      run(
        &guest, .device(1, .entry(.closing)), .device(1, .removed), .device(1, .stopped(id(1))), .device(1, .cleared)
      ).suffix(6) == ended(1, closed: true))
    #expect(guest.members.map(\.key) == [2])
    #expect(guest.phase == .running)
  }

  @Test func deviceOfALastGuestWaitsForTheOther() {
    var guest = served(1, 2)
    _ = run(&guest, .device(2, .entry(.gone)))
    // The second ends too: neither may be forgotten before the memory is given back.
    let effects = run(
      &guest, .device(1, .entry(.closing)), .device(1, .removed), .device(1, .stopped(id(1))), .device(1, .cleared),
      .device(2, .removed))
    #expect(!effects.contains(.closeServer) && !effects.contains(.device(1, .writeClosed)))
    #expect(run(&guest, .device(2, .stopped(id(1))), .device(2, .cleared)).suffix(1) == [.closeServer])
  }

  @Test func profilesDevicesEndWithTheLastOfTheToolstacks() {
    var guest = served(1, 2, profile: [3])
    #expect(!run(&guest, .device(1, .entry(.closing))).contains(.device(3, .remove)))
    #expect(run(&guest, .device(2, .entry(.gone))).contains(.device(3, .remove)))
    #expect(guest[3]?.departure == .closed(isAwaited: false))
  }

  /// The only device of the toolstack's goes to another bus: it is let go at once, and what the profile declares stays.
  @Test func profilesDevicesStayWhileTheLastOfTheToolstacksMoves() {
    var guest = served(1, profile: [3])
    let effects = run(
      &guest, .device(1, .entry(.moved)), .device(1, .removed), .device(1, .stopped(id(1))), .device(1, .cleared))
    #expect(!effects.contains(.device(3, .remove)) && effects.suffix(5) == ended(1, closed: false))
    #expect(guest.members.map(\.key) == [3] && guest.phase == .running)
    _ = run(&guest, add(1))
    #expect(run(&guest, .absent(1)) == [])
    #expect(run(&guest, .device(1, .entry(.gone))).contains(.device(3, .remove)))
  }

  /// It does not come again: its entry goes while it ends, or has gone when it is looked for.
  @Test(arguments: [true, false]) func profilesDevicesEndWithADeviceThatMovedAndDidNotComeAgain(whileItEnds: Bool) {
    var guest = served(1, profile: [3])
    #expect(!run(&guest, .device(1, .entry(.moved))).contains(.device(3, .remove)))
    if whileItEnds {
      #expect(run(&guest, .device(1, .entry(.gone))).contains(.device(3, .remove)))
    } else {
      let effects = run(&guest, .device(1, .removed), .device(1, .stopped(id(1))), .device(1, .cleared))
      #expect(!effects.contains(.device(3, .remove)))
      #expect(run(&guest, .absent(1)).contains(.device(3, .remove)))
    }
  }

  /// Another one that leaves meanwhile is not the last.
  @Test func profilesDevicesStayWhileOneOfTheToolstacksMovesAndTheOtherEnds() {
    var guest = served(1, 2, profile: [3])
    #expect(!run(&guest, .device(1, .entry(.moved)), .device(2, .entry(.closing))).contains(.device(3, .remove)))
    #expect(run(&guest, .device(1, .entry(.abandoned))).contains(.device(3, .remove)))
  }

  @Test func profilesDevicesEndWithTheirGuest() {
    var guest = served(profile: [3])
    let effects = run(
      &guest, .domainGone, .device(3, .removed), .device(3, .stopped(id(1))), .device(3, .cleared), .serverClosed)
    #expect(effects.suffix(3) == [.forgetState, .tell(.guestGone, nil), .gone])
  }

  @Test func guestThatNobodyNeedsEnds() {
    var guest = Guest(hasServer: true)
    #expect(run(&guest, .begin, .serverStarted) == [.startServer, .tell(.guestAppeared, nil)])
    #expect(run(&guest, .settle) == [.closeServer])
  }

  @Test func guestIsHandedOverWithItsServer() {
    var guest = served(1)
    _ = run(&guest, .device(1, .driver(.live)))
    #expect(
      run(&guest, .end(.handedOver)) == [
        .leaveServer, .device(1, .stop(id(1))), .device(1, .schedule(.end(id(2)), 30_000)),
      ])
    #expect(run(&guest, .device(1, .stopped(id(1)))) == [.device(1, .join(id(1))), .closeServer])
    #expect(run(&guest, .serverClosed) == [.joinThread, .tell(.guestGone, nil), .gone])
  }

  @Test func pagesOfAXenbusDeviceAreUnmappedBehindItsBackend() {
    var guest = Guest(hasServer: false)
    _ = run(
      &guest, .begin, add(1, style: .handshake), .device(1, .started(id(1), objection: nil)),
      .device(1, .plugged(id(1), .absent)),
      .device(1, .frontend(FrontendView(state: .initialised, setup: .page(sequence: 1, reference: 8)))),
      .device(1, .connected(sequence: 1, .connected)))
    #expect(!run(&guest, .end(.handedOver)).contains(.device(1, .leave)))
    #expect(run(&guest, .device(1, .stopped(id(1)))) == [.device(1, .join(id(1))), .device(1, .leave)])
    #expect(run(&guest, .device(1, .removed)) == [.closeServer])
  }

  @Test func guestsLimitsChangeBesideItsDevices() {
    var guest = served(1)
    let devices = guest.members
    #expect(run(&guest, .limit(.reads(5))) == [.limit(.reads(5))])
    #expect(guest.limits == .reads(5))
    #expect(run(&guest, .limitsAbove) == [.reconsider])
    #expect(guest.members == devices)
  }

  @Test func reportOfADeviceThatIsGoneChangesNothing() {
    var guest = served(1)
    let before = guest
    #expect(run(&guest, .device(9, .removed)) == [])
    #expect(guest == before)
  }
}
