import Testing

@testable import Lifecycle

@Suite struct XenbusHandshakeTests {
  private static let setUp = FrontendView(state: .initialised, setup: .page(sequence: 1, reference: 8))
  private static let again = FrontendView(state: .initialised, setup: .page(sequence: 2, reference: 9))
  private static let closing = FrontendView(state: .closing)

  private static func offered(_ events: [DeviceEvent] = [], earlier: Earlier = .nothing) -> DeviceMachine {
    .after(DeviceMachine.served + events, style: .handshake, earlier: earlier)
  }

  private static let connected: [DeviceEvent] = [.frontend(setUp), .connected(sequence: 1, .connected)]

  private static func row(
    _ name: String, _ from: DeviceMachine, _ event: DeviceEvent, _ handshake: XenbusHandshake.Phase,
    _ effects: [DeviceEffect], _ phase: String
  ) -> (String, DeviceMachine, DeviceEvent, XenbusHandshake.Phase, [DeviceEffect], String) {
    (name, from, event, handshake, effects, phase)
  }

  private static let refusal = "the guest's setup is refused: bad magic"

  private static let rows = [
    row(
      "is offered", .after(DeviceMachine.open, style: .handshake), .plugged(id(1), .absent), .offered(.init()),
      [.offer, .readFrontend, .writeError(nil), .tell(.deviceReady, nil)], "ready"),
    row(
      "is offered as an earlier daemon did", .after(DeviceMachine.open, style: .handshake, earlier: .offered),
      .plugged(id(1), .absent), .offered(.init()),
      [.publishConfiguration, .readFrontend, .writeError(nil), .tell(.deviceReady, nil)], "ready"),
    row(
      "is adopted", .after(DeviceMachine.open, style: .handshake, earlier: .adoptable(.live)),
      .plugged(id(1), .absent), .offered(.init(adopts: true)),
      [.publishConfiguration, .readFrontend, .writeError(nil), .tell(.deviceAdopted, nil)], "ready"),
    row(
      "asks for a reset when nothing is known",
      .after(DeviceMachine.open, style: .handshake, earlier: .lost("nothing is known")), .plugged(id(1), .absent),
      .connected(.broken("nothing is known"), lastWrite: nil),
      [
        .needReset, .publishConfiguration, .readFrontend, .writeError(nil), .tell(.deviceFaulted, "nothing is known"),
      ], "faulted"),
    row(
      "connects a driver", offered(), .frontend(setUp), .connecting(.init(), sequence: 1),
      [.connect(sequence: 1, reference: 8, adopts: false)], "ready"),
    row(
      "goes on with a driver", offered(earlier: .adoptable(.live)), .frontend(setUp),
      .connecting(.init(adopts: true), sequence: 1), [.connect(sequence: 1, reference: 8, adopts: true)], "ready"),
    row(
      "is connected", offered([.frontend(setUp)]), .connected(sequence: 1, .connected),
      .connected(.live, lastWrite: nil),
      [
        .acknowledge(sequence: 1, .ok), .writeState(.connected, over: [.initWait, .connected]), .publishConfiguration,
        .tell(.deviceConnected, nil),
      ], "connected"),
    row(
      "makes the driver wait for room", offered([.frontend(setUp)]), .connected(sequence: 1, .noRoom("full")),
      .delayed(.init(tries: 1), id(2)), [.acknowledge(sequence: 1, .wait), .schedule(.room(id(2)), 1000)], "ready"),
    row(
      "tries again for room, and still goes on",
      offered([.frontend(setUp), .connected(sequence: 1, .noRoom("full"))], earlier: .adoptable(.live)),
      .timer(.room(id(2))), .connecting(.init(adopts: true, tries: 1), sequence: 1),
      [.connect(sequence: 1, reference: 8, adopts: true)], "ready"),
    row(
      "refuses a setup", offered([.frontend(setUp)]), .connected(sequence: 1, .refused("bad magic")),
      .offered(.init(refusal: .init(sequence: 1, reason: refusal))),
      [.acknowledge(sequence: 1, .error("bad magic")), .tell(.deviceFaulted, refusal)], "faulted"),
    row(
      "does not look at a refused setup again",
      offered([.frontend(setUp), .connected(sequence: 1, .refused("bad magic"))]), .frontend(setUp),
      .offered(.init(refusal: .init(sequence: 1, reason: refusal))), [], "faulted"),
    row(
      "looks at another setup", offered([.frontend(setUp), .connected(sequence: 1, .refused("bad magic"))]),
      .frontend(again), .connecting(.init(refusal: .init(sequence: 1, reason: refusal)), sequence: 2),
      [.connect(sequence: 2, reference: 9, adopts: false)], "ready"),
    row(
      "offers anew to a driver that was refused",
      offered([.frontend(setUp), .connected(sequence: 1, .refused("bad magic"))]),
      .frontend(closing), .offered(.init()), [.offer], "ready"),
    row(
      "asks for a reset when an adopted setup has changed", offered([.frontend(setUp)], earlier: .adoptable(.live)),
      .connected(sequence: 1, .refused("bad magic")), .connected(.broken(refusal), lastWrite: nil),
      [
        .acknowledge(sequence: 1, .error("bad magic")), .needReset, .publishConfiguration,
        .tell(.deviceFaulted, refusal),
      ], "faulted"),
    row(
      "refuses a text that is none", offered(), .frontend(FrontendView(state: .connected, setup: .malformed)),
      .offered(
        .init(refusal: .init(sequence: 0, reason: "the guest's setup is refused: vx-setup is not 'SEQUENCE GRANT'"))),
      [
        .acknowledge(sequence: 0, .error("vx-setup is not 'SEQUENCE GRANT'")),
        .tell(.deviceFaulted, "the guest's setup is refused: vx-setup is not 'SEQUENCE GRANT'"),
      ], "faulted"),
    row(
      "passes a write on", offered(connected),
      .frontend(
        FrontendView(
          state: .connected, setup: .page(sequence: 1, reference: 8), write: .init(number: 7, offset: 32, bytes: [0]))),
      .connected(.live, lastWrite: 7), [.writeConfiguration(.init(number: 7, offset: 32, bytes: [0]))], "connected"),
    row(
      "resets", offered(connected), .frontend(closing), .disconnecting, [.disconnect], "ready"),
    row(
      "resets for another kernel", offered(connected), .frontend(FrontendView(state: .initialising)), .disconnecting,
      [.disconnect], "ready"),
    row(
      "says closed behind a reset", offered(connected + [.frontend(closing)]), .disconnected, .closed,
      [.writeState(.closed, over: [.initWait, .connected]), .tell(.deviceReset, nil)], "ready"),
    row(
      "is offered again", offered(connected + [.frontend(closing), .disconnected]),
      .frontend(FrontendView(state: .initialising)), .offered(.init()), [.offer], "ready"),
    row(
      "joins a backend before it unmaps", offered(connected + [.command(.pause)]), .frontend(closing), .resetDue, [],
      "paused"),
    row(
      "unmaps when it is joined", offered(connected + [.command(.pause), .frontend(closing)]), .stopped(id(1)),
      .disconnecting, [.join(id(1)), .disconnect], "paused"),
    row(
      "lets a driver end its requests", offered(connected + [.frontend(setUp)]), .entry(.closing),
      .connected(.live, lastWrite: nil), [], "connected"),
    row(
      "says nothing of the state to one who leaves", offered(connected + [.entry(.closing), .frontend(closing)]),
      .frontend(FrontendView(state: .closed)), .disconnecting, [], "ready"),
  ]

