import TestSupport
import Testing
import Virtqueue

@testable import Transport

/// Records messages that a function sends.
private final class RecordingSender: MessageSender, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: tests drive it from one thread.
  var messages: [MSIMessage] = []
  func send(_ message: MSIMessage) { messages.append(message) }
}

/// Records the ranges that a function decodes, and in which order the change is saved.
private final class RecordingDecoder: PCIDecoder {
  var ranges: [ClosedRange<UInt64>?] = []
  func decode(_ range: ClosedRange<UInt64>?, of transport: PCITransport, save: () -> Void) {
    save()
    ranges.append(range)
  }
}

@Suite struct PCITransportTests {
  private let device = RecordingDevice()
  private let line = RecordingLine()
  private let sender = RecordingSender()
  private let transport: PCITransport

  init() { transport = PCITransport(device: device, line: line, sender: sender, onStatus: { _ in }) }

  private func read(_ offset: UInt64, _ width: Int = 4) -> UInt64 { transport.read(offset: offset, width: width) }
  private func write(_ offset: UInt64, _ width: Int, _ value: UInt64) {
    transport.write(offset: offset, width: width, value: value)
  }

  private func negotiate(_ features: UInt64 = 1 << 32) {
    write(0x14, 1, 0)
    write(0x14, 1, 3)
    for half: UInt64 in 0...1 {
      write(0x08, 4, half)
      write(0x0c, 4, features >> (32 * half) & 0xffff_ffff)
    }
    write(0x14, 1, 11)
  }

  private func setUpQueue(_ queue: UInt64 = 0, size: UInt64 = 16) {
    write(0x16, 2, queue)
    write(0x18, 2, size)
    write(0x20, 8, 0x1000)
    write(0x28, 4, 0x2000)
    write(0x2c, 4, 0)
    write(0x30, 4, 0x3000)
    write(0x34, 4, 0)
    write(0x1c, 2, 1)
  }

  private func start(_ features: UInt64 = 1 << 32) {
    negotiate(features)
    setUpQueue()
    write(0x14, 1, 15)
  }

  /// MSI-X on: vector n sends data 100 + n.
  private func enableMessages() {
    for vector: UInt64 in 0...2 {
      write(0x2000 + 16 * vector, 4, 0xfee0_0000)
      write(0x2008 + 16 * vector, 4, 100 + vector)
      write(0x200c + 16 * vector, 4, 0)
    }
    transport.writeConfiguration(offset: 0x42, width: 2, value: 0x8000)
  }

  @Test func showsItsQueuesAndFeatures() {
    #expect(read(0x12, 2) == 2)
    #expect(read(0x18, 2) == 256)
    write(0x16, 2, 1)
    #expect(read(0x18, 2) == 64)
    #expect(read(0x1e, 2) == 1)
    write(0x16, 2, 2)
    #expect(read(0x18, 2) == 0)
    write(0x00, 4, 1)
    #expect(read(0x04) == 0x105)
    write(0x00, 4, 2)
    #expect(read(0x04) == 0)
  }

  @Test func driverOKActivatesTheQueuesThatAreEnabled() {
    start()
    #expect(read(0x14, 1) == 15)
    #expect(read(0x1c, 2) == 1)
    #expect(device.activations.count == 1)
    #expect(device.activations[0][0]?.size == 16)
    #expect(device.activations[0][0]?.deviceArea == 0x3000)
    #expect(device.activations[0][1] == nil)
  }

  @Test(arguments: [0x2000_0000, 0x1_0000_0020] as [UInt64]) func featuresThatMakeNoSenseAreRefused(features: UInt64) {
    negotiate(features)
    #expect(read(0x14, 1) & 8 == 0)
  }

  @Test func queueOfBadSizeIsNotEnabled() {
    negotiate()
    for size: UInt64 in [0, 3, 512, 0xffff] {
      setUpQueue(size: size)
      #expect(read(0x1c, 2) == 0)
    }
  }

  @Test func doorbellsReachOnlyQueuesThatAreLive() {
    write(0x3000, 2, 0)
    start()
    for offset: UInt64 in [0x3000, 0x3004, 0x3008, 0x30fc] { write(offset, 2, 7) }
    write(0x3000, 4, 0)
    #expect(device.notified == [0, 0])
  }

  @Test func queueIsResetAlone() {
    start(1 << 32 | 1 << 40)
    write(0x16, 2, 0)
    write(0x3a, 2, 1)
    #expect(device.queueResets == [0])
    #expect(read(0x3a, 2) == 0)
    #expect(read(0x1c, 2) == 0)
    #expect(read(0x18, 2) == 256)
    setUpQueue()
    #expect(device.enabled == [0])
    // A driver cannot take a queue back by queue_enable.
    write(0x1c, 2, 0)
    #expect(read(0x1c, 2) == 1)
  }

