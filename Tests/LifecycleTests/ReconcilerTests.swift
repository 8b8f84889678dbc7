import Testing

@testable import Lifecycle

@Suite struct ReconcilerTests {
  private static let nodes = ["state": "4", "online": "1", "params": "/a", "frontend": "/f", "vx-ack": "1 ok"]

  private static func entry(_ changes: [String: String] = [:], hasFrontend: Bool = true) -> Reconciler.Entry {
    Reconciler.Entry(nodes: nodes.merging(changes) { $1 }, hasFrontend: hasFrontend)
  }

  private static let known = Reconciler.Known(isEnding: false, description: entry().description)
  private static let ending = Reconciler.Known(isEnding: true, description: entry().description)

  private static let rows: [(String, Reconciler.Entry?, Reconciler.Known?, BusStyle, Reconciler.Action)] = [
    ("nothing wanted, nothing there", nil, nil, .registers, .nothing),
    ("new", entry(["state": "1"]), nil, .registers, .open),
    ("of an earlier daemon", entry(), nil, .registers, .open),
    ("of a toolstack that died", entry(hasFrontend: false), nil, .registers, .nothing),
    ("over", entry(["state": "6"]), nil, .registers, .nothing),
    ("between two incarnations", entry(["state": "6"]), nil, .handshake, .open),
    ("over and offline", entry(["state": "6", "online": "0"]), nil, .handshake, .nothing),
    ("to be closed, and not there", entry(["state": "5"]), nil, .registers, .sayClosed),
    ("offline, and not there", entry(["online": "0"]), nil, .registers, .sayClosed),
    ("as it was", entry(), known, .registers, .nothing),
    ("in another state", entry(["state": "2", "error": "x"]), known, .registers, .nothing),
    (
      "with nodes of ours", entry(["vx-ack": "2 wait", "vx-offer": "x", "vx-config": "y"]), known, .handshake, .nothing
    ),
    ("corrected", entry(["params": "/b"]), known, .registers, .tell(.corrected)),
    ("with options", entry(["vx-options": "{}"]), known, .registers, .tell(.corrected)),
    ("to be closed", entry(["state": "5"]), known, .registers, .tell(.closing)),
    ("offline", entry(["online": "0"]), known, .registers, .tell(.closing)),
    ("to be closed, without a frontend", entry(["state": "5"], hasFrontend: false), known, .registers, .tell(.closing)),
    ("without a frontend", entry(hasFrontend: false), known, .registers, .tell(.abandoned)),
    ("gone", nil, known, .registers, .tell(.gone)),
    ("said to be closed by another", entry(["state": "6"]), known, .registers, .tell(.gone)),
    ("reset by its driver", entry(["state": "6"]), known, .handshake, .nothing),
    ("gone while it ends", nil, ending, .registers, .tell(.gone)),
    ("asked for while it ends", entry(["state": "5"]), ending, .registers, .tell(.closing)),
    ("replaced while it ends", entry(["state": "1", "params": "/b"]), ending, .registers, .nothing),
  ]

  @Test(arguments: rows.indices) func actionFollowsFromEntryAndDevice(row: Int) {
    let (name, entry, known, style, action) = Self.rows[row]
    #expect(Reconciler.action(entry, known, style) == action, "\(name)")
  }

  @Test func profilesDevicesAreAddedOnce() {
    #expect(
      Reconciler.additions(wanted: ["net0", "rng0"], kept: ["spare0", "net0"], known: ["rng0"]) == ["net0", "spare0"])
  }

  @Test func guestsAppearByTheirProfileAndVanishWithTheirDomain() {
    let found = Reconciler.guests(
      domains: [(3, true), (4, false), (5, true)], known: [(5, false), (6, false), (7, true)])
    #expect(found.appear == [3])
    #expect(found.vanish == [6])
  }
}
