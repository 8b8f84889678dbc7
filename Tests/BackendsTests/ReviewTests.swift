import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue

/// Faults that a review of devices against the specification found, and that no other test would see again.
@Suite struct ReviewTests {
  private static let mac = MACAddress(value: 0x0016_3e00_0001)
  private let folder = TemporaryFolder()
  private let wire = FloodStage.Wire()

  private func network(
    queueSize: UInt16 = 64, wanted: FeatureBits? = nil, _ change: (inout NetSettings) -> Void = { _ in }
  ) throws -> DeviceFixture {
    var settings = NetSettings(attachment: .created(bridge: nil), tapName: "none", mac: Self.mac)
    settings.queueSize = queueSize
    change(&settings)
    let (final, near) = (settings, wire.near)
    return try DeviceFixture(deviceID: 1, wanted: wanted, queueSize: queueSize, queueCount: 3) {
      context, completion in
      NetBackend.start(
        final, context,
        openTap: { settings throws(TapFault) in
          TapDevice(name: "none", queues: (0..<settings.pairs).map { _ in fcntl(near, F_DUPFD_CLOEXEC, 0) })
        }
      ) { completion($0.map { $0 }) }
    }
  }

  /// A command of the control queue, which is the third; its answer.
  private func command(_ fixture: DeviceFixture, _ bytes: [UInt8]) -> UInt8? {
    let address = fixture.buffers + 65536
    fixture.put(bytes, at: address)
    fixture.put([0xee], at: address + 4096)
    _ = fixture.driver.add(
      [.init(address, UInt32(bytes.count), writable: false), .init(address + 4096, 1, writable: true)], queue: 2)
    fixture.driver.notify(queue: 2)
    guard fixture.waitForUsed(2) != nil else { return nil }
    return fixture.bytes(at: address + 4096, count: 1)[0]
  }

  private func configuration(_ fixture: DeviceFixture, _ range: Range<Int>) -> [UInt8] {
    range.map { UInt8(fixture.driver.registers.read(0x100 + UInt64($0), width: 1)) }
  }

  // MARK: Network

  /// The third queue is a pair's by its size, and the control queue by its use (virtio 1.2, 5.1.2).
  @Test func controlQueueOfADriverWithoutSeveralPairsMayHaveTheSizeOfAPairs() throws {
    let plain: FeatureBits = [.netMAC, .netControlQueue, .netControlReceive]
    let fixture = try network(queueSize: 256, wanted: plain) { $0.pairs = 2 }
    defer { fixture.stop() }
    #expect(fixture.driver.rings[2].size == 256)
    #expect(command(fixture, [0, 0, 1]) == 0)
    #expect(fixture.driver.status == 15 && fixture.faults.all.isEmpty)
  }

  /// Virtio 1.2, 5.1.6.5.2: before the command is used.
  @Test func addressThatTheDriverSetsIsWhatItReads() throws {
    let fixture = try network { $0.locksMAC = false }
    defer { fixture.stop() }
    let generation = fixture.driver.registers.read(0x0fc)
    #expect(command(fixture, [1, 1, 2, 3, 4, 5, 6, 8]) == 0)
    #expect(configuration(fixture, 0..<6) == [2, 3, 4, 5, 6, 8])
    #expect(fixture.driver.registers.read(0x0fc) != generation)
    // A group's address is nobody's own.
    #expect(command(fixture, [1, 1, 1, 3, 4, 5, 6, 8]) == 1)
    #expect(configuration(fixture, 0..<6) == [2, 3, 4, 5, 6, 8])
    fixture.driver.reset()
    #expect(configuration(fixture, 0..<6) == Self.mac.bytes)
  }

