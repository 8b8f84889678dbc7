import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue

/// A port whose socket is connected while the guest has it open (`"connect": PATH, "whenOpen": true`), and the program at the other end.
@Suite struct ConsoleFollowTests {
  private let folder = TemporaryFolder()
  private var path: String { "\(folder.path)/server.sock" }

  /// The device with its driver: port 0 is a terminal, port 1 follows.
  private final class Stage {
    let fixture: DeviceFixture
    private var answers = 0
    private var outputs = 0

    init(_ path: String) throws {
      var port = ConsolePortSettings(name: "com.redhat.spice.0", isConsole: false)
      port.socket = .connect(path, whenOpen: true)
      let settings = ConsoleSettings(ports: [ConsolePortSettings(name: "", isConsole: true), port])
      fixture = try DeviceFixture(deviceID: 3, queueSize: 32, queueCount: 6) { context, completion in
        ConsoleBackend.start(settings, context) { completion($0.map { $0 }) }
      }
      boot()
    }

    func boot() {
      answers = 0
      for index in 0..<16 {
        _ = fixture.driver.add([.init(place(2, index), 4096, writable: true)], queue: 2)
      }
      fixture.driver.notify(queue: 2)
      say(0, port: 0, value: 1)
      say(3, value: 1)
      // Both are announced, the second one is named, and its other end is open before anybody is there.
      let name = [1, 0, 0, 0, 7, 0, 1, 0] + Array("com.redhat.spice.0".utf8)
      #expect([message(), message(), message()] == [[0, 0, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1, 0], name])
      #expect(isToldOpen == true)
    }

    func place(_ queue: Int, _ index: Int = 0) -> UInt64 {
      fixture.buffers + UInt64(queue) * 64 * 4096 + UInt64(index) * 4096
    }

    /// Says something on the control queue.
    func say(_ event: UInt8, port: UInt8 = 1, value: UInt8, waits: Bool = true) {
      fixture.put([port, 0, 0, 0, event, 0, value, 0], at: place(3, outputs % 16))
      _ = fixture.driver.add([.init(place(3, outputs % 16), 8, writable: false)], queue: 3)
      outputs += 1
      fixture.driver.notify(queue: 3)
      if waits { #expect(fixture.waitForUsed(3) != nil) }
    }
    func open() { say(6, value: 1) }
    func close() { say(6, value: 0) }

    func message() -> [UInt8]? {
      guard let used = fixture.waitForUsed(2) else { return nil }
      defer { answers += 1 }
      return fixture.bytes(at: place(2, answers), count: Int(used.length))
    }
    /// What the driver is told next of the port's other end.
    var isToldOpen: Bool? {
      guard let message = message(), message.count == 8, message[0] == 1, message[4] == 6 else { return nil }
      return message[6] == 1
    }

    /// Writes to the port; at most 32 pieces at a time.
    func write(_ bytes: [UInt8], _ index: Int = 0) {
      fixture.put(bytes, at: place(5, index))
      _ = fixture.driver.add([.init(place(5, index), UInt32(bytes.count), writable: false)], queue: 5)
      fixture.driver.notify(queue: 5)
    }

    /// Makes buffers for what comes.
    func listen() {
      for index in 0..<8 { _ = fixture.driver.add([.init(place(4, index), 4096, writable: true)], queue: 4) }
      fixture.driver.notify(queue: 4)
    }

    var drops: UInt64 { fixture.account.queue(5).counters.drops(.linkDown).value }
    var board: ConsolePortBoard? { (fixture.backend as? ConsoleBackend)?.board }
  }

  /// The program that listens.
  private struct Server {
    let raw: Int32

    init(_ path: String) throws { raw = try UnixSocket.listen(path, mode: 0o600) }

    /// The next connection; -1 for none within the time.
    func accept(seconds: Int = 30) -> Int32 {
      var wait = pollfd(fd: raw, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, Int32(seconds * 1000)) == 1 else { return -1 }
      return Glibc.accept(raw, nil, nil)
    }
  }

