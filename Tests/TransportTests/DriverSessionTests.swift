import Synchronization
import TestSupport
import Testing
import Virtqueue

@testable import Transport

/// What both transports do for a driver and its device, whatever the driver reaches it by.
@Suite struct DriverSessionTests {
  /// A device that takes the event index for wrong, which it offers all the same.
  private final class Choosy: VirtioDevice, @unchecked Sendable {
    // Invariant behind @unchecked Sendable: tests call its transport from one thread.
    let deviceID: UInt32 = 2
    let offeredFeatures: FeatureBits
    let queueSizes: [UInt16]
    let configuration = ConfigurationSpace([9, 9, 9])
    var activations: [(layouts: [QueueLayout?], adopts: Bool)] = []
    var writes: [[UInt8]] = []
    var resets = 0
    var waits = 0

    init(_ features: FeatureBits = [.version1, .eventIndex, .indirectDescriptors], sizes: [UInt16] = [64, 64]) {
      offeredFeatures = features
      queueSizes = sizes
    }

    func accepts(_ features: FeatureBits) -> Bool { !features.contains(.eventIndex) }
    func activate(features: FeatureBits, layouts: [QueueLayout?], signals: any TransportSignals, adopts: Bool) {
      activations.append((layouts, adopts))
    }
    func resetQueue(_ queue: Int) {}
    func enableQueue(_ queue: Int, layout: QueueLayout) {}
    func notify(queue: Int) {}
    func reset() { resets += 1 }
    func configurationWritten(offset: Int, bytes: [UInt8]) { writes.append(bytes) }
    var untilStopped: @Sendable () -> Void { { [self] in waits += 1 } }
  }

  /// What is saved, as a list of what happened.
  private final class Journal: TransportState, @unchecked Sendable {
    // Invariant behind @unchecked Sendable: as above.
    var saved: [(driver: DriverState, status: DeviceStatus)] = []
    var ended: [Int] = []
    func save(_ driver: DriverState, _ status: DeviceStatus, configuration: [UInt8]) { saved.append((driver, status)) }
    func endQueue(_ queue: Int) { ended.append(queue) }
  }

  private final class Bell: QueueDoorbell {
    let descriptor: Int32 = -1
    func acknowledge() {}
    func rearm() {}
    func ring() {}
  }

  /// A transport with a driver at work on its first queue, of two.
  private struct Stage {
    var transport: any DeviceTransport
    var reset: () -> Void
    var accepts: (FeatureBits) -> Bool
  }

  private static let layout: QueueLayout = {
    var layout = QueueLayout()
    layout.size = 16
    (layout.descriptorArea, layout.driverArea, layout.deviceArea) = (0x1000, 0x2000, 0x3000)
    return layout
  }()

  private func registers(_ device: Choosy, _ journal: Journal) -> Stage {
    let transport = MMIOTransport(device: device, line: RecordingLine(), state: journal, onStatus: { _ in })
    func write(_ offset: UInt64, _ value: UInt64) { transport.write(offset: offset, width: 4, value: value) }
    func negotiate(_ features: FeatureBits) {
      write(0x070, 0)
      write(0x070, 3)
      for word: UInt64 in 0...1 {
        write(0x024, word)
        write(0x020, features.rawValue >> (32 * word) & 0xffff_ffff)
      }
      write(0x070, 11)
    }
    negotiate([.version1])
    for (offset, value): (UInt64, UInt64) in [(0x30, 0), (0x38, 16), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
      write(offset, value)
    }
    write(0x44, 1)
    write(0x70, 15)
    return Stage(
      transport: transport, reset: { transport.write(offset: 0x70, width: 4, value: 0) },
      accepts: { features in
        negotiate(features)
        return transport.currentStatus.contains(.featuresOK)
      })
  }

  private func xenbus(_ device: Choosy, _ journal: Journal) -> Stage {
    let transport = XenbusTransport(device: device, state: journal, onStatus: { _ in }, onConfiguration: {})
    transport.connect(
      XenbusSetup(
        features: [.version1], pages: 16, readOnlyPages: 0, directories: [1],
        queues: [.init(layout: Self.layout, port: 5), nil]), epoch: 7,
      doorbells: [Bell(), nil], adopts: false)
    return Stage(transport: transport, reset: { transport.disconnect() }, accepts: { transport.accepts($0) })
  }

  private func onBoth(_ body: (Stage, Choosy, Journal) throws -> Void) rethrows {
    for make in [registers, xenbus] {
      let (device, journal) = (Choosy(), Journal())
      try body(make(device, journal), device, journal)
    }
  }

  @Test func driverThatBeginsIsToldToTheDeviceAndWrittenDown() {
    onBoth { stage, device, journal in
      #expect(stage.transport.currentStatus == [.acknowledge, .driver, .featuresOK, .driverOK])
      #expect(device.activations.count == 1 && device.activations[0].adopts == false)
      #expect(device.activations[0].layouts == [Self.layout, nil])
      #expect(journal.saved.last?.driver.layouts == [Self.layout, nil])
      #expect(journal.saved.last?.status.contains(.driverOK) == true)
    }
  }

