import Testing

@testable import Lifecycle

/// One step of a device: from a state by an event to a state, with effects.
struct Row: Sendable, CustomTestStringConvertible {
  var testDescription: String
  var from: DeviceMachine
  var event: DeviceEvent
  var service: DeviceMachine.Service
  var connection: DeviceMachine.Connection?
  var effects: [DeviceEffect]
  var phase: String

  init(
    _ name: String, _ from: DeviceMachine, _ event: DeviceEvent, _ service: DeviceMachine.Service,
    _ connection: DeviceMachine.Connection? = nil, _ effects: [DeviceEffect], _ phase: String
  ) {
    testDescription = name
    self.from = from
    self.event = event
    self.service = service
    self.connection = connection
    self.effects = effects
    self.phase = phase
  }

  func check() {
    var machine = from
    let effects = machine.handle(event, at: now)
    #expect(effects == self.effects)
    #expect(machine.service == service)
    if let connection { #expect(machine.connection == connection) }
    #expect(machine.phase.name == phase)
  }
}

let now = Moment(nanoseconds: 1_000_000_000, chance: 0.5)

func id(_ number: UInt64) -> BackendID { BackendID(number) }

extension DeviceMachine {
  /// A machine to which something has happened.
  static func after(
    _ events: [DeviceEvent], style: BusStyle = .registers, bus: Bus = .ready, earlier: Earlier = .nothing,
    mode: RestartPolicy.Mode = .onFailure, spare: Spare? = nil
  ) -> DeviceMachine {
    var rules = DeviceRules()
    rules.restart.limit = 2
    rules.restart.mode = mode
    rules.faultLimit = 2
    var machine = DeviceMachine(style, rules, bus: bus, earlier: earlier, spare: spare)
    for event in events { _ = machine.handle(event, at: now) }
    return machine
  }

  static let begin = DeviceEvent.begin(after: 0, fuse: nil)
  static let open: [DeviceEvent] = [begin, .started(id(1), objection: nil)]
  static let served: [DeviceEvent] = open + [.plugged(id(1), .absent)]
  static let live: [DeviceEvent] = served + [.driver(.live)]
}

@Suite struct DeviceMachineTests {
  private typealias Machine = DeviceMachine

  // MARK: To the guest

  @Test(arguments: [
    Row("begins", .after([]), DeviceMachine.begin, .starting(id(1), .use(.first)), .absent, [.start(id(1))], "opening"),
    Row(
      "begins later when its guest opens and closes it too often", .after([]), .begin(after: 50, fuse: nil),
      .waiting(.start(id(1), .retry("its guest closes and opens it too often"))), .absent,
      [.schedule(.start(id(1)), 50)], "failed"),
    Row(
      "begins quarantined when it was part of the last crashes", .after([]), .begin(after: 0, fuse: "crashes"),
      .waiting(.rest(.quarantined("crashes"))), .absent,
      [.tell(.deviceQuarantined, "crashes"), .writeState(.initWait, over: [.initialising])], "quarantined"),
    Row(
      "waits for the bus", .after([DeviceMachine.begin], bus: .pending), .started(id(1), objection: nil),
      .opened(id(1), .first), .absent, [], "opening"),
    Row(
      "goes to its place when the bus comes", .after(DeviceMachine.open, bus: .pending), .busReady,
      .plugging(id(1), .first, .init()), .inserting, [.insert(id(1), needsReset: false)], "opening"),
    Row(
      "goes to its place when it is open", .after([DeviceMachine.begin]), .started(id(1), objection: nil),
      .plugging(id(1), .first, .init()), .inserting, [.insert(id(1), needsReset: false)], "opening"),
    Row(
      "is ready in its place", .after(DeviceMachine.open), .plugged(id(1), .absent), .serving(id(1), held: [:]),
      .inserted(.absent),
      [.writeError(nil), .writeState(.initWait, over: [.initialising]), .tell(.deviceReady, nil)], "ready"),
    Row(
      "is connected by its driver", .after(DeviceMachine.served), .driver(.live), .serving(id(1), held: [:]),
      .inserted(.live),
      [.writeState(.connected, over: [.initialising, .initWait]), .tell(.deviceConnected, nil)], "connected"),
    Row(
      "is reset by its driver", .after(DeviceMachine.live), .driver(.absent), .serving(id(1), held: [:]),
      .inserted(.absent), [.tell(.deviceReset, nil)], "ready"),
    Row(
      "says nothing of a reset and a new start that were merged", .after(DeviceMachine.live), .driver(.live),
      .serving(id(1), held: [:]), .inserted(.live), [], "connected"),
    Row(
      "is adopted with its driver",
      .after(DeviceMachine.open, earlier: .adoptable(.live)), .plugged(id(1), .live), .serving(id(1), held: [:]),
      .inserted(.live),
      [.writeError(nil), .writeState(.initWait, over: [.initialising]), .tell(.deviceAdopted, nil)], "connected"),
    Row(
      "is plugged in where its registers are already",
      .after([DeviceMachine.begin], earlier: .adoptable(.live)), .started(id(1), objection: nil),
      .plugging(id(1), .first, .init()), .inserted(.live), [.plug(id(1))], "opening"),
    Row(
      "asks for a reset when what is known of it cannot be used",
      .after([DeviceMachine.begin], earlier: .lost("version 99")), .started(id(1), objection: nil),
      .plugging(id(1), .first, .init()), .inserting, [.insert(id(1), needsReset: true)], "opening"),
    Row(
      "says why it must be reset", .after(DeviceMachine.open, earlier: .lost("version 99")),
      .plugged(id(1), .broken("")),
      .serving(id(1), held: [:]), .inserted(.broken("version 99")),
      [.writeError(nil), .writeState(.initWait, over: [.initialising]), .tell(.deviceFaulted, "version 99")], "faulted"),
  ]) func takesItsPlace(row: Row) { row.check() }

