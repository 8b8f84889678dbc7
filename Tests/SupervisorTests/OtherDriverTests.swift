import ControlAPI
import Devices
import EventLoop
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Virtqueue
import Xen

/// Disks under firmware and operating systems that are not Linux, by the order in which their drivers do things: they negotiate, do I/O, reset by
/// the status register alone, and begin again, one after the other as when a machine boots.
@Suite struct OtherDriverTests {
  /// U-Boot: no features of the device's, the largest queue that there is, one request at a time, looked for in a loop. The device is
  /// acknowledged before it is reset (drivers/virtio/virtio-uclass.c, virtio_blk.c).
  static let uBoot = OtherDriver(
    "U-Boot", wanted: [],
    steps: [
      .add(1), .set(0), .add(1), .add(2), .features(upperFirst: true), .add(8), .checkFeatures,
      .queue(0, atMost: .max), .read(0...7, width: 4, generation: false), .add(4),
    ]
  ) {
    $0.polls = true
    $0.requestBytes = 1 << 20
    $0.segmentBytes = 1 << 20
  }

  /// EDK II, as OVMF: reads the whole space before it says which bits it takes, three descriptors, interrupts off, a flush behind writes; leaves
  /// with ExitBootServices by status 0 (OvmfPkg/VirtioBlkDxe, Virtio10Dxe).
  static let edk2 = OtherDriver(
    "EDK II", wanted: [.blockReadOnly, .blockSize, .blockFlush, .blockTopology],
    steps: [
      .set(0), .set(1), .set(3), .features(upperFirst: false), .read(0...7, width: 8, generation: false),
      .read(20...23, width: 4, generation: false), .read(24...25, width: 1, generation: false),
      .read(28...31, width: 4, generation: false), .set(11), .checkFeatures, .queue(0, atMost: .max), .set(15),
    ]
  ) {
    $0.polls = true
    $0.requestBytes = 64 << 10
    $0.segmentBytes = 64 << 10
  }

  /// FreeBSD: the space in single bytes with its generation around, write-through chosen before DRIVER_OK, indirect descriptors
  /// (sys/dev/virtio/mmio, pci, block).
  static let freeBSD = OtherDriver(
    "FreeBSD",
    wanted: [
      .indirectDescriptors, .eventIndex, .blockSegmentsMaximum, .blockReadOnly, .blockSize, .blockFlush, .blockTopology,
      .blockConfigureWriteback, .blockDiscard,
    ],
    steps: [
      .set(0), .add(1), .add(2), .features(upperFirst: true), .add(8), .checkFeatures,
      .read(0...35, width: 1, generation: true), .queue(0, atMost: 128), .write(32, 0),
      .read(32...32, width: 1, generation: true), .add(4),
    ]
  ) {
    $0.usesIndirect = true
    $0.requestBytes = 128 << 10
    $0.takesMessages = true
  }

  /// Windows' viostor as it looks for adapters: negotiates and reads the space, and sets up nothing.
  static let windowsFinds = OtherDriver(
    "viostor, FindAdapter", wanted: windowsFeatures,
    steps: [
      .set(0), .add(1), .add(2), .read(0...35, width: 4, generation: true), .features(upperFirst: false), .add(8),
      .checkFeatures,
    ]
  ) { $0.knowsMMIO = false }

  /// The same driver at work: begins anew, up to 256 descriptors with tables, a message for each queue.
  static let windows = OtherDriver(
    "viostor", wanted: windowsFeatures,
    steps: windowsFinds.steps + [.queue(0, atMost: 256), .add(4), .read(0...35, width: 4, generation: true)]
  ) {
    $0.knowsMMIO = false
    $0.usesIndirect = true
    $0.requestBytes = 256 << 10
    $0.takesMessages = true
  }

  /// And in the crash dump, when interrupts are off and nothing of the driver before is known.
  static let windowsDumps = OtherDriver(
    "viostor, crash dump", wanted: windowsFeatures.subtracting(.eventIndex),
    steps: windowsFinds.steps + [.queue(0, atMost: 256), .add(4)]
  ) {
    $0.knowsMMIO = false
    $0.polls = true
    $0.requestBytes = 32 << 10
  }