  private func receive(_ end: Int32, count: Int) -> [UInt8] {
    var all: [UInt8] = []
    while all.count < count {
      var wait = pollfd(fd: end, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, 30_000) == 1 else { break }
      var bytes = [UInt8](repeating: 0, count: count - all.count)
      let got = read(end, &bytes, bytes.count)
      guard got > 0 else { break }
      all += bytes[..<got]
    }
    return all
  }

  /// All that comes up to the end; nil when there is none.
  private func receiveAll(_ end: Int32) -> [UInt8]? {
    defer { Glibc.close(end) }
    var all: [UInt8] = []
    while true {
      var wait = pollfd(fd: end, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, 30_000) == 1 else { return nil }
      var bytes = [UInt8](repeating: 0, count: 65536)
      let got = read(end, &bytes, bytes.count)
      guard got > 0 else { return all }
      all += bytes[..<got]
    }
  }

  @Test func connectionIsThereWhileTheGuestHasItsPortOpenAndNotOtherwise() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    stage.fixture.settle()
    #expect(server.accept(seconds: 0) == -1 && stage.board?.isHostOpen(1) == false)
    stage.open()
    let first = server.accept()
    #expect(eventually { stage.board?.isHostOpen(1) == true })
    stage.write(Array("hello".utf8))
    #expect(receive(first, count: 5) == Array("hello".utf8))
    // Nobody in the guest reads it, and the next one is not to get it.
    #expect(Glibc.write(first, "old", 3) == 3)
    stage.fixture.settle()
    stage.close()
    #expect(receiveAll(first) == [])
    #expect(eventually { stage.board?.isHostOpen(1) == false })
    stage.open()
    let second = server.accept()
    stage.listen()
    #expect(Glibc.write(second, "young", 5) == 5)
    #expect(stage.fixture.waitForUsed(4)?.length == 5)
    #expect(stage.fixture.bytes(at: stage.place(4), count: 5) == Array("young".utf8))
    Glibc.close(second)
  }

