import Glibc
import Testing

@testable import Lifecycle

/// Every order of events to a depth, and random ones beyond it: what must never be, is not.
@Suite struct ExplorationTests {
  /// A guest as it begins.
  enum Start: String, CaseIterable, Sendable {
    case registers, xenbus, adopted, adoptedXenbus, lost, alwaysRestarted, fused, withSpare, twoDevices, window,
      twoWindows

    func make() -> PlayedGuest {
      switch self {
      case .registers: Self.guest { $0.add(1, .toolstack, .registers) }
      case .xenbus: Self.guest(hasServer: false) { $0.add(1, .toolstack, .handshake) }
      case .adopted: Self.guest { $0.add(1, .toolstack, .registers, earlier: .adoptable(.live)) }
      case .adoptedXenbus:
        Self.guest(hasServer: false) { $0.add(1, .toolstack, .handshake, earlier: .adoptable(.live)) }
      case .lost: Self.guest(hasServer: false) { $0.add(1, .toolstack, .handshake, earlier: .lost("old version")) }
      case .alwaysRestarted: Self.guest(hasServer: false) { $0.add(1, .toolstack, .handshake, mode: .always) }
      case .fused: Self.guest { $0.add(1, .toolstack, .registers, earlier: .adoptable(.live), fuse: "crashed vxd") }
      case .window: Self.guest(hasServer: false) { $0.add(1, .toolstack, .registers, hasWindow: true) }
      case .twoWindows:
        Self.guest(hasServer: false) {
          $0.add(1, .toolstack, .registers, hasWindow: true)
          $0.add(2, .toolstack, .handshake)
        }
      case .withSpare:
        Self.guest {
          $0.add(1, .toolstack, .registers)
          $0.add(2, .profile, .registers)
        }
      case .twoDevices:
        Self.guest(hasServer: false) {
          $0.add(1, .toolstack, .handshake, mode: .never, pause: 50)
          $0.add(2, .toolstack, .handshake)
        }
      }
    }

    private static func guest(hasServer: Bool = true, _ body: (inout PlayedGuest) -> Void) -> PlayedGuest {
      var guest = PlayedGuest(hasServer: hasServer)
      body(&guest)
      return guest
    }

    /// Events from the start to which every order is tried; `VXD_EXPLORE=N` adds N.
    var depth: Int {
      let more = getenv("VXD_EXPLORE").flatMap { Int(String(cString: $0)) } ?? 0
      switch self {
      case .registers: return 7 + more
      case .window: return 6 + more
      case .xenbus, .adopted, .adoptedXenbus, .lost, .alwaysRestarted, .fused: return 6 + more
      case .withSpare, .twoDevices, .twoWindows: return 4 + more
      }
    }
  }

  @Test(arguments: Start.allCases) func everyOrderOfEventsIsHandled(start: Start) {
    let first = start.make()
    expectSound(first, [])
    // How each state was reached, for the message.
    var seen: Set<PlayedGuest> = [first.canonical]
    var layer: [(PlayedGuest, [Action])] = [(first, [])]
    var tried = 0
    for _ in 0..<start.depth {
      var next: [(PlayedGuest, [Action])] = []
      for (guest, path) in layer {
        for action in guest.actions() {
          var successor = guest
          successor.perform(action)
          tried += 1
          guard seen.insert(successor.canonical).inserted else { continue }
          let path = path + [action]
          // The ways to the end are long: each state takes one of them in turn.
          let way = Way.allCases[seen.count % Way.allCases.count]
          guard expectSound(successor, path, ways: path.count < 4 ? Way.allCases : [way]) else { return }
          next.append((successor, path))
        }
      }
      layer = next
    }
    print("\(start.rawValue): depth \(start.depth), \(tried) events tried, \(seen.count) states")
    #expect(seen.count > 500)
  }

  @Test(arguments: Start.allCases) func randomOrdersAreHandled(start: Start) {
    let seed = UInt64.random(in: 0...UInt64.max)
    print("\(start.rawValue): seed \(seed)")
    var random = SplitMix(state: seed)
    for _ in 0..<40 {
      var guest = start.make()
      var path: [Action] = []
      for step in 0..<120 {
        // The end is wanted late, or the walk is short.
        let actions = guest.actions(wishes: random.next() % 4 == 0).filter { action in
          switch action {
          case .domainGone, .end, .entry(_, .closing), .entry(_, .abandoned), .entry(_, .gone): step > 80
          default: true
          }
        }
        guard let action = actions.randomElement(using: &random) else { break }
        guest.perform(action)
        path.append(action)
        guard guest.violations.isEmpty else { break }
      }
      guard expectSound(guest, path, "seed \(seed)") else { return }
    }
  }

  // MARK: What holds in every state