  @Test func vectorsThatAreNotThereReadAsNone() {
    #expect(read(0x10, 2) == 0xffff)
    write(0x10, 2, 3)
    #expect(read(0x10, 2) == 0xffff)
    write(0x10, 2, 2)
    #expect(read(0x10, 2) == 2)
    write(0x16, 2, 1)
    write(0x1a, 2, 1)
    #expect(read(0x1a, 2) == 1)
    write(0x16, 2, 0)
    #expect(read(0x1a, 2) == 0xffff)
    write(0x14, 1, 0)
    #expect(read(0x10, 2) == 0xffff)
  }

  @Test func eachQueueInterruptsByItsVector() {
    enableMessages()
    negotiate()
    write(0x10, 2, 0)
    for queue: UInt64 in 0...1 {
      setUpQueue(queue)
      write(0x1a, 2, queue + 1)
    }
    write(0x14, 1, 15)
    transport.signals(of: 1).interruptForUsedBuffers()
    transport.signals(of: 0).interruptForUsedBuffers()
    transport.interruptForConfiguration()
    #expect(sender.messages.map(\.data) == [102, 101, 100])
    #expect(line.levels.isEmpty)
    #expect(read(0x800, 1) == 0)
  }

  @Test func maskedVectorIsPendingAndSentWhenItIsUnmasked() {
    enableMessages()
    negotiate()
    setUpQueue()
    write(0x1a, 2, 2)
    write(0x14, 1, 15)
    write(0x202c, 4, 1)
    transport.signals(of: 0).interruptForUsedBuffers()
    #expect(read(0x2800) == 1 << 2)
    #expect(sender.messages.isEmpty)
    // The mask of the whole function too.
    transport.writeConfiguration(offset: 0x42, width: 2, value: 0xc000)
    write(0x202c, 4, 0)
    #expect(sender.messages.isEmpty)
    transport.writeConfiguration(offset: 0x42, width: 2, value: 0x8000)
    #expect(sender.messages.map(\.data) == [102])
    #expect(read(0x2800) == 0)
  }

  @Test func whatIsPendingGoesByThePinWhenMessagesAreTurnedOff() {
    enableMessages()
    negotiate()
    setUpQueue()
    write(0x1a, 2, 1)
    write(0x14, 1, 15)
    write(0x201c, 4, 1)
    transport.signals(of: 0).interruptForUsedBuffers()
    transport.writeConfiguration(offset: 0x42, width: 2, value: 0)
    #expect(line.levels == [true])
    #expect(sender.messages.isEmpty)
  }

  @Test func pinFollowsTheISRRegister() {
    start()
    transport.signals(of: 0).interruptForUsedBuffers()
    #expect(line.levels == [true])
    #expect(transport.readConfiguration(offset: 6, width: 2) == 0x18)
    transport.interruptForConfiguration()
    #expect(read(0x800, 1) == 3)
    #expect(read(0x800, 1) == 0)
    #expect(line.levels == [true, false])
    // Disabled, it stays low, and the status says what it would be.
    transport.writeConfiguration(offset: 4, width: 2, value: 0x400)
    transport.signals(of: 0).interruptForUsedBuffers()
    #expect(line.levels == [true, false])
    #expect(transport.readConfiguration(offset: 6, width: 2) == 0x18)
    transport.writeConfiguration(offset: 4, width: 2, value: 0)
    #expect(line.levels == [true, false, true])
  }

  /// Linux forbids it so before it starts another kernel, whose memory the rings would be in.
  @Test func functionThatMayNoLongerReachMemoryHasNoQueues() {
    transport.writeConfiguration(offset: 4, width: 2, value: 6)
    start()
    transport.signals(of: 0).interruptForUsedBuffers()
    let before = device.resets
    transport.writeConfiguration(offset: 4, width: 2, value: 2)
    #expect(device.resets == before + 1 && read(0x14, 1) == 0)
    write(0x16, 2, 0)
    #expect(read(0x1c, 2) == 0 && line.levels.last == false)
    // What is there is as it was for the bus, and the next driver begins anew.
    #expect(transport.readConfiguration(offset: 4, width: 2) == 2)
    transport.writeConfiguration(offset: 4, width: 2, value: 6)
    #expect(device.resets == before + 1 && read(0x14, 1) == 0)
    start()
    #expect(read(0x14, 1) == 15)
  }

  /// Not all firmware allows it.
  @Test func functionThatWasNeverAllowedToReachMemoryIsServed() {
    transport.writeConfiguration(offset: 4, width: 2, value: 2)
    start()
    let before = device.resets
    transport.writeConfiguration(offset: 4, width: 2, value: 0)
    #expect(device.resets == before && read(0x14, 1) == 15)
  }

  @Test func resetClearsEverythingButTheBus() {
    enableMessages()
    transport.writeConfiguration(offset: 0x10, width: 4, value: 0xf300_0000)
    start()
    transport.signals(of: 0).interruptForUsedBuffers()
    write(0x14, 1, 0)
    #expect(read(0x14, 1) == 0)
    #expect(read(0x1c, 2) == 0)
    #expect(read(0x20, 8) == 0)
    #expect(read(0x18, 2) == 256)
    #expect(transport.readConfiguration(offset: 0x10, width: 4) == 0xf300_0000)
    #expect(transport.readConfiguration(offset: 0x42, width: 2) == 0x8002)
    #expect(read(0x2008) == 100)
  }

