import Devices
import Engines
import EventLoop
import Glibc
import Synchronization
import TestSupport
import Testing

/// The NBD engine against qemu-storage-daemon, and against servers that misbehave.
@Suite struct NBDEngineTests {
  private static let needsServer = ConditionTrait.enabled(
    if: StorageDaemon.isInstalled, "qemu-storage-daemon is not installed")

  private let folder = TemporaryFolder()

  private final class Notices: Sendable {
    let all = Mutex<[String?]>([])
    var list: [String?] { all.withLock { $0 } }
  }

  /// An engine with buffers of its own: what a pump is to it.
  private final class Harness {
    let engine: NBDEngine
    let buffer = UnsafeMutableRawPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    let vectors = UnsafeMutablePointer<DataVector>.allocate(capacity: 64)
    let notices = Notices()

    init(_ address: String, readOnly: Bool = false, reconnect: UInt64 = 10_000) throws {
      let notices = notices
      engine = try NBDEngine(
        address: try NBDAddress(address), readOnly: readOnly, discard: true, depth: 64,
        reconnectMilliseconds: reconnect, onNotice: { notice in notices.all.withLock { $0.append(notice) } })
    }

    deinit {
      buffer.deallocate()
      vectors.deallocate()
    }

    func submit(_ operation: BlockOperation, tag: UInt32, offset: UInt64, bytes: Int = 0, durable: Bool = false) {
      vectors[Int(tag)] = DataVector(start: buffer + Int(tag) * 16384, length: bytes)
      var request = EngineRequest(
        operation: operation, tag: tag, offset: offset, length: UInt64(bytes), vectors: vectors + Int(tag),
        vectorCount: bytes > 0 && (operation == .read || operation == .write) ? 1 : 0)
      request.isDurable = durable
      engine.submit(&request, count: 1)
    }

    /// Completions by tag.
    func collect(_ count: Int, seconds: Int = 30) -> [UInt32: Int] {
      var results: [UInt32: Int] = [:]
      let space = UnsafeMutablePointer<EngineCompletion>.allocate(capacity: 64)
      defer { space.deallocate() }
      let deadline = EventLoop.now() + UInt64(seconds) * 1_000_000_000
      while results.count < count {
        let got = engine.reap(into: space, capacity: 64)
        for index in 0..<got { results[space[index].tag] = space[index].result }
        guard EventLoop.now() < deadline else { break }
        if got == 0 { engine.waitForCompletion() }
      }
      return results
    }

    /// What is completed by the time that the engine has noticed the loss of its server.
    func collectUntilLost() -> [UInt32: Int] {
      let deadline = EventLoop.now() + 30_000_000_000
      var results: [UInt32: Int] = [:]
      while notices.list.isEmpty, EventLoop.now() < deadline {
        results.merge(collect(1, seconds: 0)) { $1 }
        if notices.list.isEmpty { engine.waitForCompletion() }
      }
      results.merge(collect(1, seconds: 0)) { $1 }
      return results
    }

    func fill(_ tag: Int, _ byte: UInt8) { memset(buffer + tag * 16384, Int32(byte), 16384) }
    func holds(_ tag: Int, _ byte: UInt8, count: Int) -> Bool {
      (0..<count).allSatisfy { (buffer + tag * 16384).load(fromByteOffset: $0, as: UInt8.self) == byte }
    }
  }

  private func server(_ image: String) throws -> StorageDaemon { try StorageDaemon(folder: folder, image: image) }