  private static let windowsFeatures: FeatureBits = [
    .indirectDescriptors, .eventIndex, .blockSegmentsMaximum, .blockReadOnly, .blockSize, .blockFlush, .blockTopology,
    .blockConfigureWriteback, .blockQueues, .blockDiscard, .blockWriteZeroes,
  ]

  /// What takes the disk one after the other, without a reset of the bus in between.
  static let boots: [[OtherDriver]] = [
    [uBoot, uBoot], [edk2, edk2], [freeBSD, freeBSD], [uBoot, freeBSD], [edk2, freeBSD],
    [windowsFinds, windows, windowsDumps], [edk2, windowsFinds, windows, windowsFinds, windows],
  ]

  private func registers(_ driver: OtherDriver, _ domain: SimulatedDomain, onPCI: Bool) throws -> any RegisterAccess {
    guard onPCI else { return TrappedRegisters(domain: domain, base: SlotTable.slot(0).base) }
    return try PCIFunctionRegisters(
      domain: domain, function: PCIAddress(device: 16), interrupts: driver.takesMessages ? .messages : .pin)
  }

  @Test(arguments: boots, [false, true])
  func disksServeOtherDriversOneAfterTheOther(drivers: [OtherDriver], onPCI: Bool) throws {
    guard onPCI || drivers.allSatisfy(\.knowsMMIO) else { return }
    let world = try World()
    defer { world.end() }
    let domain = try SimulatedDomain(identifier: 5, memoryBytes: 32 << 20, vcpuCount: 1)
    try world.toolstack.create(domain, name: "guest")
    try world.toolstack.attach(disk: "xvde", image: world.image(bytes: 8 << 20), to: 5)
    try world.start(
      profiles: #"{"version": 1, "guests": [{"guest": "*", "transport": "\#(onPCI ? "pci" : "mmio")"}]}"#)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    for (turn, driver) in drivers.enumerated() {
      // Each has the memory for its own, as after a boot.
      let session = OtherDriver.Session(
        driver, try registers(driver, domain, onPCI: onPCI), domain.memory, area: UInt64(1 + 8 * (turn % 3)) << 20)
      try session.start()
      guard session.rings[0] != nil else {
        #expect(session.registers.read(0x070) & 0xf == 11, "\(driver)")
        continue
      }
      #expect(session.registers.read(0x070) == 15, "\(driver)")
      let interrupt = {
        guard domain.waitForInterrupt(seconds: 30) else { return false }
        let cause = session.registers.read(0x060)
        session.registers.write(0x064, cause)
        return true
      }
      for round in 0..<4 {
        let byte = UInt8(16 * turn + round + 1)
        let sector = UInt64(round * driver.requestBytes / 512)
        session.data.initializeMemory(as: UInt8.self, repeating: byte, count: driver.requestBytes)
        #expect(
          try session.request(type: 1, sector: sector, bytes: driver.requestBytes, interrupt: interrupt) == 0,
          "\(driver)")
        if session.features.contains(.blockFlush) {
          #expect(try session.request(type: 4, sector: 0, bytes: 0, interrupt: interrupt) == 0, "\(driver)")
        }
        session.data.initializeMemory(as: UInt8.self, repeating: 0, count: driver.requestBytes)
        #expect(
          try session.request(type: 0, sector: sector, bytes: driver.requestBytes, interrupt: interrupt) == 0,
          "\(driver)")
        let data = UnsafeRawBufferPointer(start: session.data, count: driver.requestBytes)
        #expect(data.allSatisfy { $0 == byte }, "\(driver)")
      }
      if driver.polls { #expect(domain.messages.isEmpty || turn > 0, "\(driver) asked for no interrupt") }
      #expect(eventually { world.state("guest", "xvde") == "connected" }, "\(driver)")
      // Some leave it as it is, and the next one resets it.
      if turn % 2 == 0 { try session.reset() }
    }
    world.settle()
    #expect(!world.eventKinds.contains(.deviceFaulted))
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { domain.usage == .init() })
  }
}