  @Test func configurationIsReadWithAnyWidth() {
    #expect(read(0x1000, 1) == 1)
    #expect(read(0x1000, 8) == 0x0807_0605_0403_0201)
    #expect(read(0x1007, 4) == 8)
    #expect(read(0x1fff, 4) == 0)
    write(0x1004, 2, 0xabcd)
    #expect(device.writes.first?.0 == 4)
    #expect(device.writes.first?.1 == [0xcd, 0xab])
    let before = read(0x15, 1)
    device.configuration.update { $0[0] = 9 }
    #expect(read(0x15, 1) != before)
  }

  @Test func windowReachesTheBARWithoutMemory() {
    func aim(_ offset: UInt64, _ width: UInt64) {
      transport.writeConfiguration(offset: 0x9c, width: 4, value: offset)
      transport.writeConfiguration(offset: 0xa0, width: 4, value: width)
    }
    aim(0x1002, 2)
    #expect(transport.readConfiguration(offset: 0xa4, width: 2) == 0x0403)
    aim(0x14, 1)
    transport.writeConfiguration(offset: 0xa4, width: 1, value: 3)
    #expect(read(0x14, 1) == 3)
    #expect(transport.readConfiguration(offset: 0xa4, width: 4) & 0xff == 3)
    // What makes no sense reaches nothing.
    aim(0x14, 3)
    transport.writeConfiguration(offset: 0xa4, width: 4, value: 0)
    #expect(read(0x14, 1) == 3)
  }

  @Test func decodingIsToldOnceForEachChange() {
    let decoder = RecordingDecoder()
    transport.decoder = decoder
    transport.writeConfiguration(offset: 0x10, width: 4, value: 0xf300_0000)
    transport.writeConfiguration(offset: 4, width: 2, value: 6)
    transport.writeConfiguration(offset: 4, width: 2, value: 6)
    transport.writeConfiguration(offset: 0x10, width: 4, value: 0xf400_0000)
    transport.writeConfiguration(offset: 0x3c, width: 1, value: 11)
    transport.writeConfiguration(offset: 4, width: 2, value: 0)
    #expect(decoder.ranges == [0xf300_0000...0xf300_3fff, 0xf400_0000...0xf400_3fff, nil])
    #expect(transport.base.value == 0)
  }

  @Test func nextBackendInterruptsEveryQueue() {
    enableMessages()
    negotiate()
    setUpQueue()
    write(0x1a, 2, 1)
    write(0x14, 1, 15)
    transport.unplug()
    write(0x3000, 2, 0)
    #expect(device.notified.isEmpty)
    let next = RecordingDevice()
    #expect(transport.plug(next))
    #expect(next.activations.count == 1)
    #expect(sender.messages.map(\.data) == [101])
    write(0x3000, 2, 0)
    #expect(next.notified == [0])
  }

  /// Any order of any accesses to both spaces is answered, and a reset is a reset afterwards.
  @Test(arguments: UInt64(1)...100) func anyAccessesAreAnswered(seed: UInt64) {
    var random = SeededGenerator(seed: seed)
    let interesting: [UInt64] = [
      0x00, 0x08, 0x0c, 0x10, 0x14, 0x16, 0x18, 0x1a, 0x1c, 0x20, 0x28, 0x30, 0x3a, 0x800, 0x1000, 0x2000, 0x200c,
      0x2410, 0x2800, 0x3000, 0x3004, 0x3ffc,
    ]
    let registers = [4, 6, 0x10, 0x3c, 0x42, 0x98, 0x9c, 0xa0, 0xa4]
    for _ in 0..<2000 {
      let width = [1, 2, 4, 4, 8, 0, 3, 9].randomElement(using: &random) ?? 4
      let value = Bool.random(using: &random) ? random.next() & 0x1f : random.next()
      let offset = Bool.random(using: &random) ? interesting.randomElement(using: &random) ?? 0 : random.next() & 0x4fff
      let register =
        Bool.random(using: &random) ? registers.randomElement(using: &random) ?? 0 : Int(random.next() & 0x1ff)
      switch random.next() & 7 {
      case 0...2: write(offset, width, value)
      case 3, 4: _ = read(offset, width)
      case 5: _ = transport.readConfiguration(offset: register, width: width)
      case 6: transport.writeConfiguration(offset: register, width: width, value: value)
      default: transport.signals(of: Int(random.next() & 1)).interruptForUsedBuffers()
      }
    }
    write(0x14, 1, 0)
    #expect(read(0x14, 1) == 0, "seed \(seed)")
    #expect(read(0x800, 1) == 0, "seed \(seed)")
    #expect(read(0x2800, 8) == 0, "seed \(seed)")
  }
}
