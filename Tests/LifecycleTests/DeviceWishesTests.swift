import Testing

@testable import Lifecycle

/// A place that another has.
private let displaced: [DeviceEffect] = [
  .tell(.deviceFailed, "QEMU's"), .writeError("QEMU's"), .writeState(.initWait, over: [.initialising]),
]

/// What operators, entries and the end of the daemon make of a device.
@Suite struct DeviceWishesTests {
  // MARK: Operators

  @Test(arguments: [
    Row(
      "is paused", .after(DeviceMachine.live), .command(.pause), .stopping(id(1), .rest(.paused)), .inserted(.live),
      [.tell(.devicePaused, nil), .stop(id(1))], "paused"),
    Row(
      "is resumed", .after(DeviceMachine.live + [.command(.pause), .stopped(id(1))]), .command(.resume),
      .starting(id(2), .use(.restart("restarted by an operator"))), .inserted(.live),
      [.tell(.deviceRestarting, "restarted by an operator"), .start(id(2))], "restarting"),
    Row(
      "is not paused before its guest knows it", .after([DeviceMachine.begin]), .command(.pause),
      .starting(id(1), .use(.first)), .absent, [], "opening"),
    Row(
      "is restarted at once out of a pause",
      .after(DeviceMachine.live + [.report(id(1), .gone("EIO")), .stopped(id(1))]), .command(.restart),
      .starting(id(3), .use(.restart("restarted by an operator"))), .inserted(.live),
      [.forgive, .tell(.deviceRestarting, "restarted by an operator"), .start(id(3))], "restarting"),
    Row(
      "is restarted out of quarantine", .after([.begin(after: 0, fuse: "crashes")], earlier: .adoptable(.live)),
      .command(.restart), .starting(id(1), .use(.restart("restarted by an operator"))), .inserted(.live),
      [.forgive, .tell(.deviceRestarting, "restarted by an operator"), .start(id(1))], "restarting"),
    Row(
      "is restarted with another open when one is on its way",
      .after(DeviceMachine.live + [.command(.pause), .stopped(id(1)), .command(.resume)]), .command(.restart),
      .starting(id(2), .next(.again(.restart("restarted by an operator"), after: 0))), .inserted(.live),
      [.forgive, .tell(.deviceRestarting, "restarted by an operator")], "restarting"),
    Row(
      "makes way where its place is another's", .after(DeviceMachine.served), .command(.displace("QEMU's")),
      .stopping(id(1), .rest(.displaced("QEMU's"))), .leaving,
      [.remove, .forgetState] + displaced + [.stop(id(1))], "failed"),
    Row(
      "makes way before it is put there",
      .after([DeviceMachine.begin, .started(id(1), objection: nil)], bus: .pending),
      .command(.displace("QEMU's")), .stopping(id(1), .rest(.displaced("QEMU's"))), .absent,
      [.forgetState] + displaced + [.stop(id(1))], "failed"),
    Row(
      "makes way while it is being opened", .after([DeviceMachine.begin]), .command(.displace("QEMU's")),
      .starting(id(1), .next(.rest(.displaced("QEMU's")))), .absent, [.forgetState] + displaced, "failed"),
    Row(
      "makes way although the bus failed and is there again",
      .after([DeviceMachine.begin, .command(.displace("QEMU's")), .busFailed("no server")]), .busReady,
      .starting(id(1), .next(.rest(.displaced("QEMU's")))), .absent, [], "failed"),
    Row(
      "makes way although the bus had failed",
      .after([DeviceMachine.begin, .busFailed("no server"), .command(.displace("QEMU's"))]), .busReady,
      .starting(id(1), .next(.rest(.displaced("QEMU's")))), .absent, [], "failed"),
    Row(
      "makes way once it is stopped",
      .after(DeviceMachine.served + [.command(.restart), .command(.displace("QEMU's"))]),
      .stopped(id(1)), .waiting(.rest(.displaced("QEMU's"))), .leaving, [.join(id(1)), .forgetState], "failed"),
    Row(
      "makes way at once while it is being stopped", .after(DeviceMachine.served + [.command(.restart)]),
      .command(.displace("QEMU's")), .stopping(id(1), .rest(.displaced("QEMU's"))), .leaving,
      [.remove, .forgetState] + displaced, "failed"),
    Row(
      "has another place when it is restarted before it has stopped",
      .after(DeviceMachine.served + [.command(.displace("QEMU's")), .command(.restart)]), .stopped(id(1)),
      .starting(id(2), .use(.restart("restarted by an operator"))), .leaving,
      [.join(id(1)), .forgetState, .start(id(2))], "restarting"),
    Row(
      "has another place when it is restarted before it was open",
      .after([DeviceMachine.begin, .command(.displace("QEMU's")), .command(.restart)]),
      .startFailed(id(1), "no image", isFinal: false), .starting(id(2), .use(.first)), .absent,
      [.join(id(1)), .forgetState, .start(id(2))], "opening"),
    Row(
      "is not left in another's place to the next daemon",
      .after(DeviceMachine.served + [.command(.displace("QEMU's")), .command(.end(.handedOver))]), .stopped(id(1)),
      .ended(.handedOver), .leaving, [.join(id(1)), .forgetState], "closing"),
    Row(
      "is not left in another's place that it has lost already",
      .after(DeviceMachine.served + [.command(.end(.handedOver))]), .command(.displace("QEMU's")),
      .stopping(id(1), .end(.handedOver)), .leaveDue, [.forgetState], "closing"),
    Row(
      "is not left in another's place when it goes into quarantine meanwhile",
      .after(
        DeviceMachine.served + Array(repeating: .report(id(1), .fault("ring")), count: 3)
          + [.command(.displace("QEMU's"))]),
      .stopped(id(1)), .waiting(.rest(.quarantined("ring; that was fault 3 within 600 s"))), .leaving,
      [.join(id(1)), .forgetState], "quarantined"),
    Row(
      "makes way in quarantine", .after([.begin(after: 0, fuse: "crashes")], earlier: .adoptable(.absent)),
      .command(.displace("QEMU's")), .waiting(.rest(.quarantined("crashes"))), .leaving, [.remove, .forgetState],
      "quarantined"),
    Row(
      "is put there again once it has made way",
      .after(
        DeviceMachine.served + [
          .command(.displace("QEMU's")), .stopped(id(1)), .command(.restart), .started(id(2), objection: nil),
        ]), .removed, .plugging(id(2), .restart("restarted by an operator"), .init()), .inserting,
      [.insert(id(2), needsReset: false)], "restarting"),
    Row(
      "asks for the bus when that is what lacks", .after([DeviceMachine.begin], bus: .failed("no server")),
      .command(.restart), .waiting(.bus(.first)), .absent, [.forgive, .retryBus], "failed"),
  ]) func obeysOperators(row: Row) { row.check() }

