import ConsoleLink
import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue

/// A console device with its driver, and whoever is at the other ends of its ports.
@Suite struct ConsoleBackendTests {
  private let folder = TemporaryFolder()
  private static let page: UInt64 = 4096

  private func fixture(_ ports: [ConsolePortSettings], wanted: FeatureBits? = nil) throws -> DeviceFixture {
    let settings = ConsoleSettings(ports: ports)
    let count = wanted == nil ? 2 * ports.count + 2 : 2
    return try DeviceFixture(
      deviceID: 3, wanted: wanted, queueSize: 32, queueCount: count, consoleFolder: folder.path
    ) { context, completion in
      ConsoleBackend.start(settings, context) { completion($0.map { $0 }) }
    }
  }

  private func console() -> ConsolePortSettings { ConsolePortSettings(name: "", isConsole: true) }

  private func channel(_ name: String = "org.qemu.guest_agent.0") -> ConsolePortSettings {
    var port = ConsolePortSettings(name: name, isConsole: false)
    port.socket = .listen("\(folder.path)/agent.sock")
    return port
  }

  /// Guest memory for the buffers of a queue.
  private func place(_ fixture: DeviceFixture, _ queue: Int, _ index: Int = 0) -> UInt64 {
    fixture.buffers + UInt64(queue) * 64 * Self.page + UInt64(index) * Self.page
  }

  private func offerAll(_ fixture: DeviceFixture, _ queue: Int, count: Int = 16) {
    for index in 0..<count {
      _ = fixture.driver.add([.init(place(fixture, queue, index), 4096, writable: true)], queue: queue)
    }
    fixture.driver.notify(queue: queue)
  }

  private func write(_ fixture: DeviceFixture, _ bytes: [UInt8], queue: Int = 1) {
    fixture.put(bytes, at: place(fixture, queue))
    _ = fixture.driver.add([.init(place(fixture, queue), UInt32(bytes.count), writable: false)], queue: queue)
    fixture.driver.notify(queue: queue)
  }

  private func say(_ fixture: DeviceFixture, port: UInt8, _ event: UInt8, _ value: UInt8) {
    write(fixture, [port, 0, 0, 0, event, 0, value, 0], queue: 3)
    #expect(fixture.waitForUsed(3) != nil)
  }

  /// The device's next message: port, event, value, and what follows. Buffers come back in the order in which they were offered.
  private final class Mailbox {
    var next = 0
  }

  private func message(_ fixture: DeviceFixture, _ mailbox: Mailbox) -> [UInt8]? {
    guard let used = fixture.waitForUsed(2) else { return nil }
    defer { mailbox.next += 1 }
    return fixture.bytes(at: place(fixture, 2, mailbox.next), count: Int(used.length))
  }

  private func connect(_ path: String) -> Int32 { (try? UnixSocket.connect(path)) ?? -1 }

  private func receive(_ end: Int32, count: Int, seconds: Int = 30) -> [UInt8] {
    var all: [UInt8] = []
    while all.count < count {
      var wait = pollfd(fd: end, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, Int32(seconds * 1000)) == 1 else { break }
      var bytes = [UInt8](repeating: 0, count: count - all.count)
      let got = read(end, &bytes, bytes.count)
      guard got > 0 else { break }
      all += bytes[..<got]
    }
    return all
  }

