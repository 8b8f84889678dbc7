import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue

@testable import Xen

@Suite struct PCIRoutesTests {
  private let domain: SimulatedDomain
  private let hypervisor = SimulatedHypervisor()
  private let first = PCIAddress(device: 16)
  private let second = PCIAddress(device: 17)

  /// A process with the guest's ioreq server and two functions.
  private final class Process: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: `server` is touched on its thread only.
    let thread: LoopThread
    let transports: [PCITransport]
    private var server: IOReqServer?

    init(_ hypervisor: SimulatedHypervisor, _ addresses: [PCIAddress], adopting earlier: UInt16? = nil) throws {
      let handle = try hypervisor.open(4)
      thread = try LoopThread(name: "ioreq")
      let pool = ForeignMappingPool(guest: handle)
      transports = addresses.map { address in
        PCITransport(
          device: RecordingDevice(), line: IntxLine(guest: handle, device: address.device, pin: 0),
          sender: GuestMessages(guest: handle), onStatus: { _ in })
      }
      thread.perform { [self] in
        server = try? IOReqServer(guest: handle, pool: pool, loop: thread.loop, adopting: earlier)
        for (transport, address) in zip(transports, addresses) { try? server?.attach(transport, at: address) }
        server?.serveAll()
      }
    }

    func perform(_ body: @escaping @Sendable (IOReqServer) -> Void) {
      thread.perform { [self] in if let server { body(server) } }
    }

    /// Accesses that were answered.
    var counted: UInt64 {
      let count = Atomic<UInt64>(0)
      perform { count.store($0.counters.accesses.value, ordering: .relaxed) }
      return count.load(ordering: .relaxed)
    }

