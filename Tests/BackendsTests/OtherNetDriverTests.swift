import DeviceHost
import Devices
import Engines
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing
import Virtqueue

/// A network device under firmware and operating systems that are not Linux, each behind a Linux that was there before and left its choices:
/// negotiation, packets both ways, a reset by the status register, and the same again.
@Suite struct OtherNetDriverTests {
  private static let mac = MACAddress(value: 0x0016_3e00_0001)

  /// A driver, the size of its receive buffers, and how many it has.
  struct Case: Sendable, CustomStringConvertible {
    var driver: OtherDriver
    var bufferBytes: Int
    var buffers = 32
    /// What it says on the control queue once it is up.
    var commands: [[UInt8]] = []
    var description: String { driver.name }
  }

  private static func steps(_ queues: Int, upperFirst: Bool, readsStatus: Bool) -> [OtherDriver.Step] {
    let space: [OtherDriver.Step] = [.read(0...5, width: 1, generation: readsStatus)]
    return [.set(0), .add(1), .add(2), .features(upperFirst: upperFirst), .add(8), .checkFeatures] + space
      + (0..<queues).map { .queue($0, atMost: 256) } + [.add(4)]
  }

  /// Receive buffers of 1526 bytes: what the specification asks for (virtio 1.2, 5.1.6.3.1).
  private static let uBoot = OtherDriver(
    "U-Boot", wanted: [.netMAC], steps: steps(2, upperFirst: true, readsStatus: false)
  ) { $0.polls = true }
  private static let edk2 = OtherDriver(
    "EDK II", wanted: [.netMAC, .netStatus], steps: steps(2, upperFirst: false, readsStatus: false)
  ) { $0.polls = true }
  /// Sets itself up again with each `ifconfig up`, and empties its tables first.
  private static let freeBSD = OtherDriver(
    "FreeBSD",
    wanted: [
      .indirectDescriptors, .eventIndex, .netMAC, .netStatus, .netMergeable, .netGuestChecksum, .netGuestTSO4,
      .netGuestTSO6, .netChecksum, .netHostTSO4, .netHostTSO6, .netControlQueue, .netControlReceive, .netControlVLAN,
    ], steps: steps(3, upperFirst: true, readsStatus: true)
  ) { $0.usesIndirect = true }
  /// Without merged buffers, and with a command for each VLAN that there can be.
  private static let netKVM = OtherDriver(
    "NetKVM",
    wanted: [
      .indirectDescriptors, .eventIndex, .netMAC, .netStatus, .netChecksum, .netHostTSO4, .netHostTSO6,
      .netControlQueue,
      .netControlReceive, .netControlVLAN,
    ], steps: steps(3, upperFirst: false, readsStatus: true)
  ) { $0.usesIndirect = true }

  private static let emptyTables: [UInt8] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]

  static let cases: [Case] = [
    Case(driver: uBoot, bufferBytes: 1526), Case(driver: edk2, bufferBytes: 1526, buffers: 16),
    Case(
      driver: freeBSD, bufferBytes: 2048, buffers: 128,
      commands: [[0, 0, 0], [0, 1, 0], emptyTables, [2, 0, 7, 0], [2, 1, 7, 0]]),
    Case(
      driver: netKVM, bufferBytes: 2048, buffers: 128,
      commands: [[0, 0, 0], [0, 1, 0], emptyTables] + (0..<400).map { [2, 0, UInt8($0 & 255), UInt8($0 >> 8)] }),
  ]

  private func frame(to destination: [UInt8], from source: [UInt8], bytes: Int, _ fill: UInt8) -> [UInt8] {
    destination + source + [8, 0] + [UInt8](repeating: fill, count: bytes)
  }

  @Test(arguments: cases) func packetsGoBothWaysWithOtherDriversAgainAndAgain(test: Case) throws {
    let wire = FloodStage.Wire()
    let settings = NetSettings(attachment: .created(bridge: nil), tapName: "none", mac: Self.mac)
    let fixture = try DeviceFixture(deviceID: 1, queueSize: 64, queueCount: 3) { context, completion in
      NetBackend.start(
        settings, context,
        openTap: { _ throws(TapFault) in TapDevice(name: "none", queues: [fcntl(wire.near, F_DUPFD_CLOEXEC, 0)]) }
      ) { completion($0.map { $0 }) }
    }
    defer { fixture.stop() }
    let memory = fixture.domain.memory
    let other: [UInt8] = [2, 0, 0, 0, 0, 9]
    for turn in 0..<3 {
      let session = OtherDriver.Session(
        test.driver, DirectRegisters(fixture.transport), memory, area: UInt64(8 + 6 * (turn & 1)) << 20)
      try session.start()
      #expect((0..<6).map { UInt8(session.registers.read(0x100 + $0, width: 1)) } == Self.mac.bytes)
      let interrupt = {
        guard fixture.domain.waitForInterrupt(seconds: 30) else { return false }
        session.registers.write(0x064, session.registers.read(0x060))
        return true
      }
      let receive = session.buffers
      for index in 0..<test.buffers {
        let buffer = receive + UInt64(index * test.bufferBytes)
        #expect(
          session.rings[0]?.add([.init(buffer, UInt32(test.bufferBytes), writable: true)], indirect: false) != nil)
      }
      session.notify(0)
      let control = receive + 1 << 20
      for command in test.commands {
        memory.pointer(control).copyMemory(from: command, byteCount: command.count)
        memory.pointer(control + 4096).storeBytes(of: 0xff, as: UInt8.self)
        _ = session.rings[2]?.add(
          [.init(control, UInt32(command.count), writable: false), .init(control + 4096, 1, writable: true)],
          indirect: test.driver.usesIndirect)
        session.notify(2)
        _ = try session.answer(2, interrupt: interrupt)
        #expect(memory.pointer(control + 4096).load(as: UInt8.self) == 0, "\(test): \(command)")
      }
      // Behind it, nothing from before the driver is in the tap.
      fixture.settle()
      // More than it has buffers for, each given back; the largest packets without VLAN too.
      for round in 0..<2 * test.buffers {
        let sent =
          [UInt8](repeating: 0, count: 12)
          + frame(to: Self.mac.bytes, from: other, bytes: round % 2 == 0 ? 1500 : 46, UInt8(truncatingIfNeeded: round))
        wire.send(sent)
        let used = try session.answer(0, interrupt: interrupt)
        #expect(Int(used.length) == sent.count, "\(test), turn \(turn), packet \(round)")
        let buffer = receive + UInt64(round % test.buffers * test.bufferBytes)
        let got = Array(UnsafeRawBufferPointer(start: memory.pointer(buffer + 12), count: sent.count - 12))
        #expect(got == Array(sent[12...]), "\(test), turn \(turn), packet \(round)")
        _ = session.rings[0]?.add([.init(buffer, UInt32(test.bufferBytes), writable: true)], indirect: false)
        session.notify(0)
      }
      let packet = [UInt8](repeating: 0, count: 12) + frame(to: other, from: Self.mac.bytes, bytes: 1000, 5)
      memory.pointer(control).copyMemory(from: packet, byteCount: packet.count)
      // The header apart from the frame, as they have it.
      _ = session.rings[1]?.add(
        [.init(control, 12, writable: false), .init(control + 12, UInt32(packet.count - 12), writable: false)],
        indirect: test.driver.usesIndirect)
      session.notify(1)
      _ = try session.answer(1, interrupt: interrupt)
      #expect(wire.receive() == packet, "\(test), turn \(turn)")
      try session.reset()
    }
    #expect(fixture.faults.all.isEmpty)
  }
}