  /// The handshake up to two ports that the driver has open.
  private func boot(_ fixture: DeviceFixture, _ mailbox: Mailbox) {
    offerAll(fixture, 2)
    say(fixture, port: 0, 0, 1)
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 1, 0, 1, 0])
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 1, 0, 1, 0])
    say(fixture, port: 0, 3, 1)
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 4, 0, 1, 0])  // a console
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 6, 0, 1, 0])  // open
    say(fixture, port: 1, 3, 1)
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 7, 0, 1, 0] + Array("org.qemu.guest_agent.0".utf8))
    say(fixture, port: 0, 6, 1)
    say(fixture, port: 1, 6, 1)
  }

  @Test func portsAreAnnouncedNamedAndOpenedOnBothSides() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    let mailbox = Mailbox()
    boot(fixture, mailbox)
    let client = connect("\(folder.path)/agent.sock")
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 6, 0, 1, 0])
    write(fixture, Array("{\"return\": {}}\n".utf8), queue: 5)
    #expect(receive(client, count: 15) == Array("{\"return\": {}}\n".utf8))
    offerAll(fixture, 4)
    let request = Array("{\"execute\": \"guest-ping\"}\n".utf8)
    #expect(Glibc.write(client, request, request.count) == request.count)
    #expect(fixture.waitForUsed(4)?.length == UInt32(request.count))
    #expect(fixture.bytes(at: place(fixture, 4), count: request.count) == request)
    let board = try #require((fixture.backend as? ConsoleBackend)?.board)
    #expect(board.isHostOpen(0) && board.isHostOpen(1))
    #expect(eventually { fixture.faults.portsOpen == 0b11 })
    close(client)
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 6, 0, 0, 0])
    #expect(eventually { !board.isHostOpen(1) })
    say(fixture, port: 1, 6, 0)
    #expect(eventually { fixture.faults.portsOpen == 0b01 && board.isGuestOpen(0) && !board.isGuestOpen(1) })
  }

  @Test func guestThatOpensAndClosesAllTheTimeIsReportedOnceInAWhile() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    boot(fixture, Mailbox())
    #expect(eventually { fixture.faults.portsOpen == 0b11 })
    let before = fixture.faults.portReports
    let start = EventLoop.now()
    for turn in 0..<201 { say(fixture, port: 1, 6, turn & 1 == 0 ? 0 : 1) }
    #expect(eventually { fixture.faults.portsOpen == 0b01 })
    // One in a tenth of a second, and those at both ends.
    #expect(fixture.faults.portReports - before <= 2 + Int((EventLoop.now() - start) / 100_000_000))
  }

  @Test func channelWaitsForItsReaderAndLosesNothing() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    boot(fixture, Mailbox())
    let client = connect("\(folder.path)/agent.sock")
    defer { close(client) }
    var sent: [UInt8] = []
    var received: [UInt8] = []
    var random = SeededGenerator(seed: 7)
    let noise = (0..<8192).map { _ in UInt8.random(in: 0...255, using: &random) }
    var chains = 0
    var taken = 0
    // Far more than all buffers on the way hold; the reader begins late.
    while received.count < 500_000 {
      while chains - taken < 8, sent.count < 500_000 {
        let start = Int.random(in: 0..<4096, using: &random)
        let bytes = Array(noise[start..<start + 4096])
        fixture.put(bytes, at: place(fixture, 5, chains % 8))
        _ = fixture.driver.add([.init(place(fixture, 5, chains % 8), 4096, writable: false)], queue: 5)
        fixture.driver.notify(queue: 5)
        sent += bytes
        chains += 1
      }
      received += receive(client, count: min(65536, sent.count - received.count))
      while fixture.driver.takeUsed(queue: 5) != nil { taken += 1 }
    }
    #expect(received == Array(sent[..<received.count]))
    #expect(fixture.account.all.allSatisfy { $0.counters.drops(.host).value == 0 })
  }

  @Test func consoleNeverWaitsForAReaderAndCountsWhatIsLost() throws {
    var port = console()
    port.socket = .listen("\(folder.path)/console.sock")
    let fixture = try fixture([port, channel()])
    defer { fixture.stop() }
    boot(fixture, Mailbox())
    let client = connect("\(folder.path)/console.sock")
    defer { close(client) }
    let text = Array(repeating: UInt8(ascii: "x"), count: 4096)
    // Nobody reads.
    for _ in 0..<600 {
      write(fixture, text)
      #expect(fixture.waitForUsed(1) != nil)
    }
    #expect(eventually { fixture.account.queue(1).counters.drops(.host).value > 0 })
    #expect(eventually { fixture.account.queue(1).counters.writtenBytes.value == 600 * 4096 })
  }

  @Test func singlePortWorksWithoutTheControlQueues() throws {
    var port = console()
    port.log = ConsoleLogSettings(path: "\(folder.path)/console.log")
    let fixture = try fixture([port], wanted: [.consoleSize])
    defer { fixture.stop() }
    write(fixture, Array("hello\n".utf8))
    #expect(fixture.waitForUsed(1) != nil)
    #expect(eventually { contents("console.log") == "hello\n" })
    offerAll(fixture, 0)
    let viewer = connect("\(folder.path)/device-0.sock")
    defer { close(viewer) }
    let frames = ConsoleFrame(.write, [0]).encoded + ConsoleFrame(.data, Array("ls\n".utf8)).encoded
    #expect(Glibc.write(viewer, frames, frames.count) == frames.count)
    #expect(fixture.waitForUsed(0)?.length == 3)
    let size = ConsoleFrame(.size, [0, 132, 0, 43]).encoded
    #expect(Glibc.write(viewer, size, size.count) == size.count)
    #expect(eventually { fixture.driver.registers.read(0x100) == 43 << 16 | 132 })
  }

  private func contents(_ name: String) -> String? {
    guard let file = fopen("\(folder.path)/\(name)", "re") else { return nil }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 65536)
    return String(decoding: bytes[..<fread(&bytes, 1, bytes.count, file)], as: UTF8.self)
  }

  @Test func logIsRotatedByItsSizeAndItsLinesCarryTheTime() throws {
    var port = console()
    var log = ConsoleLogSettings(path: "\(folder.path)/guest.log")
    log.bytesLimit = 4096
    log.kept = 2
    log.hasTimestamps = true
    port.log = log
    let fixture = try fixture([port, channel()])
    defer { fixture.stop() }
    boot(fixture, Mailbox())
    for number in 0..<40 {
      write(fixture, Array("line \(number) ".utf8) + Array(repeating: UInt8(ascii: "."), count: 300) + [10])
      #expect(fixture.waitForUsed(1) != nil)
    }
    #expect(eventually { contents("guest.log")?.contains("line 39 ") == true })
    #expect(contents("guest.log.1") != nil && contents("guest.log.2") != nil && contents("guest.log.3") == nil)
    let first = contents("guest.log")?.split(separator: " ").first ?? ""
    #expect(first.count == 24 && first.hasSuffix("Z") && first.contains("T"))
  }

  @Test func whoeverAttachesSeesWhatIsRememberedAndOneAtATimeWrites() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    let mailbox = Mailbox()
    boot(fixture, mailbox)
    write(fixture, Array("login: ".utf8))
    #expect(fixture.waitForUsed(1) != nil)
    func hello(_ end: Int32, takes: UInt8) {
      let frame = ConsoleFrame(.write, [takes]).encoded
      #expect(Glibc.write(end, frame, frame.count) == frame.count)
    }
    let first = connect("\(folder.path)/device-0.sock")
    #expect(receive(first, count: 10) == ConsoleFrame(.data, Array("login: ".utf8)).encoded)
    hello(first, takes: 0)
    #expect(receive(first, count: 4) == ConsoleFrame(.mode, [1]).encoded)
    let second = connect("\(folder.path)/device-0.sock")
    #expect(receive(second, count: 10).count == 10)
    hello(second, takes: 0)
    #expect(receive(second, count: 4) == ConsoleFrame(.mode, [0]).encoded)
    offerAll(fixture, 0)
    let typed = ConsoleFrame(.data, Array("x".utf8)).encoded
    #expect(Glibc.write(second, typed, typed.count) == typed.count)
    hello(second, takes: 1)
    #expect(receive(first, count: 4) == ConsoleFrame(.mode, [0]).encoded)
    #expect(receive(second, count: 4) == ConsoleFrame(.mode, [1]).encoded)
    let root = ConsoleFrame(.data, Array("root\n".utf8)).encoded
    #expect(Glibc.write(second, root, root.count) == root.count)
    // What the second typed before it had the keyboard went nowhere.
    #expect(fixture.waitForUsed(0)?.length == 5)
    #expect(fixture.bytes(at: place(fixture, 0), count: 5) == Array("root\n".utf8))
    let size = ConsoleFrame(.size, [0, 100, 0, 30]).encoded
    #expect(Glibc.write(second, size, size.count) == size.count)
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 5, 0, 1, 0, 100, 0, 30, 0])
    close(first)
    close(second)
  }

  @Test func whoMayNotAttachIsToldSoAndSeesNothing() throws {
    let settings = ConsoleSettings(ports: [console(), channel()])
    let fixture = try DeviceFixture(deviceID: 3, queueSize: 32, queueCount: 6, consoleFolder: folder.path) {
      var context = $0
      context.mayAttach = { _ in false }
      let completion = $1
      return ConsoleBackend.start(settings, context) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    write(fixture, Array("secret".utf8))
    #expect(fixture.waitForUsed(1) != nil)
    let end = connect("\(folder.path)/device-0.sock")
    defer { close(end) }
    #expect(receive(end, count: 100) == ConsoleFrame(.mode, [2]).encoded)
    let agent = connect("\(folder.path)/agent.sock")
    defer { close(agent) }
    var byte: UInt8 = 0
    #expect(agent >= 0 && read(agent, &byte, 1) == 0)
    #expect((fixture.backend as? ConsoleBackend)?.board.isHostOpen(1) == false)
  }

  @Test func anotherBackendKnowsThePortsAndRemembers() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    let mailbox = Mailbox()
    boot(fixture, mailbox)
    write(fixture, Array("before\n".utf8))
    #expect(fixture.waitForUsed(1) != nil)
    try fixture.exchange {
      // The driver goes on meanwhile.
      fixture.put(Array("while\n".utf8), at: place(fixture, 1, 3))
      _ = fixture.driver.add([.init(place(fixture, 1, 3), 6, writable: false)], queue: 1)
    }
    #expect(fixture.waitForUsed(1) != nil)
    // It is told again what is open, since that may have changed.
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 6, 0, 1, 0])
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 6, 0, 0, 0])
    let viewer = connect("\(folder.path)/device-0.sock")
    defer { close(viewer) }
    let remembered = Array("before\nwhile\n".utf8)
    #expect(receive(viewer, count: remembered.count + 3) == ConsoleFrame(.data, remembered).encoded)
    let client = connect("\(folder.path)/agent.sock")
    defer { close(client) }
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 6, 0, 1, 0])
    offerAll(fixture, 4)
    #expect(Glibc.write(client, "ping", 4) == 4)
    // The port was open in the guest before, which the driver does not say again.
    #expect(fixture.waitForUsed(4)?.length == 4)
  }

  @Test func characterOfADriverWithoutQueuesIsWritten() throws {
    var port = console()
    port.log = ConsoleLogSettings(path: "\(folder.path)/emergency.log")
    let fixture = try fixture([port, channel()])
    defer { fixture.stop() }
    for character in "panic".utf8 { fixture.driver.registers.write(0x108, UInt32(character)) }
    #expect(eventually { contents("emergency.log") == "panic" })
  }

  @Test(arguments: 0..<12) func noMessageOrChainOfAHostileGuestEndsMoreThanItsOwnDevice(seed: Int) throws {
    var random = SeededGenerator(seed: UInt64(seed))
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    for _ in 0..<200 {
      let queue = Int.random(in: 0...5, using: &random)
      let addresses: [UInt64] = [place(fixture, queue), 0, 1 << 40, UInt64.max - 3]
      let lengths: [UInt32] = [0, 1, 7, 8, 9, 4096, UInt32.max]
      let buffers = (0..<Int.random(in: 1...4, using: &random)).map { _ in
        SimulatedDriver.Buffer(
          addresses.randomElement(using: &random) ?? 0, lengths.randomElement(using: &random) ?? 0,
          writable: (queue % 2 == 0) != (Int.random(in: 0...9, using: &random) == 0))
      }
      fixture.put((0..<64).map { _ in UInt8.random(in: 0...8, using: &random) }, at: place(fixture, queue))
      _ = fixture.driver.add(buffers, indirect: Bool.random(using: &random), queue: queue)
      fixture.driver.notify(queue: queue)
      while fixture.driver.takeUsed(queue: queue) != nil {}
    }
    fixture.driver.reset()
    try fixture.driver.start(deviceID: 3, wanted: fixture.backend.offeredFeatures, queueSize: 32, queueCount: 6)
    boot(fixture, Mailbox())
    write(fixture, Array("well\n".utf8))
    #expect(fixture.waitForUsed(1) != nil, "seed \(seed)")
  }

  /// vxd dies while the guest's driver probes: what was asked is answered by the next one.
  @Test func answersThatADeadBackendOwedComeFromTheNextOne() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    let mailbox = Mailbox()
    // Nowhere to put the answers yet.
    say(fixture, port: 0, 0, 1)
    try fixture.exchange()
    offerAll(fixture, 2)
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 1, 0, 1, 0])
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 1, 0, 1, 0])
    // Asked once more, they are not announced a second time: the next message is another.
    say(fixture, port: 0, 0, 1)
    try fixture.exchange()
    say(fixture, port: 1, 3, 1)
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 7, 0, 1, 0] + Array("org.qemu.guest_agent.0".utf8))
  }

  @Test func portThatWasReadyIsDescribedByTheNextBackend() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    let mailbox = Mailbox()
    offerAll(fixture, 2, count: 2)
    say(fixture, port: 0, 0, 1)
    #expect(message(fixture, mailbox) == [0, 0, 0, 0, 1, 0, 1, 0])
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 1, 0, 1, 0])
    say(fixture, port: 1, 3, 1)
    try fixture.exchange()
    for index in 2..<8 {
      _ = fixture.driver.add([.init(place(fixture, 2, index), 4096, writable: true)], queue: 2)
    }
    fixture.driver.notify(queue: 2)
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 7, 0, 1, 0] + Array("org.qemu.guest_agent.0".utf8))
  }

  /// The client of a port went while nobody served: the guest is told.
  @Test func hostEndThatClosedMeanwhileIsSaid() throws {
    let fixture = try fixture([console(), channel()])
    defer { fixture.stop() }
    let mailbox = Mailbox()
    boot(fixture, mailbox)
    let client = connect("\(folder.path)/agent.sock")
    #expect(message(fixture, mailbox) == [1, 0, 0, 0, 6, 0, 1, 0])
    try fixture.exchange { close(client) }
    var seen: [[UInt8]] = []
    for _ in 0..<2 { if let next = message(fixture, mailbox) { seen.append(next) } }
    #expect(seen.contains([1, 0, 0, 0, 6, 0, 0, 0]))
  }
}

extension ConsolePortBoard {
  func isGuestOpen(_ port: Int) -> Bool { Self.bit(guest.value, port) }
  func isHostOpen(_ port: Int) -> Bool { Self.bit(host.value, port) }
}