  /// Also where the commands come without end while it resets: the next driver reads the address that the device has.
  @Test func addressOfADriverThatIsGoneIsNotTheNextOnes() throws {
    for _ in 0..<20 {
      let fixture = try network { $0.locksMAC = false }
      defer { fixture.stop() }
      let place = fixture.buffers + 65536
      fixture.put([1, 1, 2, 3, 4, 5, 6, 8], at: place)
      fixture.put([1, 1, 2, 3, 4, 5, 6, 10], at: place + 64)
      // Two by turns: one that changes nothing costs nothing.
      for index in 0..<28 {
        _ = fixture.driver.add(
          [
            .init(place + UInt64(index & 1) * 64, 8, writable: false),
            .init(place + 4096 + UInt64(index), 1, writable: true),
          ], queue: 2)
      }
      fixture.driver.notify(queue: 2)
      fixture.driver.reset()
      #expect(configuration(fixture, 0..<6) == Self.mac.bytes)
    }
  }

  /// The driver resets while no backend is there that could hear of it.
  @Test func choicesOfADriverThatResetMeanwhileAreNotTheNextOnes() throws {
    let fixture = try network()
    defer { fixture.stop() }
    // Only what is sent to it from now on.
    #expect(command(fixture, [0, 0, 0]) == 0)
    try fixture.exchange {
      fixture.driver.reset()
      // A driver that knows no filter.
      try? fixture.driver.start(deviceID: 1, wanted: [.netMAC], queueSize: 64, queueCount: 2)
    }
    #expect(fixture.driver.status == 15)
    let buffer = fixture.buffers
    _ = fixture.driver.add([.init(buffer, 2048, writable: true)], queue: 0)
    fixture.driver.notify(queue: 0)
    fixture.settle()
    wire.send([UInt8](repeating: 0, count: 12) + [2, 9, 9, 9, 9, 9] + [2, 0, 0, 0, 0, 9] + [8, 0, 1, 2, 3, 4])
    let used = try #require(fixture.waitForUsed(0))
    #expect(used.length == 30)
    #expect(fixture.bytes(at: buffer + 12, count: 6) == [2, 9, 9, 9, 9, 9])
  }

  /// What the kernel does not take is not what the driver is told (a real tap; virtio 1.2, 5.1.6.5.6).
  @Test(.enabled(if: access("/dev/net/tun", R_OK | W_OK) == 0 && getuid() == 0, "taps cannot be made here"))
  func offloadsThatTheKernelRefusesAreRefused() throws {
    let tap = try TapDevice(.created(bridge: nil), name: "vxtest\(getpid() % 10000)", queues: 1, mtu: nil)
    defer { tap.retire() }
    #expect(tap.setOffloads([.netGuestChecksum, .netGuestTSO4]))
    // ECN goes with segmentation only.
    #expect(!tap.setOffloads([.netGuestChecksum, .netGuestECN]))
    #expect(tap.setOffloads([.netGuestChecksum, .netGuestTSO4, .netGuestECN]))
  }

  // MARK: Disks

  private func disk(_ change: (inout BlockSettings) -> Void) -> BlockSettings {
    let path = folder.file("disk.img", bytes: 4 << 20)
    // All of it is allocated.
    let file = open(path, O_RDWR | O_CLOEXEC)
    defer { close(file) }
    let bytes = [UInt8](repeating: 7, count: 1 << 20)
    for index in 0..<4 { _ = pwrite(file, bytes, bytes.count, off_t(index << 20)) }
    fsync(file)
    var settings = BlockSettings(path: path, readOnly: false, discard: true, serial: "xvde")
    change(&settings)
    return settings
  }

  private func allocated(_ path: String) -> Int {
    var status = stat()
    stat(path, &status)
    return Int(status.st_blocks) * 512
  }