  @Test(needsServer) func dataIsReadBackThroughARealServer() throws {
    let server = try server(folder.file("disk.img", bytes: 16 << 20))
    defer { server.stop() }
    let harness = try Harness(server.address)
    #expect(harness.engine.geometry.capacity == 16 << 20)
    #expect(harness.engine.geometry.canDiscard)
    #expect(harness.engine.geometry.canWriteZeroes)
    for tag in 0..<64 { harness.fill(tag, UInt8(tag + 1)) }
    for tag in 0..<64 {
      harness.submit(.write, tag: UInt32(tag), offset: UInt64(tag) * 16384, bytes: 16384, durable: tag % 2 == 0)
    }
    #expect(harness.collect(64).values.allSatisfy { $0 == 16384 })
    harness.submit(.flush, tag: 0, offset: 0)
    #expect(harness.collect(1) == [0: 0])
    for tag in 0..<64 { harness.fill(tag, 0) }
    for tag in 0..<64 { harness.submit(.read, tag: UInt32(tag), offset: UInt64(63 - tag) * 16384, bytes: 16384) }
    #expect(harness.collect(64).count == 64)
    for tag in 0..<64 { #expect(harness.holds(tag, UInt8(64 - tag), count: 16384)) }
    harness.submit(.writeZeroes, tag: 1, offset: 0, bytes: 16384)
    harness.submit(.discard, tag: 2, offset: 16384, bytes: 16384)
    #expect(harness.collect(2) == [1: 0, 2: 0])
    harness.submit(.read, tag: 3, offset: 0, bytes: 16384)
    #expect(harness.collect(1) == [3: 16384])
    #expect(harness.holds(3, 0, count: 16384))
  }

  @Test(needsServer) func lostServerIsFoundAgainAndNothingIsLost() throws {
    let image = folder.file("disk.img", bytes: 16 << 20)
    let first = try server(image)
    let harness = try Harness(first.address)
    first.stop()
    for tag in 0..<16 { harness.fill(tag, UInt8(tag + 1)) }
    for tag in 0..<16 { harness.submit(.write, tag: UInt32(tag), offset: UInt64(tag) * 16384, bytes: 16384) }
    #expect(harness.collectUntilLost().isEmpty)
    let second = try server(image)
    defer { second.stop() }
    #expect(harness.collect(16).values.allSatisfy { $0 == 16384 })
    #expect(harness.notices.list.count == 2)
    #expect(harness.notices.list.first! != nil)
    #expect(harness.notices.list.last! == nil)
    for tag in 0..<16 { harness.fill(tag, 0) }
    for tag in 0..<16 { harness.submit(.read, tag: UInt32(tag), offset: UInt64(tag) * 16384, bytes: 16384) }
    #expect(harness.collect(16).count == 16)
    for tag in 0..<16 { #expect(harness.holds(tag, UInt8(tag + 1), count: 16384)) }
  }

  @Test(needsServer, arguments: [false, true])
  func lossOfAServerTellsHowManyWritesWereOnlyInItsCache(durable: Bool) throws {
    let server = try server(folder.file("disk.img", bytes: 1 << 20))
    let harness = try Harness(server.address)
    for tag in 0..<4 { harness.submit(.write, tag: UInt32(tag), offset: 0, bytes: 512, durable: durable) }
    #expect(harness.collect(4).count == 4)
    harness.submit(.flush, tag: 0, offset: 0)
    #expect(harness.collect(1) == [0: 0])
    for tag in 0..<3 { harness.submit(.write, tag: UInt32(tag), offset: 0, bytes: 512, durable: durable) }
    #expect(harness.collect(3).count == 3)
    server.stop()
    harness.submit(.read, tag: 0, offset: 0, bytes: 512)
    #expect(harness.collectUntilLost().isEmpty)
    let words = try #require(harness.notices.list.first ?? nil)
    #expect(words.contains("up to 3 acknowledged writes") == !durable)
    harness.engine.abandon()
  }

  @Test(needsServer) func requestsFailWhenNoServerComesBackInTime() throws {
    let server = try server(folder.file("disk.img", bytes: 1 << 20))
    let harness = try Harness(server.address, reconnect: 200)
    server.stop()
    harness.submit(.write, tag: 0, offset: 0, bytes: 512)
    harness.submit(.flush, tag: 1, offset: 0)
    #expect(harness.collect(2) == [0: -5, 1: -5])
    // From then on at once, until the server is back.
    harness.submit(.read, tag: 2, offset: 0, bytes: 512)
    #expect(harness.collect(1) == [2: -5])
  }

  @Test(needsServer) func abandonedEngineFailsWhatWaits() throws {
    let server = try server(folder.file("disk.img", bytes: 1 << 20))
    let harness = try Harness(server.address, reconnect: 60_000)
    server.stop()
    harness.submit(.write, tag: 0, offset: 0, bytes: 512)
    #expect(harness.collectUntilLost().isEmpty)
    harness.engine.abandon()
    #expect(harness.collect(1) == [0: -5])
  }

  @Test(needsServer) func unknownExportIsNamed() throws {
    let server = try server(folder.file("disk.img", bytes: 1 << 20))
    defer { server.stop() }
    let address = "nbd+unix:///other?socket=\(folder.path)/nbd.sock"
    let fault = #expect(throws: ImageFault.self) { _ = try Harness(address) }
    #expect(fault?.message.contains("there is no export 'other'") == true)
  }

  static let mistakes = [
    ("nbd://", "the host is missing"), ("nbd://host:0/x", "expected a port"), ("nbd://[::1/x", "the bracket"),
    ("nbd+unix:///x", "'?socket=/path'"), ("nbd+unix:///x?socket=relative", "an absolute path"),
    ("nbd+unix://host/x?socket=/s", "starts with nbd+unix:///"), ("nbds://host/x", "TLS"), ("nbdx://a", "neither"),
    ("nbd://host/%zz", "not a valid escape"),
  ]

  @Test(arguments: mistakes) func addressWithAMistakeIsRefused(text: String, reason: String) {
    let fault = #expect(throws: ImageFault.self) { _ = try NBDAddress(text) }
    #expect(fault?.message.contains(reason) == true)
  }

  @Test func addressesAreUnderstood() throws {
    #expect(try NBDAddress("nbd://host").place == .tcp(host: "host", port: 10809))
    #expect(try NBDAddress("nbd://[::1]:99/a%20b").place == .tcp(host: "::1", port: 99))
    #expect(try NBDAddress("nbd://[::1]:99/a%20b").export == "a b")
    #expect(try NBDAddress("nbd+unix:///d?socket=/run/x").place == .unix(path: "/run/x"))
  }

  /// Servers that greet wrongly, hang up, or send garbage: a fault with words, never a trap.
  @Test(arguments: UInt64(1)...40) func garbageInTheHandshakeIsAFault(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    var answer: [UInt8] = Array("NBDMAGICIHAVEOPT".utf8) + [0, 3]
    if seed % 4 == 0 { answer = (0..<40).map { _ in UInt8.random(in: 0...255, using: &random) } }
    if seed % 4 != 0 {
      answer += [0, 3, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9]
      answer += (0..<Int.random(in: 0...64, using: &random)).map { _ in
        seed % 4 == 1 ? 0 : UInt8.random(in: 0...255, using: &random)
      }
    }
    let server = try LiarServer(path: folder.path + "/liar", answer: answer)
    defer { server.stop() }
    #expect(throws: ImageFault.self) {
      _ = try Harness("nbd+unix:///x?socket=\(folder.path)/liar")
    }
  }

  // MARK: Servers that mean ill

  private var liar: String { "nbd+unix:///x?socket=\(folder.path)/liar" }

  /// Milliseconds that something takes.
  private func time(_ body: () throws -> Void) rethrows -> UInt64 {
    let start = EventLoop.now()
    try body()
    return (EventLoop.now() - start) / 1_000_000
  }

  @Test func handshakeThatComesByteByByteIsOverAtItsDeadline() throws {
    let server = try LiarServer(path: folder.path + "/liar", behaviour: .drips)
    defer { server.stop() }
    let fault = #expect(throws: ImageFault.self) {
      let taken = try time {
        _ = try NBDEngine(
          address: try NBDAddress(liar), readOnly: false, discard: true, depth: 64, reconnectMilliseconds: 0,
          handshakeMilliseconds: 300, onNotice: { _ in })
      }
      Issue.record("a handshake after \(taken) ms")
    }
    #expect(fault?.message.contains("within") == true, "\(fault?.message ?? "")")
  }

