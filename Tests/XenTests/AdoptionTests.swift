import EventLoop
import SimulatedXen
import Synchronization
import TestSupport
import Testing
import Transport
import Virtqueue
import Xen

/// Servers that die in the middle of an access, at each point where that can happen, and what the next one makes of it.
@Suite struct AdoptionTests {
  private let domain: SimulatedDomain
  private let hypervisor = SimulatedHypervisor()
  private let vcpu: LoopThread
  private let access = Access()

  /// What the vCPU got.
  private final class Access: Sendable {
    let done = Latch()
    let value = Atomic<UInt64>(0)
  }

  /// A process with the guest's ioreq server.
  private final class Process: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: `server` is touched on its thread only.
    private let thread: LoopThread
    private let pool: ForeignMappingPool
    private var server: IOReqServer?

    /// - Parameter earlier: the server of a process that is gone.
    init(_ hypervisor: SimulatedHypervisor, adopting earlier: UInt16? = nil) throws {
      let handle = try hypervisor.open(4)
      thread = try LoopThread(name: "ioreq")
      pool = ForeignMappingPool(guest: handle)
      thread.perform { [self] in
        server = try? IOReqServer(guest: handle, pool: pool, loop: thread.loop, adopting: earlier)
        try? server?.claim(first: SlotTable.firstBase, last: SlotTable.firstBase + 0x7fff)
        let transport = MMIOTransport(device: RecordingDevice(), line: RecordingLine(), onStatus: { _ in })
        try? server?.attach(transport, to: SlotTable.slot(1))
        server?.serveAll()
      }
      // The loop looks at descriptors before it runs jobs: the event that comes with a binding has been taken now.
      thread.perform {}
    }

    /// What Xen sees of a death: ports and pages go, the server stays.
    func die() {
      thread.perform { [self] in
        server?.leave()
        server = nil
      }
      thread.stopAndJoin()
    }

    func end() {
      thread.perform { [self] in
        server?.close()
        server = nil
      }
      thread.stopAndJoin()
    }
  }

  init() throws {
    domain = try SimulatedDomain(identifier: 4, memoryBytes: 1 << 20, vcpuCount: 2)
    hypervisor.add(domain)
    vcpu = try LoopThread(name: "vcpu")
  }

  /// A vCPU reads the magic value of a device's window, and waits for it.
  private func startAccess() {
    let (domain, access) = (domain, access)
    vcpu.loop.enqueue {
      access.value.store(
        domain.access(vcpu: 1, address: SlotTable.slot(1).base, size: 4), ordering: .relaxed)
      access.done.open()
    }
  }

  /// How far a server was with an access when its process died.
  enum Progress: CaseIterable {
    case notBegun, taken, answered
  }

  @Test(arguments: Progress.allCases) func accessEndsHoweverFarTheDeadServerWas(progress: Progress) throws {
    let dead = try hypervisor.open(4)
    let number = try dead.createIOReqServer()
    let page = IOReqPage(try dead.mapIOReqPage(number))
    try dead.setIOReqServer(number, enabled: true)
    try dead.claim(.memory(SlotTable.firstBase...SlotTable.firstBase + 0x7fff), for: number)
    startAccess()
    #expect(eventually { page.stateByte(1).pointee.load(ordering: .acquiring) & 0xf == IOReqPage.State.ready })
    if progress != .notBegun { #expect(page.take(1) != nil) }
    if progress == .answered { page.answer(1, data: 0x7472_6976) }
    dead.unmapIOReqPage()

    let next = try Process(hypervisor, adopting: number)
    #expect(access.done.wait(seconds: 20), "the vCPU waits for ever: \(progress)")
    #expect(access.value.load(ordering: .relaxed) == 0x7472_6976)
    vcpu.stopAndJoin()
    next.end()
  }

  /// A vCPU has selected its server. Before it writes to its slot the server's process dies, and the next one has seen every slot empty
  /// and taken every event.
  @Test func accessReachesTheProcessThatIsThereWhenItIsSent() throws {
    let first = try Process(hypervisor)
    let next = Mutex<Process?>(nil)
    let hypervisor = hypervisor
    domain.beforeSending.withLock {
      $0 = {
        first.die()
        let process = try? Process(hypervisor, adopting: 0)
        next.withLock { $0 = process }
      }
    }
    startAccess()
    #expect(access.done.wait(seconds: 20), "the vCPU waits for ever")
    #expect(access.value.load(ordering: .relaxed) == 0x7472_6976)
    vcpu.stopAndJoin()
    next.withLock { $0 }?.end()
  }
}
