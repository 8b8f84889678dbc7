import Engines
import TestSupport
import Testing

/// When a port's socket is connected, as a table and by all orders of events.
@Suite struct PortConnectionTests {
  private typealias Connection = PortConnection
  private static let second: UInt64 = 1_000_000_000

  /// Events from the beginning on, each a second behind the one before, up to the one that is looked at.
  struct Row: Sendable {
    var before: [PortConnection.Event]
    var event: PortConnection.Event
    var state: PortConnection.State
    var effects: [PortConnection.Effect]
    var isOpen: Bool

    init(
      _ before: [PortConnection.Event], _ event: PortConnection.Event, _ state: PortConnection.State,
      _ effects: [PortConnection.Effect] = [], isOpen: Bool
    ) {
      (self.before, self.event, self.state, self.effects, self.isOpen) = (before, event, state, effects, isOpen)
    }
  }

  // The last event comes at second 10.
  private static let soon = PortConnection.State.waiting(until: 11 * second, isSevered: true)
  private static let wake = PortConnection.Effect.wake(11 * second)
  static let rows: [Row] = [
    // Closed: nothing but an opening connects.
    Row([], .opened, .connecting, [.connect], isOpen: true),
    Row([], .resumed, soon, [wake], isOpen: false),
    Row([], .closed, .closed, isOpen: true),
    Row([], .due, .closed, isOpen: true),
    Row([], .lost, .closed, isOpen: true),
    Row([], .ended, .ended, isOpen: false),
    // An attempt has its outcome.
    Row([.opened], .connected, .connected, isOpen: true),
    Row([.opened], .refused, soon, [wake], isOpen: false),
    Row([.opened], .ended, .ended, isOpen: false),
    // Connected, up to the first end of either side.
    Row([.opened, .connected], .opened, .connected, isOpen: true),
    Row([.opened, .connected], .due, .connected, isOpen: true),
    Row([.opened, .connected], .lost, soon, [wake], isOpen: false),
    Row([.opened, .connected], .closed, .closed, [.disconnect, .forget], isOpen: true),
    Row([.opened, .connected], .ended, .ended, [.disconnect], isOpen: false),
    // Another attempt, while the guest has it open.
    Row([.opened, .refused], .due, .connecting, [.connect], isOpen: true),
    Row([.opened, .connected, .lost], .due, .connecting, [.connect], isOpen: true),
    Row([.resumed], .due, .connecting, [.connect], isOpen: true),
    Row([.opened, .refused], .closed, .closed, [.sleep, .forget], isOpen: true),
    Row([.opened, .connected, .lost], .closed, .closed, [.sleep, .forget], isOpen: true),
    Row([.opened, .refused], .ended, .ended, [.sleep], isOpen: false),
    // One that opens again is connected at once.
    Row([.opened, .connected, .lost, .closed], .opened, .connecting, [.connect], isOpen: true),
    Row([.resumed, .closed], .opened, .connecting, [.connect], isOpen: true),
    // The end is the end.
    Row([.ended], .opened, .ended, isOpen: false),
    Row([.opened, .refused, .ended], .due, .ended, isOpen: false),
  ]

  @Test(arguments: rows.indices) func eventLeadsWhereTheTableSays(index: Int) {
    let row = Self.rows[index]
    var connection = PortConnection()
    for (step, event) in row.before.enumerated() {
      _ = connection.handle(event, at: UInt64(10 - row.before.count + step) * Self.second)
    }
    let effects = connection.handle(row.event, at: 10 * Self.second)
    #expect(connection.state == row.state && effects == row.effects && connection.isOpen == row.isOpen)
  }

  @Test func timerThatIsEarlyIsAskedForAgain() {
    var connection = PortConnection()
    _ = connection.handle(.resumed, at: 0)
    #expect(connection.handle(.due, at: Self.second - 1) == [.wake(Self.second)])
    #expect(connection.handle(.due, at: Self.second) == [.connect])
  }

  /// Who opens more often than that waits for its turn, and is told meanwhile that the other end is open: nothing is known against it.
  @Test func fifthOpeningIsConnectedAtOnceAndTheSixthInItsTurn() {
    var connection = PortConnection()
    for turn in 0..<5 {
      #expect(connection.handle(.opened, at: 7) == [.connect], "turn \(turn)")
      _ = connection.handle(.connected, at: 7)
      #expect(connection.handle(.closed, at: 7) == [.disconnect, .forget])
    }
    #expect(connection.handle(.opened, at: 7) == [.wake(Self.second + 7)])
    #expect(connection.isOpen)
    #expect(connection.handle(.due, at: Self.second + 7) == [.connect])
  }

  /// Whatever happens in whatever order: attempts keep their rate, exactly one timer runs while one is waited for, a connection that was made is
  /// ended or lost before another one is made, and none is left behind.
  @Test(arguments: 0..<50) func noOrderOfEventsBreaksTheRules(seed: Int) {
    var random = SeededGenerator(seed: UInt64(seed))
    var connection = PortConnection()
    var (now, attempts, timer, isConnected, isOpen) = (UInt64(1), 0, UInt64?.none, false, false)
    for step in 0..<2000 {
      now += UInt64.random(in: 0...(seed % 2 == 0 ? 10_000_000 : 700_000_000), using: &random)
      var event = PortConnection.Event.allCases.filter { $0 != .ended }.randomElement(using: &random) ?? .due
      // What only comes when there is something that it can come of.
      if event == .lost, !isConnected { event = .due }
      if event == .due, timer.map({ $0 > now }) ?? true { event = isOpen ? .closed : .opened }
      if event == .connected || event == .refused || event == .resumed { event = .opened }
      if step == 1999 { event = .ended }
      if event == .lost { isConnected = false }
      if event == .due { timer = nil }
      if event == .opened { isOpen = true }
      if event == .closed { isOpen = false }
      var effects = connection.handle(event, at: now)
      while let effect = effects.first {
        effects.removeFirst()
        switch effect {
        case .connect:
          attempts += 1
          #expect(isOpen && !isConnected && timer == nil)
          isConnected = Bool.random(using: &random)
          effects += connection.handle(isConnected ? .connected : .refused, at: now)
        case .disconnect:
          #expect(isConnected)
          isConnected = false
        case .wake(let time): timer = time
        case .sleep: timer = nil
        case .forget: #expect(!isOpen)
        }
      }
      var isWaiting = false
      if case .waiting(let time, _) = connection.state {
        isWaiting = true
        #expect(timer == time)
      }
      #expect(isWaiting == (timer != nil) && (connection.state == .connected) == isConnected, "seed \(seed)")
      #expect(UInt64(attempts) <= PortConnection.burst + now / PortConnection.pause, "seed \(seed)")
    }
    #expect(connection.state == .ended && !isConnected && timer == nil, "seed \(seed)")
  }
}