  /// - Returns: whether it is.
  @discardableResult
  private func expectSound(
    _ guest: PlayedGuest, _ path: [Action], _ note: String = "", ways: [Way] = Way.allCases
  ) -> Bool {
    var faults = guest.violations
    faults += staleReports(guest)
    if faults.isEmpty { faults += corrections(guest) }
    if faults.isEmpty {
      for way in ways { faults += end(guest, way) }
    }
    guard !faults.isEmpty else { return true }
    let words = "\(note) \(faults.prefix(3)) after \(path)\nin \(guest.machine.members.map(\.machine.service))"
    Issue.record("\(words.replacing("Lifecycle.", with: "").replacing("LifecycleTests.", with: ""))")
    return false
  }

  /// Reports of backends that are no more change nothing.
  private func staleReports(_ guest: PlayedGuest) -> [String] {
    var faults: [String] = []
    for member in guest.machine.members {
      for number in 0...member.machine.lastNumber + 1 where BackendID(number) != member.machine.backend {
        let id = BackendID(number)
        let events: [DeviceEvent] = [
          .started(id, objection: nil), .startFailed(id, "late", isFinal: false), .stopped(id),
          .report(id, .gone("late")),
          .plugged(id, .live), .insertFailed(id, "late"), .adjusted(id, .link(isUp: true), .done("late")),
        ]
        for event in events {
          var machine = member.machine
          let effects = machine.handle(event, at: PlayedGuest.now)
          if !effects.isEmpty || machine != member.machine {
            faults.append("\(event) changes \(member.machine.service)")
          }
        }
      }
    }
    return faults
  }

  /// A corrected entry is followed, unless the device is served, has been paused by an operator, or ends.
  private func corrections(_ guest: PlayedGuest) -> [String] {
    var faults: [String] = []
    for member in guest.machine.members where member.origin == .toolstack {
      switch member.machine.service {
      case .serving, .plugging: continue  // noted, and followed with the next start
      case .waiting(.rest(.paused)), .stopping(_, .rest(.paused)), .starting(_, .next(.rest(.paused))): continue
      default: break
      }
      var copy = guest
      copy.perform(.entry(member.key, .corrected))
      copy.settle(timers: true)
      faults += copy.violations
      guard let machine = copy.machine[member.key], copy.devices[member.key]?.isCorrected == true else { continue }
      switch machine.service {
      case .starting(_, .next(.end)), .stopping(_, .end), .ended, .clearing, .released, .gone: break
      default: faults.append("the corrected entry is not followed: \(machine.service)")
      }
    }
    return faults
  }

  enum Way: CaseIterable {
    /// The entries are removed and the domain is gone.
    case gone
    /// The toolstack wants the devices gone and their drivers let go.
    case unplug
    case handOver
  }

  /// From every state there is a way to the end, after which nothing is left.
  private func end(_ guest: PlayedGuest, _ way: Way) -> [String] {
    guard !guest.isGone else { return [] }
    var copy = guest
    let toolstacks = guest.machine.members.filter { $0.origin == .toolstack }.map(\.key)
    switch way {
    case .gone:
      for key in toolstacks { copy.perform(.entry(key, .gone)) }
      copy.perform(.domainGone)
    case .unplug:
      for key in guest.machine.moving where !toolstacks.contains(key) { copy.perform(.absent(key)) }
      for key in toolstacks {
        copy.perform(.entry(key, .closing))
        guard copy.devices[key]?.style == .handshake else { continue }
        copy.perform(.frontend(key, FrontendView(state: .closing)))
      }
      copy.settle(timers: true)
      for key in toolstacks where copy.devices[key]?.style == .handshake {
        copy.perform(.frontend(key, FrontendView(state: .closed)))
      }
    case .handOver: copy.perform(.end(.handedOver))
    }
    copy.settle(timers: true)
    var faults = copy.violations
    if way == .unplug, [.held, .releasing].contains(copy.machine.windows), !copy.isGone {
      // All is given back but the server, which stays for as long as the guest runs.
      if copy.hasMemory, copy.machine.members.isEmpty,
        toolstacks.contains(where: { guest.devices[$0]?.isClaimed == true })
      {
        faults.append("memory is left by \(way)")
      }
      copy.perform(.domainGone)
      copy.settle(timers: true)
      faults += copy.violations
    }
    if !copy.isGone {
      faults.append("no end by \(way): \(copy.machine.phase), \(copy.machine.members.map(\.machine.service))")
    }
    if copy.hasServer || copy.hasMemory { faults.append("server or memory is left by \(way)") }
    for (key, device) in copy.devices {
      if device.unjoined != 0 || !device.backends.isEmpty { faults.append("\(key) is left with \(device.backends)") }
      if device.isMapped { faults.append("\(key) is mapped") }
      if way == .unplug, !guest.isHandedOver, toolstacks.contains(key), device.closedWrites != 1 {
        faults.append("closed was written \(device.closedWrites) times of \(key) by \(way)")
      }
    }
    return faults
  }
}

/// A small generator whose walks can be had again by their seed.
struct SplitMix: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var mixed = state
    mixed = (mixed ^ (mixed >> 30)) &* 0xbf58_476d_1ce4_e5b9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94d0_49bb_1331_11eb
    return mixed ^ (mixed >> 31)
  }
}