  @Test(arguments: [
    Row(
      "has its backend change", .after(DeviceMachine.live), .command(.adjust(.link(isUp: false))),
      .serving(id(1), held: [:]), .inserted(.live), [.adjust(id(1), .link(isUp: false))], "connected"),
    Row(
      "tells what became of a change", .after(DeviceMachine.live),
      .adjusted(id(1), .resize(bytes: 512), .done("512 bytes")),
      .serving(id(1), held: [:]), .inserted(.live), [.tell(.deviceResized, "512 bytes")], "connected"),
    Row(
      "tells why a change failed", .after(DeviceMachine.live),
      .adjusted(id(1), .link(isUp: true), .failed("no cable")),
      .serving(id(1), held: [:]), .inserted(.live), [.tell(.deviceLinkNotChanged, "no cable")], "connected"),
    Row(
      "refuses a change that no backend can do", .after(DeviceMachine.live + [.command(.pause)]),
      .command(.adjust(.resize(bytes: nil))), .stopping(id(1), .rest(.paused)), .inserted(.live),
      [.tell(.deviceNotResized, "the device is not served now")], "paused"),
    Row(
      "does not listen to the backend before", .after(DeviceMachine.live + [.command(.restart), .stopped(id(1))]),
      .adjusted(id(1), .resize(bytes: 512), .done("512 bytes")),
      .starting(id(2), .use(.restart("restarted by an operator"))), .inserted(.live), [], "restarting"),
  ]) func changesWhatIsServed(row: Row) { row.check() }