  /// Blocks of a disk that is not to give any back stay its own, and so do those whose driver did not offer them (virtio 1.2, 5.2.6.2).
  @Test(arguments: [(false, UInt32(1)), (false, 0), (true, 0), (true, 1)])
  func zeroingGivesBlocksBackOnlyWhereBothSidesWantIt(discard: Bool, flags: UInt32) throws {
    let settings = disk { $0.discard = discard }
    let fixture = try BlockFixture(settings)
    defer { fixture.stop() }
    let before = allocated(settings.path)
    #expect(before >= 4 << 20)
    #expect(fixture.backend.configuration.read(offset: 56, width: 1) == (discard ? 1 : 0))
    let range = fixture.guest.dataAddress
    let place = fixture.driver.memory.pointer(range)
    place.storeBytes(of: 0, as: UInt64.self)
    place.storeBytes(of: UInt32((2 << 20) / 512), toByteOffset: 8, as: UInt32.self)
    place.storeBytes(of: flags, toByteOffset: 12, as: UInt32.self)
    #expect(try fixture.guest.request(type: 13, sector: 0, data: [.init(range, 16, writable: false)]).status == 0)
    #expect(try fixture.guest.read(sector: 8, count: 4096).bytes == [UInt8](repeating: 0, count: 4096))
    #expect(try fixture.guest.read(sector: 4096, count: 512).bytes == [UInt8](repeating: 7, count: 512))
    #expect(try fixture.guest.flush() == 0)
    let after = allocated(settings.path)
    if discard && flags == 1 { #expect(after <= before - (1 << 20)) } else { #expect(after >= before) }
  }

  /// With header and status, a request of so many segments fits the queue of a driver without indirect descriptors (virtio 1.2, 2.7.5).
  @Test(arguments: [UInt16(8), 16, 64, 256]) func asManySegmentsAsAreOfferedFitTheQueue(size: UInt16) throws {
    let fixture = try BlockFixture(
      disk { $0.queueSize = size }, queueSize: size, indirect: false, wanted: [], onlyWanted: true)
    defer { fixture.stop() }
    let offered = Int(fixture.driver.registers.read(0x100 + 12))
    #expect(offered == min(254, Int(size) - 2))
    let data = fixture.guest.dataAddress
    let answer = try fixture.guest.request(
      type: 0, sector: 0, data: (0..<offered).map { .init(data + UInt64($0) * 512, 512, writable: true) })
    #expect(answer.status == 0 && Int(answer.length) == offered * 512 + 1)
  }

  /// Of a block device, what its queue says; a partition's is its disk's.
  @Test func limitsOfABlockDeviceAreThoseOfItsQueue() {
    func put(_ path: String, _ words: [String: String]) {
      var folder = self.folder.path
      for part in path.split(separator: "/") {
        folder += "/\(part)"
        mkdir(folder, 0o700)
      }
      for (name, text) in words { _ = self.folder.file("\(path)/\(name)", text: text) }
    }
    put(
      "dev/block/8:0/queue",
      [
        "discard_granularity": "65536\n", "discard_max_bytes": "2147450880\n", "optimal_io_size": "1048576\n",
      ])
    mkdir("\(folder.path)/dev/block/8:0/sda1", 0o700)
    symlink("8:0/sda1", "\(folder.path)/dev/block/8:1")
    put(
      "dev/block/8:16/queue", ["discard_granularity": "0\n", "discard_max_bytes": "-1\n", "optimal_io_size": "many\n"])
    defer { _ = try? ChildProcess.run("rm", ["-r", folder.path + "/dev"]) }
    for minor: UInt64 in [0, 1] {
      let limits = StoreLimits.read(deviceNumber: 8 << 8 | minor, root: folder.path)
      #expect(limits.discardGranularity == 65536 && limits.discardMaximum == 2_147_450_880)
      #expect(limits.optimalSize == 1 << 20)
    }
    // What is no number, or is not there, is no limit that could be relied on.
    for minor: UInt64 in [16, 32] {
      #expect(StoreLimits.read(deviceNumber: 8 << 8 | minor, root: folder.path) == StoreLimits())
    }
  }

  // MARK: Backends that come and go

  /// An engine whose `submit` does not return before a gate opens.
  private final class SlowEngine: EngineDecorator {
    final class Gate: Sendable {
      let isReached = Latch()
      let opens = Latch()
    }

    let engine: any BlockEngine
    private let gate: Gate

    init(_ engine: any BlockEngine, _ gate: Gate) {
      self.engine = engine
      self.gate = gate
    }

    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      gate.isReached.open()
      gate.opens.wait()
      engine.submit(requests, count: count)
    }
  }

