import TestSupport
import Testing
import Transport
import Virtqueue

@Suite struct MMIOTransportTests {
  private let device = RecordingDevice()
  private let line = RecordingLine()
  private let transport: MMIOTransport

  init() { transport = MMIOTransport(device: device, line: line, onStatus: { _ in }) }

  private func read(_ offset: UInt64) -> UInt64 { transport.read(offset: offset, width: 4) }
  private func write(_ offset: UInt64, _ value: UInt64) { transport.write(offset: offset, width: 4, value: value) }

  private func negotiate(_ features: UInt64 = 1 << 32) {
    write(0x070, 0)
    write(0x070, 3)
    write(0x024, 0)
    write(0x020, features & 0xffff_ffff)
    write(0x024, 1)
    write(0x020, features >> 32)
    write(0x070, 11)
  }

  private func setUpQueue(size: UInt64 = 16) {
    write(0x030, 0)
    write(0x038, size)
    write(0x080, 0x1000)
    write(0x090, 0x2000)
    write(0x0a0, 0x3000)
    write(0x044, 1)
  }

  @Test func identifiesItself() {
    #expect(read(0x000) == 0x7472_6976)
    #expect(read(0x004) == 2)
    #expect(read(0x008) == 2)
    #expect(read(0x034) == 256)
    write(0x030, 2)
    #expect(read(0x034) == 0)
  }

  @Test func featuresComeInTwoWords() {
    write(0x014, 1)
    #expect(read(0x010) == 0x105)
    write(0x014, 0)
    #expect(read(0x010) == 1 << 28 | 1 << 29)
    write(0x014, 2)
    #expect(read(0x010) == 0)
  }

  @Test func featuresWithoutVersion1AreRefused() {
    negotiate(1 << 29)
    #expect(read(0x070) & 8 == 0)
  }

  @Test func featuresThatWereNotOfferedAreRefused() {
    negotiate(1 << 32 | 1 << 5)
    #expect(read(0x070) & 8 == 0)
  }

  @Test func driverOKActivatesTheReadyQueues() {
    negotiate()
    setUpQueue()
    #expect(read(0x044) == 1)
    write(0x070, 15)
    #expect(device.activations.count == 1)
    #expect(device.activations[0][0]?.size == 16)
    #expect(device.activations[0][1] == nil)
    write(0x070, 15)
    #expect(device.activations.count == 1)
  }

  @Test func driverOKWithoutFeaturesOKDoesNothing() {
    write(0x070, 7)
    #expect(device.activations.isEmpty)
    #expect(read(0x070) & 4 == 0)
  }

  @Test func queueOfBadSizeDoesNotBecomeReady() {
    negotiate()
    for size: UInt64 in [0, 3, 512, 0x1_0010] {
      setUpQueue(size: size)
      #expect(read(0x044) == 0)
    }
  }

  @Test func notificationsReachOnlyReadyQueuesOfALiveDevice() {
    write(0x050, 0)
    negotiate()
    setUpQueue()
    write(0x050, 0)
    write(0x070, 15)
    for queue: UInt64 in [0, 1, 2, 0xffff] { write(0x050, queue) }
    #expect(device.notified == [0])
  }

  @Test func resetClearsEverything() {
    negotiate()
    setUpQueue()
    write(0x070, 15)
    transport.interruptForUsedBuffers()
    write(0x070, 0)
    #expect(read(0x070) == 0)
    #expect(read(0x044) == 0)
    #expect(read(0x060) == 0)
    #expect(device.resets == 2)  // `negotiate` starts with one
    #expect(line.levels == [true, false])
  }

  @Test func interruptLineFollowsTheStatus() {
    transport.interruptForUsedBuffers()
    transport.interruptForUsedBuffers()
    transport.interruptForConfiguration()
    #expect(read(0x060) == 3)
    write(0x064, 1)
    #expect(line.levels == [true])
    write(0x064, 0xffff_ffff)
    #expect(line.levels == [true, false])
    #expect(read(0x060) == 0)
  }

  @Test func edgeTriggeredLineGetsAnEdgeForEachNewCause() {
    let edges = RecordingLine(isLevel: false)
    let state = InterruptState(line: edges)
    state.raise(.usedBuffer)
    state.raise(.configuration)
    #expect(edges.levels == [true, true])
    state.acknowledge(3)
    #expect(edges.levels == [true, true, false])
  }

  @Test func needResetIsShownAndInterrupts() {
    negotiate()
    setUpQueue()
    write(0x070, 15)
    transport.needReset()
    #expect(read(0x070) & 0x40 != 0)
    #expect(read(0x060) == 2)
    write(0x070, 0)
    #expect(read(0x070) == 0)
  }

  @Test func configurationIsReadWithAnyWidth() {
    #expect(transport.read(offset: 0x100, width: 1) == 1)
    #expect(transport.read(offset: 0x101, width: 2) == 0x0302)
    #expect(transport.read(offset: 0x100, width: 8) == 0x0807_0605_0403_0201)
    #expect(transport.read(offset: 0x107, width: 4) == 8)
    #expect(transport.read(offset: 0x1ff, width: 4) == 0)
    transport.write(offset: 0x104, width: 2, value: 0xabcd)
    #expect(device.writes.first?.0 == 4)
    #expect(device.writes.first?.1 == [0xcd, 0xab])
  }

  @Test func narrowAndUnalignedRegisterAccessesDoNoHarm() {
    #expect(transport.read(offset: 0x001, width: 1) == 0x69)
    #expect(transport.read(offset: 0x002, width: 2) == 0x7472)
    transport.write(offset: 0x070, width: 1, value: 0)
    transport.write(offset: 0x071, width: 4, value: 15)
    #expect(read(0x070) == 0)
  }

  /// Any order of any accesses is answered.
  @Test(arguments: UInt64(1)...100) func anyAccessesAreAnswered(seed: UInt64) {
    var random = SeededGenerator(seed: seed)
    let interesting: [UInt64] = [
      0x014, 0x020, 0x024, 0x030, 0x038, 0x044, 0x050, 0x064, 0x070, 0x080, 0x084, 0x090, 0x0a0, 0x100,
    ]
    for _ in 0..<2000 {
      let offset =
        Bool.random(using: &random) ? interesting.randomElement(using: &random) ?? 0 : random.next() & 0x3ff
      let width = [1, 2, 4, 4, 4, 8, 0, 3].randomElement(using: &random) ?? 4
      let value = Bool.random(using: &random) ? random.next() & 0x1f : random.next()
      if Bool.random(using: &random) {
        _ = transport.read(offset: offset, width: width)
      } else {
        transport.write(offset: offset, width: width, value: value)
      }
    }
    transport.write(offset: 0x070, width: 4, value: 0)
    #expect(read(0x070) == 0, "seed \(seed)")
  }
}