  @Test(arguments: rows.indices) func handshakeGoes(row: Int) {
    let (name, from, event, phase, effects, shown) = Self.rows[row]
    var machine = from
    #expect(machine.handle(event, at: now) == effects, "\(name)")
    guard case .xenbus(let handshake) = machine.connection else {
      Issue.record("\(name): \(machine.connection)")
      return
    }
    #expect(handshake.phase == phase, "\(name)")
    #expect(machine.phase.name == shown, "\(name)")
  }

  @Test func deviceThatIsUnpluggedEndsWhenItsDriverHasLetGo() {
    var machine = Self.offered(Self.connected + [.entry(.closing), .frontend(Self.closing)])
    #expect(!machine.isEnding)
    let effects = machine.handle(.disconnected, at: now)
    #expect(machine.departure == .closed(isAwaited: true))
    #expect(
      effects == [
        .tell(.deviceReset, nil), .tell(.deviceClosing, nil), .remove, .stop(id(1)), .schedule(.end(id(2)), 30_000),
        .leaving,
      ])
  }

  @Test func quarantinedDeviceConnectsNobody() {
    var machine = Self.offered([
      .report(id(1), .fault("ring")), .report(id(1), .fault("ring")), .report(id(1), .fault("ring")),
    ])
    #expect(machine.phase.name == "quarantined")
    #expect(machine.handle(.frontend(Self.setUp), at: now) == [])
    // As soon as it may, it does.
    for event: DeviceEvent in [.stopped(id(1)), .command(.restart), .started(id(2), objection: nil)] {
      _ = machine.handle(event, at: now)
    }
    let effects = machine.handle(.plugged(id(2), .absent), at: now)
    #expect(effects.contains(.connect(sequence: 1, reference: 8, adopts: false)))
  }
}