  /// Whatever a device is at, its limits are the last that were said; one that ends has none to keep to.
  @Test(
    arguments: [
      ("new", []), ("being opened", [DeviceMachine.begin]), ("served", DeviceMachine.live),
      ("paused", DeviceMachine.live + [.command(.pause), .stopped(id(1))]),
      ("in quarantine", [.begin(after: 0, fuse: "crashes")]),
      ("without its bus", [.busFailed("no server"), DeviceMachine.begin]),
      ("before the bus is there", [.busFailed("no server"), DeviceMachine.begin, .busReady]),
      ("being plugged", DeviceMachine.open), ("being stopped", DeviceMachine.live + [.command(.pause)]),
    ] as [(String, [DeviceEvent])]) func limitsHoldInAnyState(name: String, before: [DeviceEvent])
  {
    var machine = DeviceMachine.after(before)
    let service = machine.service
    #expect(machine.handle(.command(.limit(.reads(5))), at: now) == [.limit(.reads(5), isNews: true)], "\(name)")
    // An operator hears of a word of theirs, of the profiles' only where they change something.
    #expect(machine.handle(.command(.limit(.reads(5))), at: now) == [.limit(.reads(5), isNews: true)], "\(name)")
    #expect(machine.handle(.rules(.never, .reads(5), isNews: true), at: now) == [], "\(name)")
    #expect(machine.rules.restart == .never && machine.rules.limits == .reads(5))
    #expect(
      machine.handle(.rules(.never, .reads(6), isNews: false), at: now) == [.limit(.reads(6), isNews: false)], "\(name)"
    )
    #expect(machine.service == service, "\(name)")
    _ = machine.handle(.command(.end(.closed(isAwaited: false))), at: now)
    #expect(machine.handle(.command(.limit(.reads(7))), at: now) == [], "\(name)")
    #expect(machine.rules.limits == .reads(6))
  }

  // MARK: Spare disks

  private static let filling = DeviceMachine.served + [.command(.fill(image: "'/a'", limits: nil)), .stopped(id(1))]

  @Test(arguments: [
    Row(
      "is filled by another backend", .after(DeviceMachine.served, spare: .empty),
      .command(.fill(image: "'/a'", limits: nil)),
      .stopping(id(1), .again(.fill("'/a'"), after: 0)), .inserted(.absent), [.assign(image: "'/a'"), .stop(id(1))],
      "restarting"),
    Row(
      "is filled with limits of its own", .after(DeviceMachine.served, spare: .empty),
      .command(.fill(image: "'/a'", limits: .reads(5))), .stopping(id(1), .again(.fill("'/a'"), after: 0)),
      .inserted(.absent), [.limit(.reads(5), isNews: false), .assign(image: "'/a'"), .stop(id(1))], "restarting"),
    Row(
      "keeps an image that does", .after(filling, spare: .empty), .started(id(2), objection: nil),
      .plugging(id(2), .restart("'/a'"), .init()), .inserted(.absent),
      [.saveAssignment, .tell(.deviceAttached, "'/a'"), .plug(id(2))], "restarting"),
    Row(
      "is empty again when the image does not do", .after(filling, spare: .empty),
      .started(id(2), objection: "blocks of 4096"),
      .stopping(id(2), .again(.restart("nothing is attached"), after: 0)), .inserted(.absent),
      [.tell(.deviceNotAttached, "blocks of 4096"), .empty, .stop(id(2))], "restarting"),
    Row(
      "is empty again when there is no image", .after(filling, spare: .empty),
      .startFailed(id(2), "no file", isFinal: false),
      .starting(id(3), .use(.restart("nothing is attached"))), .inserted(.absent),
      [.join(id(2)), .tell(.deviceNotAttached, "no file"), .empty, .start(id(3))], "restarting"),
    Row(
      "waits for requests before it is emptied", .after(DeviceMachine.live, spare: .filled),
      .command(.detach(deadline: 500)),
      .serving(id(1), held: [:]), .inserted(.live), [.watchDrain(id(2)), .schedule(.drain(id(2)), 500)], "connected"),
    Row(
      "is emptied when none is left", .after(DeviceMachine.live + [.command(.detach(deadline: 500))], spare: .filled),
      .drained(id(2)),
      .stopping(id(1), .again(.empty("detached"), after: 0)), .inserted(.live),
      [.empty, .forgetAssignment, .stop(id(1))], "restarting"),
    Row(
      "is emptied by force", .after(DeviceMachine.live + [.command(.detach(deadline: 500))], spare: .filled),
      .timer(.drain(id(2))),
      .stopping(id(1), .again(.empty("detached by force"), after: 0)), .inserted(.live),
      [.empty, .forgetAssignment, .stop(id(1))], "restarting"),
    Row(
      "is emptied once",
      .after(DeviceMachine.live + [.command(.detach(deadline: 500)), .drained(id(2))], spare: .filled),
      .timer(.drain(id(2))), .stopping(id(1), .again(.empty("detached"), after: 0)), .inserted(.live), [],
      "restarting"),
    Row(
      "is told detached",
      .after(
        DeviceMachine.live + [
          .command(.detach(deadline: 500)), .drained(id(2)), .stopped(id(1)), .started(id(3), objection: nil),
        ], spare: .filled), .plugged(id(3), .live), .serving(id(3), held: [:]), .inserted(.live),
      [.writeError(nil), .writeState(.initWait, over: [.initialising]), .tell(.deviceDetached, nil)], "connected"),
    Row(
      "proves its image also when it is restarted meanwhile", .after(filling + [.command(.restart)], spare: .empty),
      .started(id(2), objection: nil), .stopping(id(2), .again(.restart("restarted by an operator"), after: 0)),
      .inserted(.absent), [.stop(id(2))], "restarting"),
    Row(
      "is empty again when the image of a restart does not do",
      .after(filling + [.command(.restart), .started(id(2), objection: nil), .stopped(id(2))], spare: .empty),
      .started(id(3), objection: "blocks of 4096"), .stopping(id(3), .again(.restart("nothing is attached"), after: 0)),
      .inserted(.absent), [.tell(.deviceNotAttached, "blocks of 4096"), .empty, .stop(id(3))], "restarting"),
    Row(
      "is filled once", .after(filling, spare: .empty), .command(.fill(image: "'/b'", limits: nil)),
      .starting(id(2), .use(.fill("'/a'"))), .inserted(.absent),
      [.tell(.deviceNotAttached, "the spare disk is in use")],
      "restarting"),
    Row(
      "is not filled while it is quarantined", .after([.begin(after: 0, fuse: "crashes")], spare: .empty),
      .command(.fill(image: "'/a'", limits: nil)), .waiting(.rest(.quarantined("crashes"))), .absent,
      [.tell(.deviceNotAttached, "the spare disk is quarantined: restart it first")], "quarantined"),
    Row(
      "is detached before its image is open", .after(filling, spare: .empty), .command(.detach(deadline: 500)),
      .starting(id(2), .next(.again(.empty("detached"), after: 0))), .inserted(.absent),
      [.tell(.deviceNotAttached, "detached before it was open"), .empty], "restarting"),
    Row(
      "is told detached when it is filled before another backend says so",
      .after(DeviceMachine.live + [.command(.detach(deadline: 500)), .drained(id(2))], spare: .filled),
      .command(.fill(image: "'/a'", limits: nil)), .stopping(id(1), .again(.fill("'/a'"), after: 0)), .inserted(.live),
      [.tell(.deviceDetached, nil), .assign(image: "'/a'")], "restarting"),
    Row(
      "keeps other limits for a later daemon", .after(DeviceMachine.live, spare: .filled),
      .command(.limit(.reads(5))), .serving(id(1), held: [:]), .inserted(.live),
      [.limit(.reads(5), isNews: true), .saveAssignment], "connected"),
  ]) func isFilledAndEmptied(row: Row) { row.check() }

  // MARK: The end

  private static let closing: [DeviceEffect] = [.schedule(.end(id(2)), 30_000), .leaving]

  @Test(arguments: [
    Row(
      "is quiet before its backend is stopped", .after(DeviceMachine.live), .entry(.closing),
      .stopping(id(1), .end(.closed(isAwaited: true))), .leaving,
      [.tell(.deviceClosing, nil), .remove, .stop(id(1))] + closing, "closing"),
    Row(
      "waits for what is being opened", .after([DeviceMachine.begin]), .entry(.gone),
      .starting(id(1), .next(.end(.closed(isAwaited: false)))), .absent, [.tell(.deviceClosing, nil)] + closing,
      "closing"),
    Row(
      "stops what was opened meanwhile", .after([DeviceMachine.begin, .entry(.gone)]), .started(id(1), objection: nil),
      .stopping(id(1), .end(.closed(isAwaited: false))), .absent, [.stop(id(1))], "closing"),
    Row(
      "stays with its guest while a backend is being stopped", .after(DeviceMachine.live + [.command(.pause)]),
      .entry(.closing), .stopping(id(1), .end(.closed(isAwaited: true))), .leaveDue,
      [.tell(.deviceClosing, nil)] + closing, "closing"),
    Row(
      "leaves its guest when that is joined",
      .after(DeviceMachine.live + [.command(.pause), .entry(.closing)]), .stopped(id(1)),
      .ended(.closed(isAwaited: true)), .leaving, [.join(id(1)), .remove], "closing"),
    Row(
      "leaves no traces when both halves have ended", .after(DeviceMachine.live + [.entry(.closing), .removed]),
      .stopped(id(1)), .clearing(.closed(isAwaited: true)), .absent, [.join(id(1)), .removeTraces], "closing"),
    Row(
      "leaves no traces when both halves have ended, the other way round",
      .after(DeviceMachine.live + [.entry(.closing), .stopped(id(1))]), .removed, .clearing(.closed(isAwaited: true)),
      .absent, [.removeTraces], "closing"),
    Row(
      "is released without traces",
      .after(DeviceMachine.live + [.entry(.closing), .stopped(id(1)), .removed]), .cleared,
      .released(.closed(isAwaited: true)), .absent, [.released], "closing"),
    Row(
      "writes closed at its very end",
      .after(DeviceMachine.live + [.entry(.closing), .removed, .stopped(id(1)), .cleared]), .dismissed, .gone, .absent,
      [
        .forgetState, .forgetAssignment, .writeClosed, .removeEntry, .tell(.deviceGone, nil), .lookAgain,
      ], "closing"),
    Row(
      "does not write to an entry that is gone",
      .after(DeviceMachine.live + [.entry(.gone), .removed, .stopped(id(1)), .cleared]), .dismissed, .gone, .absent,
      [.forgetState, .forgetAssignment, .removeEntry, .tell(.deviceGone, nil), .lookAgain], "closing"),
    Row(
      "writes closed for one who waits later", .after(DeviceMachine.live + [.entry(.gone)]), .entry(.closing),
      .stopping(id(1), .end(.closed(isAwaited: true))), .leaving, [], "closing"),
    Row(
      "says that its end takes long", .after(DeviceMachine.live + [.entry(.gone)]), .timer(.end(id(2))),
      .stopping(id(1), .end(.closed(isAwaited: false))), .leaving,
      [.tell(.deviceClosesSlowly, "its storage does not answer")], "closing"),
    Row(
      "is handed over without a word to its guest", .after(DeviceMachine.live), .command(.end(.handedOver)),
      .stopping(id(1), .end(.handedOver)), .leaveDue, [.stop(id(1))] + closing, "closing"),
    Row(
      "stays in its place when it is handed over", .after(DeviceMachine.live + [.command(.end(.handedOver))]),
      .stopped(id(1)), .released(.handedOver), .absent, [.join(id(1)), .released], "closing"),
    Row(
      "keeps its state for the next daemon",
      .after(DeviceMachine.live + [.command(.end(.handedOver)), .stopped(id(1))]), .dismissed, .gone, .absent, [],
      "closing"),
    Row(
      "takes no orders", .after(DeviceMachine.live + [.entry(.gone)]), .command(.restart),
      .stopping(id(1), .end(.closed(isAwaited: false))), .leaving, [], "closing"),
  ]) func ends(row: Row) { row.check() }
}

extension RateLimits {
  static func reads(_ rate: UInt64) -> RateLimits {
    var limits = RateLimits()
    limits.readOperations = rate
    return limits
  }
}

extension RestartPolicy {
  fileprivate static var never: RestartPolicy {
    var policy = RestartPolicy()
    policy.mode = .never
    return policy
  }
}