  @Test func whatCannotBeIsNamed() {
    var machine = DeviceMachine.after([DeviceMachine.begin])
    let effects = machine.handle(DeviceMachine.begin, at: now)
    guard case .unexpected(let words)? = effects.first, effects.count == 1 else {
      Issue.record("\(effects)")
      return
    }
    #expect(words.hasPrefix("a second begin while starting("))
  }

  // MARK: Failures

  private static let restart1 = DeviceEvent.report(id(1), .gone("EIO"))

  @Test(arguments: [
    Row(
      "that cannot be opened is tried again", .after([DeviceMachine.begin]),
      .startFailed(id(1), "no image", isFinal: false), .waiting(.start(id(2), .retry("no image"))), .absent,
      [
        .join(id(1)), .tell(.deviceFailed, "no image"), .writeError("no image"),
        .writeState(.initWait, over: [.initialising]), .schedule(.start(id(2)), 1000),
      ], "failed"),
    Row(
      "says the same failure once, and waits longer",
      .after([DeviceMachine.begin, .startFailed(id(1), "no image", isFinal: false), .timer(.start(id(2)))]),
      .startFailed(id(3), "no image", isFinal: false), .waiting(.start(id(4), .retry("no image"))), .absent,
      [.join(id(3)), .schedule(.start(id(4)), 2000)], "failed"),
    Row(
      "whose entry is wrong waits for another", .after([DeviceMachine.begin]),
      .startFailed(id(1), "mode: 'x'", isFinal: true), .waiting(.rest(.failed("mode: 'x'"))), .absent,
      [
        .join(id(1)), .tell(.deviceFailed, "mode: 'x'"), .writeError("mode: 'x'"),
        .writeState(.initWait, over: [.initialising]),
      ], "failed"),
    Row(
      "that must not be retried waits for an operator", .after([DeviceMachine.begin], mode: .never),
      .startFailed(id(1), "no image", isFinal: false), .waiting(.rest(.failed("no image"))), .absent,
      [
        .join(id(1)), .tell(.deviceFailed, "no image"), .writeError("no image"),
        .writeState(.initWait, over: [.initialising]),
      ], "failed"),
    Row(
      "stays failed for as long as another try is open",
      .after([DeviceMachine.begin, .startFailed(id(1), "no image", isFinal: false)]), .timer(.start(id(2))),
      .starting(id(3), .use(.retry("no image"))), .absent, [.start(id(3))], "failed"),
    Row(
      "ignores the timer of an earlier pause",
      .after([DeviceMachine.begin, .startFailed(id(1), "no image", isFinal: false), .entry(.corrected)]),
      .timer(.start(id(2))), .starting(id(3), .use(.retry("no image"))), .absent, [], "failed"),
    Row(
      "whose storage is gone is stopped first", .after(DeviceMachine.live), restart1,
      .stopping(id(1), .again(.restart("EIO"), after: 250)), .inserted(.live),
      [.tell(.deviceRestarting, "EIO; again in 250 ms"), .stop(id(1))], "restarting"),
    Row(
      "pauses when it is joined", .after(DeviceMachine.live + [restart1]), .stopped(id(1)),
      .waiting(.start(id(2), .restart("EIO"))), .inserted(.live), [.join(id(1)), .schedule(.start(id(2)), 250)],
      "restarting"),
    Row(
      "is told restarted",
      .after(DeviceMachine.live + [restart1, .stopped(id(1)), .timer(.start(id(2))), .started(id(3), objection: nil)]),
      .plugged(id(3), .live), .serving(id(3), held: [:]), .inserted(.live),
      [.writeError(nil), .writeState(.initWait, over: [.initialising]), .tell(.deviceRestarted, nil)], "connected"),
    Row(
      "that must not be restarted is quarantined", .after(DeviceMachine.live, mode: .never), restart1,
      .stopping(id(1), .rest(.quarantined("EIO"))), .inserted(.live), [.tell(.deviceQuarantined, "EIO"), .stop(id(1))],
      "quarantined"),
    Row(
      "whose budget is used up is quarantined",
      .after(
        DeviceMachine.live + [
          restart1, .stopped(id(1)), .timer(.start(id(2))), .startFailed(id(3), "EIO", isFinal: false),
          .timer(.start(id(4))),
        ]), .startFailed(id(5), "EIO", isFinal: false), .waiting(.rest(.quarantined("EIO"))), .inserted(.live),
      [.join(id(5)), .tell(.deviceQuarantined, "EIO")], "quarantined"),
    Row(
      "whose guest breaks a queue needs a reset", .after(DeviceMachine.live), .report(id(1), .fault("ring")),
      .serving(id(1), held: [:]), .inserted(.broken("ring")), [.tell(.deviceFaulted, "ring")], "faulted"),
    Row(
      "is ready behind the reset", .after(DeviceMachine.live + [.report(id(1), .fault("ring"))]), .driver(.absent),
      .serving(id(1), held: [:]), .inserted(.absent), [.tell(.deviceReset, nil)], "ready"),
    Row(
      "is made anew where that is the policy", .after(DeviceMachine.live, mode: .always),
      .report(id(1), .fault("ring")), .stopping(id(1), .again(.restart("ring"), after: 250)),
      .inserted(.broken("ring")),
      [.tell(.deviceFaulted, "ring"), .tell(.deviceRestarting, "ring; again in 250 ms"), .stop(id(1))], "restarting"),
    Row(
      "whose guest breaks it too often is quarantined",
      .after(DeviceMachine.live + [.report(id(1), .fault("ring")), .report(id(1), .fault("ring"))]),
      .report(id(1), .fault("ring")), .stopping(id(1), .rest(.quarantined("ring; that was fault 3 within 600 s"))), nil,
      [
        .tell(.deviceFaulted, "ring"), .tell(.deviceQuarantined, "ring; that was fault 3 within 600 s"), .stop(id(1)),
      ], "quarantined"),
    Row(
      "that is being stopped has nothing more to say", .after(DeviceMachine.live + [restart1]), restart1,
      .stopping(id(1), .again(.restart("EIO"), after: 250)), .inserted(.live), [], "restarting"),
    Row(
      "is held at an error of its storage", .after(DeviceMachine.live), .report(id(1), .held(queue: 1, "full")),
      .serving(id(1), held: [1: "full"]), .inserted(.live), [.tell(.deviceHeld, "full")], "held"),
    Row(
      "keeps a hold that comes before it is in its place",
      .after(DeviceMachine.open + [.report(id(1), .held(queue: 0, "full"))], earlier: .adoptable(.live)),
      .plugged(id(1), .live), .serving(id(1), held: [0: "full"]), .inserted(.live),
      [.writeError(nil), .writeState(.initWait, over: [.initialising]), .tell(.deviceAdopted, nil)], "held"),
    Row(
      "is resumed by its backend",
      .after(DeviceMachine.live + [.report(id(1), .held(queue: 1, "full"))]), .command(.resume),
      .serving(id(1), held: [1: "full"]), .inserted(.live), [.resume(id(1))], "held"),
    Row(
      "is free with its last queue",
      .after(DeviceMachine.live + [.report(id(1), .held(queue: 1, "full"))]), .report(id(1), .resumed(queue: 1)),
      .serving(id(1), held: [:]), .inserted(.live), [.tell(.deviceResumed, nil)], "connected"),
  ]) func fails(row: Row) { row.check() }

  @Test func phasesHaveTheirNamesInTheList() {
    let phases: [DevicePhase] = [
      .opening, .ready, .connected, .failed(reason: ""), .faulted(reason: ""), .held(reason: ""),
      .restarting(reason: ""), .quarantined(reason: ""), .paused, .closing,
    ]
    #expect(phases.map(\.name) == DevicePhase.names)
  }
}
