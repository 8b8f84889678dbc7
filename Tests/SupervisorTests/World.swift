import ControlAPI
import DeviceHost
import EventLoop
import Glibc
import Logging
import SimulatedXen
import Synchronization
import TestSupport
import Transport
import Virtqueue
import Xen

@testable import Supervisor

/// A simulated Xen with a supervisor, a toolstack, and guests that a test makes.
final class World: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: set up before threads of a test use it, and made of parts for sharing.

  let folder = TemporaryFolder()
  let hypervisor = SimulatedHypervisor()
  let server: XenstoreServer
  let toolstack: SimulatedToolstack
  let board = StatusBoard()
  private let events = Events()
  private var thread: LoopThread?
  private var supervisor: Supervisor?
  private let methods: ControlMethods
  private let actions = SupervisorControl.Actions()

  private final class Events: Sendable {
    let list = Mutex<[SupervisorEvent]>([])
  }

  init() throws {
    server = try XenstoreServer(path: folder.path + "/xenstored")
    toolstack = try SimulatedToolstack(server: server, hypervisor: hypervisor)
    methods = SupervisorControl.methods(board: board, isSimulated: true, actions: actions)
  }

  /// Starts a supervisor, as the start of the daemon does.
  func start(
    slots: Int = 8, profiles: String? = nil, actions more: SupervisorControl.Actions? = nil,
    _ change: (inout SupervisorSettings) -> Void = { _ in }
  ) throws {
    let thread = try LoopThread(name: "supervisor")
    var settings = SupervisorSettings()
    settings.xenstoreSocket = server.path
    settings.slots = slots
    settings.bucketShift = 16
    settings.xenstoreCheckMilliseconds = 50
    if let profiles { settings.profiles = try Profiles(try JSONText.parse(Array(profiles.utf8))) }
    settings.startRetry.firstPause = 20
    change(&settings)
    let events = events
    let supervisor = Supervisor(
      loop: thread.loop, hypervisor: hypervisor, settings: settings,
      log: Logger(label: "test", factory: { _ in SwiftLogNoOpLogHandler() }), board: board,
      announce: { event in events.list.withLock { $0.append(event) } })
    self.thread = thread
    self.supervisor = supervisor
    actions.connect(supervisor)
    more?.connect(supervisor)
    let failure = StartFailure()
    thread.perform {
      supervisor.assumeIsolated { supervisor in
        do throws(XenError) { try supervisor.start() } catch { failure.error.withLock { $0 = error } }
      }
    }
    if let error = failure.error.withLock({ $0 }) { throw error }
  }

  private final class StartFailure: Sendable {
    let error = Mutex<XenError?>(nil)
  }

  // MARK: Barriers

  /// Returns when the supervisor has dealt with everything that was done before: what was written to Xenstore, what guests did with their
  /// registers and queues, and what its threads told each other of that. What it has timers for is not waited for.
  func settle() {
    guard let thread, let supervisor else { return }
    // One round brings a change from Xenstore to the guest's thread, the next to the data thread, the third what that reports.
    for _ in 0..<3 {
      // xenstored sends an event before it answers what was asked later: the next job finds the event handled.
      thread.perform { supervisor.assumeIsolated { _ = $0.reader.connection?.read("/") } }
      let passed = Latch()
      thread.perform {
        supervisor.assumeIsolated { supervisor in
          let guests = supervisor.table.guests.values.map(\.buses.thread.loop)
          let data = supervisor.table.guests.values.flatMap { guest in
            guest.devices.values.flatMap { $0.running?.threads.map(\.loop) ?? [] }
          }
          let last = Countdown(left: guests.count + data.count + 1) { passed.open() }
          // From this job, so that none of them ends before it has the job in its mailbox.
          for loop in guests + data { whenQuiet(loop) { last.step() } }
          last.step()
        }
      }
      passed.wait()
      thread.perform {}
    }
  }

  /// Runs `body` on the supervisor's loop.
  func withSupervisor(_ body: @escaping @Sendable (isolated Supervisor) -> Void) {
    guard let thread, let supervisor else { return }
    thread.perform { supervisor.assumeIsolated { body($0) } }
  }

  /// Runs `body` while the supervisor does nothing: it finds all that happens in it at once.
  func whileTheSupervisorWaits(_ body: () throws -> Void) rethrows {
    let (waits, goesOn) = (Latch(), Latch())
    thread?.loop.enqueue {
      waits.open()
      goesOn.wait()
    }
    waits.wait()
    defer { goesOn.open() }
    try body()
  }

  /// Looks at the supervisor from its own thread.
  func inside<Result: Sendable>(_ body: @escaping @Sendable (isolated Supervisor) -> Result?) -> Result? {
    guard let thread, let supervisor else { return nil }
    let found = Found<Result>()
    thread.perform {
      supervisor.assumeIsolated { supervisor in
        let result = body(supervisor)
        found.value.withLock { $0 = result }
      }
    }
    return found.value.withLock { $0 }
  }

  private final class Found<Result: Sendable>: Sendable {
    let value = Mutex<Result?>(nil)
  }

  /// Ends the supervisor in good order.
  func stop(handsOver: Bool = true) {
    guard let thread, let supervisor else { return }
    let latch = Latch()
    thread.loop.enqueue { supervisor.assumeIsolated { $0.stop(handsOver: handsOver) { latch.open() } } }
    latch.wait()
    thread.stopAndJoin()
    self.thread = nil
    self.supervisor = nil
  }

  func end() {
    stop()
    server.stop()
  }

  func call(_ method: String, _ parameters: JSONValue = .object([])) -> JSONValue {
    let request: JSONValue = ["jsonrpc": "2.0", "id": 1, "method": .string(method), "params": parameters]
    let reply = methods.answer(Array(JSONText.text(request).utf8), subscribe: { _ in .null })
    return reply?["result"] ?? reply?["error"] ?? .null
  }

  var controlPath: String { folder.path + "/control.sock" }

  /// The control socket with the supervisor's methods.
  func serveControl(access: ControlAccess = ControlAccess()) throws -> ControlServer {
    try ControlServer(path: controlPath, access: access, methods: methods)
  }

  /// What Prometheus would read.
  var metrics: String { Metrics.text(board, started: 0, now: EventLoop.now()) }

  func device(_ guest: String, _ disk: String) -> JSONValue {
    call("device.get", ["guest": .string(guest), "device": .string(disk)])
  }

  func state(_ guest: String, _ disk: String) -> String? { device(guest, disk)["state"]?.stringValue }

  func info(_ name: String) -> Int64? { call("system.info")[name]?.integerValue }

  /// Reasons of the events of a kind.
  func reasons(_ kind: SupervisorEvent.Kind) -> [String] {
    events.list.withLock { $0.filter { $0.kind == kind }.map { $0.reason ?? "" } }
  }

  /// What was told of a device.
  func kinds(of device: String) -> [SupervisorEvent.Kind] {
    events.list.withLock { $0.filter { $0.device == device }.map(\.kind) }
  }

  var eventKinds: [SupervisorEvent.Kind] { events.list.withLock { $0.map(\.kind) } }

  /// Makes a domain; its disks are attached by the test.
  func domain(_ identifier: DomainID, name: String, vcpus: Int = 1, type: String = "hvm") throws -> SimulatedDomain {
    let domain = try SimulatedDomain(identifier: identifier, memoryBytes: 16 << 20, vcpuCount: vcpus)
    try toolstack.create(domain, name: name, type: type)
    return domain
  }

  /// A PVH guest's driver on a disk over Xenbus.
  func bootXenbus(
    _ domain: SimulatedDomain, disk: String = "xvde", queueSize: UInt16 = 64, queueCount: Int = 1,
    area: UInt64 = 1 << 20
  ) throws -> (guest: SimulatedBlockGuest, registers: XenbusRegisters) {
    let registers = try XenbusRegisters(server: server, domain: domain, disk: disk)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: area)
    try driver.start(
      wanted: [.indirectDescriptors, .eventIndex, .blockFlush, .blockConfigureWriteback], queueSize: queueSize,
      queueCount: queueCount)
    return (SimulatedBlockGuest(domain: domain, driver: driver), registers)
  }

  /// The guest's driver on the disk in a slot.
  func boot(_ domain: SimulatedDomain, slot: Int = 0, area: UInt64 = 1 << 20, vcpu: Int = 0) throws
    -> SimulatedBlockGuest
  {
    try boot(domain, base: SlotTable.slot(slot).base, area: area, vcpu: vcpu)
  }

  /// The guest's driver on the disk at an address.
  func boot(_ domain: SimulatedDomain, base: UInt64, area: UInt64 = 1 << 20, vcpu: Int = 0) throws
    -> SimulatedBlockGuest
  {
    let registers = TrappedRegisters(domain: domain, base: base, vcpu: vcpu)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: area)
    try driver.start(wanted: [.indirectDescriptors, .eventIndex], queueSize: 64)
    return SimulatedBlockGuest(domain: domain, driver: driver)
  }

  func image(_ name: String = "disk.img", bytes: Int = 4 << 20) -> String { folder.file(name, bytes: bytes) }
}