  @Test func engineIsClosedWhileItsNextServerSaysNothing() throws {
    let server = try LiarServer(path: folder.path + "/liar", behaviour: .onceThenSilent)
    defer { server.stop() }
    let harness = try Harness(liar, reconnect: 60_000)
    harness.submit(.read, tag: 0, offset: 0, bytes: 512)
    #expect(harness.collect(1, seconds: 1).isEmpty)
    #expect(eventually { server.connections == 2 })
    harness.engine.abandon()
    #expect(harness.collect(1) == [0: -5])
    let taken = time { harness.engine.close() }
    #expect(taken < 5000, "it took \(taken) ms")
  }

  @Test func serverThatHangsUpAtOnceIsNotAskedAllTheTime() throws {
    let server = try LiarServer(path: folder.path + "/liar", behaviour: .hangsUp)
    defer { server.stop() }
    let harness = try Harness(liar, reconnect: 60_000)
    harness.submit(.read, tag: 0, offset: 0, bytes: 512)
    let deadline = EventLoop.now() + 1_500_000_000
    while EventLoop.now() < deadline { _ = harness.collect(1, seconds: 1) }
    // At once it would be thousands.
    #expect((2...8).contains(server.connections), "\(server.connections) connections")
    #expect(harness.notices.list.count <= 2 * server.connections)
    harness.engine.abandon()
    #expect(harness.collect(1) == [0: -5])
    harness.engine.close()
  }

  @Test func wordsOfAServerAreCut() throws {
    let words = [UInt8](repeating: UInt8(ascii: "w"), count: 60_000)
    let server = try LiarServer(
      path: folder.path + "/liar",
      behaviour: .says(LiarServer.greeting + LiarServer.reply(0x8000_0001, words)))
    defer { server.stop() }
    let fault = #expect(throws: ImageFault.self) { _ = try Harness(liar) }
    let message = fault?.message ?? ""
    #expect(message.contains("wwww"))
    #expect(message.utf8.count < 500, "\(message.utf8.count) bytes")
  }

  @Test(arguments: [0, 1, 513, 3000, 4095] as [UInt32]) func blocksOfASizeThatNoDiskHasAreRefused(size: UInt32) throws {
    let information: [UInt8] =
      [0, 3]
      + [size, 4096, 32 << 20].flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (24 - 8 * $0)) } }
    let server = try LiarServer(
      path: folder.path + "/liar",
      behaviour: .says(LiarServer.greeting + LiarServer.reply(3, information) + LiarServer.export))
    defer { server.stop() }
    if size == 1 {
      #expect(try Harness(liar).engine.geometry.logicalBlock == 512)
    } else {
      let fault = #expect(throws: ImageFault.self) { _ = try Harness(liar) }
      #expect(fault?.message.contains("block") == true)
    }
  }
}