  /// A disk on an engine of a test's own, whose driver has a read under way.
  ///
  /// - Returns: the disk, and where its data goes.
  private func reading(
    direct: Bool, _ decorate: @escaping @Sendable (any BlockEngine) -> any BlockEngine
  ) throws -> (DeviceFixture, UInt64) {
    let settings = disk { $0.direct = direct }
    let fixture = try DeviceFixture(deviceID: 2, queueSize: 64, queueCount: 1) { context, completion in
      BlockBackend.start(settings, context, decorate: { engine, _ in decorate(engine) }) {
        completion($0.map { $0 })
      }
    }
    let (header, data) = (fixture.buffers, fixture.buffers + 4096)
    fixture.put([UInt8](repeating: 0, count: 16), at: header)
    _ = fixture.driver.add([
      .init(header, 16, writable: false), .init(data, 4096, writable: true), .init(header + 64, 1, writable: true),
    ])
    fixture.driver.notify()
    return (fixture, data)
  }

  /// Virtio 1.2, 2.4.1: behind a reset the memory is the driver's again, also where the backend has been taken away already and its thread is
  /// in the middle of a batch.
  @Test func resetWaitsForABackendThatIsBeingStopped() throws {
    let gate = SlowEngine.Gate()
    let (fixture, data) = try reading(direct: false) { SlowEngine($0, gate) }
    defer { fixture.stop() }
    gate.isReached.wait()
    let helper = try LoopThread(name: "helper")
    let ours = [UInt8](repeating: 0xab, count: 4096)
    try fixture.exchange(whileStopping: {
      helper.loop.enqueue { gate.opens.open() }
      fixture.driver.reset()
      fixture.put(ours, at: data)
    })
    helper.stopAndJoin()
    #expect(fixture.bytes(at: data, count: 4096) == ours)
    #expect(fixture.driver.status == 0)
  }

  /// Storage that does not answer, while the backend is being stopped.
  private final class HungEngine: EngineDecorator {
    let engine: any BlockEngine
    private let gate: SlowEngine.Gate
    private var taken: [EngineCompletion] = []
    // Through buffers of the backend's own.
    let reachesGuestMemory = false

    init(_ engine: any BlockEngine, _ gate: SlowEngine.Gate) {
      self.engine = engine
      self.gate = gate
    }

    func submit(_ requests: UnsafeMutablePointer<EngineRequest>, count: Int) {
      for index in 0..<count {
        taken.append(EngineCompletion(tag: requests[index].tag, result: Int(requests[index].length)))
      }
      gate.isReached.open()
    }
    func reap(into completions: UnsafeMutablePointer<EngineCompletion>, capacity: Int) -> Int {
      guard isOver else { return 0 }
      let count = min(capacity, taken.count)
      for index in 0..<count { completions[index] = taken[index] }
      taken.removeFirst(count)
      return count
    }
    func waitForCompletion() {
      gate.opens.wait()
      isOver = true
    }
    private var isOver = false
  }

  /// The guest's thread serves all devices of a guest: it waits until its memory is left alone, not for the storage.
  @Test func resetDoesNotWaitForStorageThatHangs() throws {
    let gate = SlowEngine.Gate()
    let (fixture, _) = try reading(direct: true) { HungEngine($0, gate) }
    defer { fixture.stop() }
    gate.isReached.wait()
    try fixture.exchange(whileStopping: {
      // Returns while the storage still hangs.
      fixture.driver.reset()
      gate.opens.open()
    })
    #expect(fixture.driver.status == 0)
  }
}