  @Test func anotherBackendResumesWhatWasNegotiatedAndLearnsWhatWasWritten() {
    onBoth { stage, _, _ in
      let next = Choosy()
      stage.transport.unplug()
      #expect(stage.transport.plug(next))
      #expect(
        next.activations.count == 1 && next.activations[0].adopts && next.activations[0].layouts == [Self.layout, nil])
      #expect(next.writes == [[9, 9, 9]])
    }
  }

  @Test(arguments: 0..<3) func backendThatCannotServeWhatWasNegotiatedMakesTheDriverReset(index: Int) {
    onBoth { stage, _, _ in
      stage.transport.unplug()
      #expect(!stage.transport.plug([Choosy([.eventIndex]), Choosy(sizes: [64]), Choosy(sizes: [8, 64])][index]))
      #expect(stage.transport.currentStatus.contains(.needsReset))
      // Until it has, no backend serves it.
      let fit = Choosy()
      #expect(stage.transport.plug(fit) && fit.activations.isEmpty)
      stage.reset()
      #expect(stage.transport.currentStatus.isEmpty && fit.resets == 1)
    }
  }

  /// A backend that was taken away may be in a batch: the driver's memory is its own when that is over.
  @Test func resetWaitsForTheBackendThatWasTakenAwayAndForNoOther() {
    onBoth { stage, device, _ in
      let resets = device.resets
      #expect(device.waits == 0)
      stage.transport.unplug()
      stage.reset()
      #expect(device.waits >= 1 && device.resets == resets)
      let (waits, next) = (device.waits, Choosy())
      stage.transport.plug(next)
      stage.reset()
      #expect(device.waits == waits && next.waits == 0)
    }
  }

  /// Features or queues that it does not have would reach it by DRIVER_OK, and its driver would wait for ever.
  @Test(arguments: 0..<2) func backendThatComesBehindFeaturesOKIsAskedAtDriverOK(index: Int) {
    let transport = MMIOTransport(device: Choosy(), line: RecordingLine(), state: Journal(), onStatus: { _ in })
    func write(_ offset: UInt64, _ value: UInt64) { transport.write(offset: offset, width: 4, value: value) }
    for (offset, value): (UInt64, UInt64) in [
      (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 1 << 28), (0x70, 11), (0x30, 0), (0x38, 16), (0x80, 0x1000),
      (0x90, 0x2000), (0xa0, 0x3000), (0x44, 1),
    ] { write(offset, value) }
    #expect(transport.currentStatus == [.acknowledge, .driver, .featuresOK])
    transport.unplug()
    let next = [Choosy([.version1]), Choosy(sizes: [8, 64])][index]
    #expect(transport.plug(next))
    write(0x70, 15)
    #expect(next.activations.isEmpty && transport.currentStatus.contains(.needsReset))
    // With its reset the driver is served again.
    write(0x70, 0)
    #expect(transport.currentStatus.isEmpty)
  }

  /// A driver that reads a field in parts compares numbers around them, over PCI 8 bits of them: a process that takes over in between must
  /// not show the one that it knows.
  @Test func generationOfTheNextProcessIsAnother() throws {
    let journal = Journal()
    let device = Choosy()
    var transport = MMIOTransport(device: device, line: RecordingLine(), state: journal, onStatus: { _ in })
    transport.write(offset: 0x70, width: 4, value: 1)
    for round in 0..<600 {
      let known = transport.read(offset: 0x0fc, width: 4)
      let saved = try #require(journal.saved.last)
      transport = MMIOTransport(
        restoring: DeviceIdentity(device), saved.driver, saved.status, configuration: [9, 9, 9], line: RecordingLine(),
        state: journal, onStatus: { _ in })
      #expect(transport.read(offset: 0x0fc, width: 4) & 0xff != known & 0xff, "round \(round)")
      #expect(transport.plug(Choosy()))
      #expect(transport.read(offset: 0x0fc, width: 4) & 0xff != known & 0xff, "round \(round)")
      // As any access of the driver does.
      transport.write(offset: 0x14, width: 4, value: 0)
    }
  }

  @Test func resetEndsTheJournalsAndLeavesNothing() {
    onBoth { stage, device, journal in
      journal.ended = []
      stage.reset()
      #expect(device.resets >= 1 && journal.ended == [0, 1])
      #expect(journal.saved.last?.status == [] && journal.saved.last?.driver.layouts == [nil, nil])
    }
  }

  @Test func featuresThatTheDeviceDoesNotAcceptAreRefused() {
    onBoth { stage, _, _ in
      #expect(stage.accepts([.version1, .indirectDescriptors]))
      #expect(!stage.accepts([.version1, .eventIndex]))
      #expect(!stage.accepts([.indirectDescriptors]), "without VERSION_1")
      #expect(!stage.accepts([.version1, .ringPacked]), "not offered")
    }
  }
}
