import Testing

@testable import Lifecycle

/// Faults that the record of flags allowed: what the machine does instead.
@Suite struct ReviewFaultTests {
  private func run(_ machine: inout DeviceMachine, _ events: DeviceEvent...) -> [DeviceEffect] {
    events.flatMap { machine.handle($0, at: now) }
  }

  /// The image opens after the guest's server has failed.
  @Test func deviceOfAGuestWithoutServerIsFailedAndHoldsNothing() {
    var machine = DeviceMachine.after([DeviceMachine.begin, .busFailed("no server")], bus: .pending)
    #expect(machine.phase == .failed(reason: "no server"))
    #expect(run(&machine, .started(id(1), objection: nil)) == [.stop(id(1))])
    #expect(run(&machine, .stopped(id(1))) == [.join(id(1))])
    #expect(machine.service == .waiting(.bus(.first)))
    #expect(machine.phase == .failed(reason: "no server"))
    #expect(machine.backend == nil)
    // A corrected entry is what it starts with when the server is there after all.
    #expect(run(&machine, .entry(.corrected), .busReady) == [.start(id(2))])
    #expect(!machine.isEntryNewer)
  }

  /// A retried start is under way when the entry is corrected, or an operator restarts the device.
  @Test(arguments: [DeviceEvent.entry(.corrected), .command(.restart)]) func threadsAreJoinedBeforeOthersAreStarted(
    event: DeviceEvent
  ) {
    let retried: [DeviceEvent] = [
      DeviceMachine.begin, .startFailed(id(1), "in use", isFinal: false), .timer(.start(id(2))),
    ]
    var machine = DeviceMachine.after(retried)
    #expect(machine.backend == id(3))
    #expect(run(&machine, event) == (event == .command(.restart) ? [.forgive] : []))
    #expect(machine.backend == id(3))
    #expect(
      run(&machine, .started(id(3), objection: nil), .stopped(id(3))) == [.stop(id(3)), .join(id(3)), .start(id(4))])
    // It fails instead of opening: the same, and nobody is told of a failure that does not count any more.
    machine = .after(retried + [event])
    #expect(run(&machine, .startFailed(id(3), "in use", isFinal: false)) == [.join(id(3)), .start(id(4))])
  }

  /// Reports of a backend that is no more, whatever else has its place.
  @Test func lateReportsOfAnEarlierBackendChangeNothing() {
    let restarted =
      DeviceMachine.live + [
        .command(.restart), .stopped(id(1)), .started(id(2), objection: nil), .plugged(id(2), .live),
      ]
    let machine = DeviceMachine.after(restarted)
    #expect(machine.service == .serving(id(2), held: [:]))
    let late: [DeviceEvent] = [
      .started(id(1), objection: nil), .startFailed(id(1), "late", isFinal: false), .stopped(id(1)),
      .report(id(1), .gone("late")), .report(id(1), .fault("late")), .report(id(1), .held(queue: 0, "late")),
      .plugged(id(1), .absent), .insertFailed(id(1), "late"), .timer(.start(id(1))), .drained(id(1)),
    ]
    for event in late {
      var copy = machine
      #expect(copy.handle(event, at: now) == [], "\(event)")
      #expect(copy == machine, "\(event)")
    }
  }

  /// The device could not be put into its place.
  @Test func deviceThatCouldNotBeInsertedFollowsItsEntryAndItsOperator() {
    let failed = DeviceMachine.open + [.insertFailed(id(1), "base: in use")]
    var machine = DeviceMachine.after(failed)
    #expect(machine.connection == .absent)
    #expect(machine.phase == .failed(reason: "base: in use"))
    #expect(run(&machine, .stopped(id(1))) == [.join(id(1)), .schedule(.start(id(2)), 1000)])
    var corrected = machine
    #expect(
      run(&corrected, .entry(.corrected), .started(id(3), objection: nil)) == [
        .start(id(3)), .insert(id(3), needsReset: false),
      ])
    var restarted = machine
    #expect(
      run(&restarted, .command(.restart), .started(id(3), objection: nil), .plugged(id(3), .absent)) == [
        .forgive, .start(id(3)), .insert(id(3), needsReset: false), .writeError(nil),
        .writeState(.initWait, over: [.initialising]), .tell(.deviceReady, nil),
      ])
    #expect(restarted.phase == .ready)
  }
}