    func end(leaves: Bool = false) {
      thread.perform { [self] in
        if leaves { server?.leave() } else { server?.close() }
        server = nil
      }
      thread.stopAndJoin()
    }
  }

  init() throws {
    domain = try SimulatedDomain(identifier: 4, memoryBytes: 1 << 20, vcpuCount: 2)
    hypervisor.add(domain)
  }

  /// Whether nothing is held of the guest but handles.
  private var isFree: Bool {
    let usage = domain.usage
    return usage.ioreqServers == 0 && usage.mappings == 0 && usage.ports == 0 && usage.ioreqPages == 0
  }

  private func range(_ base: UInt64) -> ClosedRange<UInt64> { base...base + 0x3fff }

  @Test func planGivesEachAddressToOneFunction() {
    let (a, b, c) = (range(0xf300_0000), range(0xf300_2000), range(0xf300_4000))
    #expect(PCIRoutes.plan([a, b, c]) == [a, nil, c])
    #expect(PCIRoutes.plan([nil, b, c]) == [nil, b, nil])
    #expect(PCIRoutes.plan([a, a]) == [a, nil])
  }

  @Test func rangesAreClaimedOnlyWhileTheyAreDecoded() throws {
    let process = try Process(hypervisor, [first])
    #expect(domain.claimedMemory.isEmpty)
    let registers = try PCIFunctionRegisters(domain: domain, function: first, base: 0xf300_0000)
    #expect(domain.claimedMemory == [range(0xf300_0000)])
    #expect(registers.read(0x008) == 2)
    #expect(registers.get(0x1000, 8) == 0x0807_0605_0403_0201)
    registers.setConfiguration(4, 2, 4)
    #expect(domain.claimedMemory.isEmpty)
    #expect(registers.get(0x1000, 8) == .max)
    registers.setConfiguration(4, 2, 6)
    registers.move(to: 0xf400_0000)
    #expect(domain.claimedMemory == [range(0xf400_0000)])
    #expect(registers.get(0x1000, 4) == 0x0403_0201)
    process.end()
    #expect(isFree)
  }

  @Test(arguments: [
    UInt64(0), 0x0, 0x4_0000, 0x7fff_c000, 0xfc00_0000, 0xfbff_e000, 0xfeb0_0000, 0xfee0_0000, 0xffff_c000,
  ]) func addressesOutsideOfTheHoleAreNotClaimed(base: UInt64) throws {
    let process = try Process(hypervisor, [first])
    let registers = try PCIFunctionRegisters(domain: domain, function: first, base: base, interrupts: .pin)
    // What the BAR reads is what was written: the base is cut to the BAR's size.
    let claimed = domain.claimedMemory
    #expect(claimed.isEmpty || claimed == [range(0xfbff_c000)], "\(claimed)")
    #expect(process.transports[0].isClaimed == !claimed.isEmpty)
    registers.move(to: 0xf300_0000)
    #expect(domain.claimedMemory == [range(0xf300_0000)])
    #expect(process.transports[0].isClaimed)
    process.end()
  }

  @Test func memoryOfTheGuestIsNotClaimed() throws {
    let large = try SimulatedDomain(identifier: 4, memoryBytes: Int(0x8000_8000), vcpuCount: 1)
    hypervisor.add(large)
    let process = try Process(hypervisor, [first])
    let registers = try PCIFunctionRegisters(domain: large, function: first, base: 0x8000_4000, interrupts: .pin)
    #expect(large.claimedMemory.isEmpty)
    registers.move(to: 0x8000_8000)
    #expect(large.claimedMemory == [range(0x8000_8000)])
    process.end()
    #expect(large.usage.mappings == 0)
  }

  @Test func functionsDoNotTakeEachOthersAddresses() throws {
    let process = try Process(hypervisor, [first, second])
    let lower = try PCIFunctionRegisters(domain: domain, function: first, base: 0xf300_0000)
    let higher = try PCIFunctionRegisters(domain: domain, function: second, base: 0xf310_0000)
    higher.move(to: 0xf300_0000)
    #expect(domain.claimedMemory == [range(0xf300_0000)])
    #expect(!process.transports[1].isClaimed)
    // The lower one has them still.
    lower.put(0x14, 1, 1)
    #expect(process.transports[0].currentStatus == .acknowledge)
    #expect(process.transports[1].currentStatus == [])
    lower.move(to: 0xf320_0000)
    #expect(domain.claimedMemory == [range(0xf300_0000), range(0xf320_0000)])
    higher.put(0x14, 1, 3)
    #expect(process.transports[1].currentStatus == [.acknowledge, .driver])
    process.end()
    #expect(isFree)
  }

  @Test func functionThatIsTakenOffReadsAsOnes() throws {
    let process = try Process(hypervisor, [first, second])
    let (lower, higher) = (
      try PCIFunctionRegisters(domain: domain, function: first, base: 0xf300_0000),
      try PCIFunctionRegisters(domain: domain, function: second, base: 0xf310_0000)
    )
    let address = first
    process.perform { $0.detach(address) }
    #expect(lower.configuration(0, 4) == 0xffff_ffff)
    #expect(domain.claimedMemory == [range(0xf310_0000)])
    #expect(higher.configuration(0, 2) == 0x1af4)
    process.end()
  }

  /// What two vCPUs read of the first two functions' identities, each by a thread of its own.
  private final class Readers: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: each thread writes an element of its own, which is read when it has ended.
    private var threads: [LoopThread] = []
    private var found: [UInt64] = [0, 0]

    init(_ domain: SimulatedDomain, _ functions: [PCIAddress]) throws {
      threads = try functions.indices.map { try LoopThread(name: "vcpu\($0)") }
      for (vcpu, function) in functions.enumerated() {
        threads[vcpu].loop.enqueue { [self] in
          found[vcpu] = domain.configurationAccess(vcpu: vcpu, function, register: 0, size: 4) & 0xffff_ffff
        }
      }
    }

    func identities() -> [UInt64] {
      for thread in threads { thread.stopAndJoin() }
      return found
    }
  }

  @Test(arguments: [false, true]) func configurationWaitsUntilItIsAnswered(adopted: Bool) throws {
    let scans = Atomic<Int>(0)
    let lower = first
    let process = try Process(hypervisor, [first, second])
    process.perform { server in
      server.holdConfiguration { scans.wrappingAdd(1, ordering: .relaxed) }
    }
    let readers = try Readers(domain, [first, second])
    #expect(eventually { scans.load(ordering: .relaxed) == 1 })
    // An event of any vCPU has all of them looked at.
    process.perform { $0.ready(events: 1) }
    process.perform { $0.serveAll() }
    #expect(process.counted == 0 && scans.load(ordering: .relaxed) == 1)
    guard adopted else {
      process.perform { $0.answerConfiguration(without: [lower]) }
      #expect(readers.identities() == [0xffff_ffff, 0x1042_1af4])
      #expect(domain.claimedFunctions == [second])
      // What is said later is not taken from a driver, which has it by its status; else it is.
      let higher = second
      let registers = try PCIFunctionRegisters(domain: domain, function: higher)
      registers.write(0x070, width: 4, 1)
      process.perform { $0.answerConfiguration(without: [higher]) }
      #expect(domain.claimedFunctions == [second])
      registers.write(0x070, width: 4, 0)
      process.perform { $0.answerConfiguration(without: [higher]) }
      #expect(domain.claimedFunctions == [])
      return process.end()
    }
    process.end(leaves: true)
    let next = try Process(hypervisor, [first, second], adopting: 0)
    #expect(readers.identities() == [0x1042_1af4, 0x1042_1af4])
    next.end()
    #expect(isFree)
  }

  @Test func endAnswersWhoWaitsForAConfigurationSpace() throws {
    let process = try Process(hypervisor, [first, second])
    let isScanned = Latch()
    process.perform { $0.holdConfiguration { isScanned.open() } }
    let readers = try Readers(domain, [first, second])
    isScanned.wait()
    process.end()
    #expect(readers.identities() == [0xffff_ffff, 0xffff_ffff])
    #expect(isFree)
  }

  @Test func nextProcessKnowsWhatTheEarlierOneClaimed() throws {
    let process = try Process(hypervisor, [first])
    let registers = try PCIFunctionRegisters(domain: domain, function: first, base: 0xf300_0000)
    process.end(leaves: true)
    #expect(domain.claimedMemory == [range(0xf300_0000)])
    // Without the saved registers its BAR is not placed: what the earlier one claimed stays until the guest's end, and reads as ones.
    let next = try Process(hypervisor, [first], adopting: 0)
    #expect(registers.configuration(0x10, 4) == 0)
    #expect(registers.get(0x1000, 4) == 0xffff_ffff)
    registers.move(to: 0xf300_0000)
    registers.setConfiguration(4, 2, 6)
    #expect(registers.get(0x1000, 4) == 0x0403_0201)
    next.end()
    #expect(isFree)
  }

  /// Two vCPUs program both functions' BARs, anywhere, with decoding on and off: every access is answered, claims never overlap, and
  /// afterwards everything can be put in order again.
  @Test(arguments: UInt64(1)...8) func hostileBARsAreAnswered(seed: UInt64) throws {
    let process = try Process(hypervisor, [first, second])
    let vcpus = try (0..<2).map { try LoopThread(name: "vcpu\($0)") }
    let (domain, addresses) = (domain, [first, second])
    for (number, thread) in vcpus.enumerated() {
      thread.loop.enqueue {
        var random = SeededGenerator(seed: seed &* 2 &+ UInt64(number))
        for _ in 0..<1500 {
          let function = addresses[Int(random.next() & 1)]
          let values: [UInt64] = [
            0xf300_0000, 0xf300_2000, 0x2, 0x0, 0x406, 0xfbff_c000, 0x1000, 0xfeb0_0000, 0x8000, 0xc000,
          ]
          let value = random.next() & 7 == 0 ? random.next() : values.randomElement(using: &random) ?? 0
          let registers = [4, 4, 0x10, 0x10, 0x42, 0x9c, 0xa0, 0xa4]
          let register =
            random.next() & 7 == 0 ? Int(random.next() & 0xff) : registers.randomElement(using: &random) ?? 0
          let size = [1, 2, 4].randomElement(using: &random) ?? 4
          switch random.next() & 3 {
          case 0:
            _ = domain.access(
              vcpu: number, address: 0xf300_0000 + (random.next() & 0x7fff), size: size,
              write: Bool.random(using: &random) ? random.next() : nil)
          case 1: _ = domain.configurationAccess(vcpu: number, function, register: register, size: size)
          default:
            _ = domain.configurationAccess(vcpu: number, function, register: register, size: size, write: value)
          }
        }
      }
    }
    for thread in vcpus {
      thread.perform {}
      thread.stopAndJoin()
    }
    let claimed = domain.claimedMemory
    for (lower, higher) in zip(claimed, claimed.dropFirst()) {
      #expect(lower.upperBound < higher.lowerBound, "seed \(seed)")
    }
    for (index, address) in addresses.enumerated() {
      let registers = try PCIFunctionRegisters(
        domain: domain, function: address, base: 0xf380_0000 + 0x1_0000 * UInt64(index))
      #expect(registers.get(0x1000, 4) == 0x0403_0201, "seed \(seed)")
    }
    process.end()
    #expect(isFree, "seed \(seed)")
  }
}