  @Test func whatTheGuestWritesRightBeforeItClosesArrives() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    // All of it in one batch, by a guest that waits for nothing.
    var random = SeededGenerator(seed: 11)
    let pieces = (0..<8).map { _ in (0..<4096).map { _ in UInt8.random(in: 0...255, using: &random) } }
    let blocked = Latch()
    stage.fixture.enqueue { blocked.wait() }
    stage.say(6, value: 1, waits: false)
    for (index, piece) in pieces.enumerated() { stage.write(piece, index) }
    stage.say(6, value: 0, waits: false)
    blocked.open()
    #expect(receiveAll(server.accept()) == pieces.flatMap { $0 })
    #expect(stage.drops == 0)
  }

  @Test func whatTheGuestWritesBeforeThereIsAServerWaitsForIt() throws {
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    stage.open()
    #expect(stage.isToldOpen == false)
    stage.write(Array("early".utf8))
    stage.fixture.settle()
    #expect(stage.fixture.driver.takeUsed(queue: 5) == nil)
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let end = server.accept()
    defer { Glibc.close(end) }
    #expect(stage.isToldOpen == true)
    #expect(receive(end, count: 5) == Array("early".utf8))
    #expect(stage.fixture.waitForUsed(5) != nil && stage.drops == 0)
  }

  @Test func whatNobodyTookIsNotForTheNextConnection() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    stage.open()
    let slow = server.accept()
    // It does not read: the port's and the socket's buffers are full, and chains wait.
    let piece = [UInt8](repeating: UInt8(ascii: "x"), count: 4096)
    var (written, used) = (0, 0)
    while written - used < 16 {
      stage.write(piece, written % 32)
      written += 1
      stage.fixture.settle()
      while stage.fixture.driver.takeUsed(queue: 5) != nil { used += 1 }
    }
    stage.close()
    while used < written, stage.fixture.waitForUsed(5) != nil { used += 1 }
    #expect(used == written && stage.drops > 0)
    stage.open()
    let next = server.accept()
    stage.write(Array("new".utf8))
    #expect(receive(next, count: 3) == Array("new".utf8))
    #expect(receiveAll(slow)?.allSatisfy { $0 == UInt8(ascii: "x") } == true)
    Glibc.close(next)
  }

  @Test func serverThatGoesIsLookedForAgainWhileTheGuestHasItsPortOpen() throws {
    var server = try Server(path)
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    stage.open()
    let first = server.accept()
    Glibc.close(server.raw)
    Glibc.close(first)
    #expect(stage.isToldOpen == false)
    server = try Server(path)
    defer { Glibc.close(server.raw) }
    let second = server.accept()
    #expect(second >= 0 && stage.isToldOpen == true)
    Glibc.close(second)
    #expect(stage.isToldOpen == false)
    // Nobody looks any more once the guest has closed it: it is told that it may open, and the pause passes.
    stage.close()
    #expect(stage.isToldOpen == true)
    #expect(server.accept(seconds: 2) == -1)
  }

  @Test func resetAndStopEndTheConnection() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    stage.open()
    let first = server.accept()
    stage.fixture.driver.reset()
    #expect(receiveAll(first) == [])
    try stage.fixture.driver.start(
      deviceID: 3, wanted: stage.fixture.backend.offeredFeatures, queueSize: 32, queueCount: 6)
    stage.boot()
    #expect(server.accept(seconds: 0) == -1)
    stage.open()
    let second = server.accept()
    stage.fixture.stop()
    #expect(receiveAll(second) == [])
  }

  /// The driver had its port open when the backend, or vxd, ended. Its program is told that the connection was lost, and has another one.
  @Test func nextBackendTellsOfTheLossAndConnectsAgain() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    stage.open()
    let first = server.accept()
    try stage.fixture.exchange()
    #expect(receiveAll(first) == [])
    // The terminal's end is said again too.
    var told: [[UInt8]] = []
    while told.last != [1, 0, 0, 0, 6, 0, 1, 0], let message = stage.message() { told.append(message) }
    #expect(told.filter { $0[0] == 1 } == [[1, 0, 0, 0, 6, 0, 0, 0], [1, 0, 0, 0, 6, 0, 1, 0]])
    let second = server.accept()
    defer { Glibc.close(second) }
    stage.write(Array("again".utf8))
    #expect(receive(second, count: 5) == Array("again".utf8))
    // One that has closed it meanwhile is connected when it opens it.
    try stage.fixture.exchange { stage.say(6, value: 0, waits: false) }
    #expect(stage.fixture.waitForUsed(3) != nil)
    stage.fixture.settle()
    #expect(server.accept(seconds: 2) == -1)
  }

  /// The guest has learnt of the loss before the next backend looks at any of its queues: the end of a message is not for the next connection.
  @Test func whatWasWrittenToALostConnectionIsNotForTheNextOne() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    stage.open()
    let first = server.accept()
    try stage.fixture.exchange {
      for index in 0..<8 { stage.write(Array("lost".utf8), index) }
      stage.say(6, value: 0, waits: false)
      stage.say(6, value: 1, waits: false)
    }
    #expect(receiveAll(first) == [])
    let second = server.accept()
    defer { Glibc.close(second) }
    stage.write(Array("new".utf8), 8)
    #expect(receive(second, count: 3) == Array("new".utf8))
    #expect(stage.drops == 32)
  }

  @Test func guestThatOpensAndClosesAllTheTimeConnectsNowAndThen() throws {
    let server = try Server(path)
    defer { Glibc.close(server.raw) }
    let stage = try Stage(path)
    defer { stage.fixture.stop() }
    let start = EventLoop.now()
    for _ in 0..<200 {
      stage.open()
      stage.close()
    }
    stage.fixture.settle()
    var count: UInt64 = 0
    while case let end = server.accept(seconds: 0), end >= 0 {
      Glibc.close(end)
      count += 1
    }
    #expect(count >= 1 && count <= PortConnection.burst + (EventLoop.now() - start) / PortConnection.pause)
    // It is served in its turn none the less.
    stage.open()
    let end = server.accept()
    #expect(end >= 0)
    stage.write(Array("at last".utf8))
    #expect(receive(end, count: 7) == Array("at last".utf8))
    Glibc.close(end)
  }
}
