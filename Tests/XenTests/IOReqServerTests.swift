import EventLoop
import SimulatedXen
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

@Suite struct IOReqServerTests {
  private let domain: SimulatedDomain
  private let pool: ForeignMappingPool
  private let thread: LoopThread
  private let device = RecordingDevice()
  private let cell = Cell()

  /// Holds the server for its thread.
  private final class Cell: @unchecked Sendable {
    var server: IOReqServer?
  }

  init() throws {
    domain = try SimulatedDomain(identifier: 4, memoryBytes: 1 << 20, vcpuCount: 3)
    let hypervisor = SimulatedHypervisor()
    hypervisor.add(domain)
    let handle = try hypervisor.open(4)
    pool = ForeignMappingPool(guest: handle)
    thread = try LoopThread(name: "ioreq")
    let (cell, pool, loop, device) = (cell, pool, thread.loop, device)
    thread.perform {
      cell.server = try? IOReqServer(guest: handle, pool: pool, loop: loop)
      try? cell.server?.claim(first: SlotTable.firstBase, last: SlotTable.firstBase + 0x7fff)
      let transport = MMIOTransport(device: device, line: RecordingLine(), onStatus: { _ in })
      try? cell.server?.attach(transport, to: SlotTable.slot(1))
    }
  }

  private func stop() {
    let cell = cell
    thread.perform {
      cell.server?.close()
      cell.server = nil
    }
    thread.stopAndJoin()
  }

  private func read(_ address: UInt64, _ size: Int = 4, vcpu: Int = 0) -> UInt64 {
    domain.access(vcpu: vcpu, address: address, size: size)
  }

  @Test func emptySlotHasDeviceNumberZero() {
    #expect(read(SlotTable.slot(0).base) == 0x7472_6976)
    #expect(read(SlotTable.slot(0).base + 8) == 0)
    #expect(read(SlotTable.slot(1).base + 8) == 2)
    #expect(read(SlotTable.slot(1).base + 0x200) == 0)
    #expect(read(0xfeb1_0000) == .max)
    stop()
  }

  @Test func everyVCPUIsAnswered() {
    for vcpu in 0..<3 { #expect(read(SlotTable.slot(1).base, vcpu: vcpu) == 0x7472_6976) }
    stop()
  }

  @Test(arguments: [1, 2, 4, 8, 3, 64]) func accessesOfAnySizeAreAnswered(size: Int) {
    _ = read(SlotTable.slot(1).base + 1, size)
    _ = domain.access(vcpu: 0, address: SlotTable.slot(1).base + 0x70, size: size, write: .max)
    stop()
  }

  @Test func repeatedAccessesGoThroughGuestMemory() {
    _ = domain.access(vcpu: 0, address: SlotTable.slot(1).base + 0x100, size: 1, count: 8, buffer: 0x2000)
    #expect(domain.memory.pointer(0x2000).load(as: UInt64.self) == 0x0807_0605_0403_0201)
    domain.memory.pointer(0x3000).storeBytes(of: 0xaabb, as: UInt16.self)
    _ = domain.access(
      vcpu: 0, address: SlotTable.slot(1).base + 0x101, size: 1, write: 0, count: 2, buffer: 0x3001, stepsDown: true)
    #expect(device.writes.map(\.0) == [1, 0])
    #expect(device.writes.map(\.1) == [[0xaa], [0xbb]])
    stop()
  }

  @Test func repeatedAccessesToUnmappedMemoryAreAnswered() {
    _ = domain.access(
      vcpu: 0, address: SlotTable.slot(1).base, size: 4, count: .max, buffer: 0xffff_ffff_ffff_fff0)
    _ = domain.access(vcpu: 0, address: SlotTable.slot(1).base, size: 8, count: 4096, buffer: 0, stepsDown: true)
    stop()
  }

  @Test func invalidateIsAnsweredWhenNothingIsMapped() throws {
    _ = try pool.bucket(0)
    #expect(domain.usage.mappings == 1)
    domain.sendInvalidate(vcpu: 2)
    #expect(domain.usage.mappings == 0)
    stop()
  }

  @Test func closeGivesEverythingBack() throws {
    _ = try pool.bucket(0)
    #expect(domain.usage == .init(ioreqServers: 1, mappings: 1, ports: 3, handles: 1, ioreqPages: 1))
    stop()
    #expect(domain.usage == .init(ioreqServers: 0, mappings: 0, ports: 0, handles: 1, ioreqPages: 0))
    #expect(device.resets == 1)
  }
}
