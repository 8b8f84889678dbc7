import CLinux
import ControlAPI
import EventLoop
import Glibc
import Logging
import SimulatedXen
import Supervisor
import Xen

/// The daemon: wires supervisor, control socket and service manager together, and ends them in order.
@main
enum VXD {
  static func main() {
    do {
      guard let options = try Options.parse(CommandLine.arguments) else { return }
      try run(options)
    } catch let fault as OptionFault {
      fail(fault.message, status: 2)
    } catch {
      fail("\(error)", status: 1)
    }
  }

  private static func fail(_ message: String, status: Int32) -> Never {
    var line = "vxd: \(message)\n"
    line.withUTF8 { _ = write(2, $0.baseAddress, $0.count) }
    exit(status)
  }

  private static func run(_ options: Options) throws {
    signal(SIGPIPE, SIG_IGN)
    let signals = try SignalDescriptor([SIGTERM, SIGINT, SIGHUP])
    LogLevel.current = options.verbose ? .debug : .info
    let toJournal = ServiceManager.logsToJournal
    LoggingSystem.bootstrap { _ in
      let handler: any LogHandler = toJournal ? JournalLogHandler() : PlainLogHandler()
      return handler
    }
    let log = Logger(label: "vxd")

    let loop = try EventLoop(name: "vxd")
    let board = StatusBoard()
    let actions = SupervisorControl.Actions(profilePath: options.profiles, profiles: options.settings.profiles)
    let audit = AuditLog(log, board)
    let methods = SupervisorControl.methods(
      board: board, isSimulated: options.simulate, actions: actions, audit: audit)
    let control: ControlServer
    do throws(Errno) {
      try makeFolder(of: options.socket)
      control = try ControlServer(
        path: options.socket, inherited: ServiceManager.socket(named: "control"), access: options.access,
        methods: methods)
    } catch {
      throw OptionFault("--socket \(options.socket): \(error)")
    }
    let metrics = try startMetrics(options, board)
    var settings = options.settings
    var simulation: Simulation?
    if options.simulate {
      let made = try Simulation()
      settings.xenstoreSocket = made.socketPath
      simulation = made
    }
    if !options.state.isEmpty && !options.simulate {
      do throws(Errno) {
        settings.stateFolder = try StateFolder(path: options.state)
        settings.crashes = try CrashRecord(path: options.state)
        settings.crashes?.watch()
        guard mkdir(options.consoleFolder, 0o750) == 0 || errno == EEXIST else { throw Errno.last }
        settings.consoleFolder = options.consoleFolder
        let access = options.access
        settings.mayAttachConsoles = { audit.mayAttachToConsole(access.caller(of: $0)) }
      } catch {
        throw OptionFault("--state \(options.state): \(error)")
      }
    }
    let hypervisor: any Hypervisor =
      simulation?.hypervisor ?? options.simulatedXen.map { RemoteHypervisor(path: $0) } ?? LibxenHypervisor()
    let supervisor = Supervisor(
      loop: loop, hypervisor: hypervisor, settings: settings, log: log, board: board,
      announce: { control.publish($0.json) })

    actions.connect(supervisor)
    if options.settings.ignoresInvalidations {
      log.critical("invalidations are ignored: guests that balloon will lose data")
    }
    loop.enqueue {
      supervisor.assumeIsolated { supervisor in
        do throws(XenError) {
          try supervisor.start()
        } catch {
          control.stop()
          fail(
            "cannot reach Xen: \(error). vxd runs in dom0 or a driver domain with xenstored; 'vxd --simulate' needs neither",
            status: 1)
        }
      }
      ServiceManager.ready()
      ServiceManager.status("Serving virtio devices")
      log.info("listening on \(options.socket)")
    }
    let relay =
      options.simulate
      ? nil
      : try ToolstackRelay(
        xenstoreSocket: settings.xenstoreSocket, control: options.socket, log: log)
    let shutdown = Shutdown(loop: loop, supervisor: supervisor, log: log, simulation: simulation)
    actions.onShutdown { handsOver in loop.enqueue { shutdown.begin(handsOver: handsOver) } }
    let token = try loop.onReadable(signals.raw) {
      for signal in signals.take() {
        guard signal == SIGHUP else { return shutdown.begin() }
        do throws(ControlFault) { try actions.reload() } catch { log.error("profiles: \(error.message)") }
      }
    }
    if let period = ServiceManager.watchdogPeriod { feedWatchdog(loop, board, period) }
    simulation?.play(log: log)
    loop.run()
    loop.remove(token)
    simulation?.stop()
    relay?.stop()
    metrics?.stop()
    control.stop()
    log.info("stopped")
  }

  private static func startMetrics(_ options: Options, _ board: StatusBoard) throws(OptionFault) -> MetricsServer? {
    guard !options.metricsSocket.isEmpty else { return nil }
    let started = EventLoop.now()
    do throws(Errno) {
      try makeFolder(of: options.metricsSocket)
      return try MetricsServer(
        path: options.metricsSocket, port: options.metricsPort, contentType: Metrics.contentType,
        text: { Metrics.text(board, started: started, now: EventLoop.now()) })
    } catch {
      throw OptionFault("--metrics-socket \(options.metricsSocket), --metrics-port: \(error)")
    }
  }

  /// The loop itself feeds the watchdog: when the supervisor hangs, or most data threads do, systemd restarts vxd. One thread that
  /// hangs on a dead disk is not a reason: the process could not exit either, and every guest would hang with it.
  private static func feedWatchdog(_ loop: EventLoop, _ board: StatusBoard, _ period: UInt64) {
    loop.schedule(afterMilliseconds: period) {
      if board.isHealthy { ServiceManager.alive() }
      feedWatchdog(loop, board, period)
    }
  }

  private static func makeFolder(of path: String) throws(Errno) {
    guard let slash = path.lastIndex(of: "/"), slash != path.startIndex else { return }
    guard mkdir(String(path[..<slash]), 0o755) == 0 || errno == EEXIST else { throw Errno.last }
  }
}

/// The end of the daemon after a signal.
private final class Shutdown: @unchecked Sendable {
  // Invariant behind @unchecked Sendable: used on the main loop's thread only.
  private let loop: EventLoop
  private let supervisor: Supervisor
  private let log: Logger
  private let simulation: Simulation?
  private var hasBegun = false
  private var handsOver = true
  /// Ends the simulated guest while the supervisor still serves it.
  private var helper: LoopThread?

  init(loop: EventLoop, supervisor: Supervisor, log: Logger, simulation: Simulation?) {
    self.loop = loop
    self.supervisor = supervisor
    self.log = log
    self.simulation = simulation
  }

  func begin(handsOver: Bool = true) {
    guard !hasBegun else { return }
    hasBegun = true
    self.handsOver = handsOver
    log.info("stopping")
    ServiceManager.stopping()
    let (loop, log) = (loop, log)
    loop.schedule(afterMilliseconds: 15_000) {
      log.error("a device did not stop within 15 s")
      loop.stop()
    }
    guard let simulation, let helper = try? LoopThread(name: "sim-shutdown") else { return stopSupervisor() }
    self.helper = helper
    helper.loop.enqueue { [self] in
      simulation.endGuest()
      loop.enqueue { [self] in
        helper.stopAndJoin()
        stopSupervisor()
      }
    }
  }

  private func stopSupervisor() {
    let (loop, handsOver) = (loop, handsOver)
    supervisor.assumeIsolated { $0.stop(handsOver: handsOver) { loop.stop() } }
  }
}
