@testable import Lifecycle

/// A guest with everything around its machine: data threads, the guest's thread, Xenstore, the driver. It performs effects as the shell
/// would, one operation at a time in any order that can be, and notes what must not be.
struct PlayedGuest: Hashable {
  /// What the threads of one backend are at.
  enum Stage: Hashable {
    case opening
    case open
    /// The shell was told to stop it; the guest's thread has not taken it off its transport yet.
    case stopAsked
    /// Its data threads close it: it may still write to the guest's memory.
    case closing
    /// Its threads have nothing left to do.
    case finished
  }

  /// An operation on the guest's thread, which does one after the other.
  enum Operation: Hashable {
    case startServer
    case insert(Int, BackendID)
    case plug(Int, BackendID)
    case unplug(Int, BackendID)
    case remove(Int)
    case leave(Int)
    case connect(Int, sequence: UInt32)
    case disconnect(Int)
    case removeTraces(Int)
    case leaveServer
    case closeServer
    case claim(Int)
    case releaseMemory
  }

  /// The world around one device.
  struct Device: Hashable {
    var style: BusStyle
    var isSpare: Bool
    var backends: [BackendID: Stage] = [:]
    var behindTransport: BackendID?
    var isInserted: Bool
    var isMapped = false
    var timers: Set<DeviceTimer> = []
    var drains: Set<BackendID> = []
    /// Asked to change something, and not answered yet.
    var adjusting: Set<BackendID> = []
    var frontend = FrontendView(state: .initialising)
    /// The shell was asked to read the frontend's nodes.
    var isReading = false
    /// The entry has another description than at the last start.
    var isCorrected = false
    /// Its guest looks for it whether it is there or not.
    var hasWindow = false
    var isClaimed = false
    var closedWrites = 0
    var gone = 0
    /// An image was assigned, and no backend has opened it so far.
    var isFilling = false
    /// What a spare disk has, and what its backend was started with.
    var image: String?
    var openedImage: String?
    /// It was opened before its place was known to be another's.
    var isDisplaced = false
    /// A backend has been started that saves state, or one of an earlier daemon has.
    var hasState = false
    /// It speaks of a place that is another's.
    var hasLostState = false
    /// It is in a place that is another's.
    var isInOthersPlace = false
    var limits = RateLimits()
    /// Started and not joined yet.
    var unjoined = 0
  }

  var machine: GuestMachine<Int>
  var devices: [Int: Device] = [:]
  var queue: [Operation] = []
  var timers: Set<UInt64> = []
  var hasMemory = true
  var hasServer = false
  var isHandedOver = false
  var isGone = false
  var isThreadJoined = false
  var violations: [String] = []

  /// Budgets are small, so that their ends are near.
  static var rules: DeviceRules {
    var rules = DeviceRules()
    rules.restart.limit = 1
    rules.faultLimit = 1
    return rules
  }

  static let now = Moment(nanoseconds: 1_000_000_000, chance: 0.5)

  init(hasServer: Bool) {
    machine = GuestMachine(hasServer: hasServer)
    handle(.begin)
  }

  mutating func add(
    _ key: Int, _ origin: GuestMachine<Int>.Origin, _ style: BusStyle, earlier: Earlier = .nothing,
    mode: RestartPolicy.Mode = .onFailure, pause: Milliseconds = 0, fuse: String? = nil, hasWindow: Bool = false
  ) {
    var isInserted = false
    if style == .registers, case .adoptable = earlier { isInserted = true }
    var rules = Self.rules
    rules.restart.mode = mode
    var device = Device(style: style, isSpare: origin == .profile, isInserted: isInserted)
    device.hasWindow = hasWindow
    device.hasState = earlier != .nothing
    switch earlier {
    case .adoptable, .lost: device.frontend = FrontendView(state: .connected, setup: .page(sequence: 2, reference: 9))
    case .nothing, .offered: break
    }
    devices[key] = device
    handle(
      .add(
        key, origin,
        DeviceMachine(
          style, rules, hasWindow: hasWindow, earlier: earlier, spare: device.isSpare ? .empty : nil), after: pause,
        fuse: fuse))
  }

  // MARK: Events

  mutating func handle(_ event: GuestEvent<Int>) {
    for effect in machine.handle(event, at: Self.now) { perform(effect) }
    for (key, device) in devices { check(key, device) }
  }

  mutating func tell(_ key: Int, _ event: DeviceEvent) { handle(.device(key, event)) }

  private mutating func violate(_ words: String) { violations.append(words) }

  private mutating func require(_ condition: Bool, _ words: @autoclosure () -> String) {
    if !condition { violate(words()) }
  }

  /// What holds between two events.
  private mutating func check(_ key: Int, _ device: Device) {
    let isOver = machine.windows == .over || machine.daemonEnd != nil
    require(
      !device.isSpare || machine.moving.isEmpty || isOver || machine[key]?.isEnding == false,
      "the profile's \(key) ends while one of the toolstack's comes again")
    guard let machine = machine[key] else {
      return require(device.backends.isEmpty, "\(key) is gone with \(device.backends)")
    }
    require(device.backends.count <= 1, "\(key) has \(device.backends)")
    require(machine.backend == device.backends.keys.first, "\(machine.service) is not \(device.backends)")
    if case .waiting(.rest(.failed)) = machine.service {
      require(!device.isCorrected, "\(key) has failed and its corrected entry is not followed")
    }
    require(machine.effects.isEmpty, "effects are left")
    require(machine.rules.limits == device.limits, "\(key) keeps to limits that are not the machine's")
    require(device.unjoined == device.backends.count, "\(device.unjoined) backends are not joined, \(device.backends)")
  }

  // MARK: Effects

  private mutating func perform(_ effect: GuestEffect<Int>) {
    switch effect {
    case .device(let key, let effect): perform(effect, key)
    case .startServer: queue.append(.startServer)
    case .leaveServer:
      isHandedOver = true
      queue.append(.leaveServer)
    case .closeServer: queue.append(.closeServer)
    case .releaseMemory: queue.append(.releaseMemory)
    case .joinThread:
      if !queue.isEmpty { violate("the guest's thread is joined with \(queue) left") }
      isThreadJoined = true
    case .scheduleServer(let number, let pause):
      require(pause > 0, "a server is tried again at once")
      timers.insert(number)
    case .forgetState: require(!isHandedOver, "the state of a guest is forgotten that is handed over")
    case .tell, .limit, .reconsider: break
    case .gone:
      require(isThreadJoined && !hasMemory, "gone with thread or memory")
      isGone = true
    case .unexpected(let words): violate(words)
    }
  }

  private mutating func expect(_ key: Int, _ id: BackendID, _ stage: Stage, _ effect: DeviceEffect) {
    let found = devices[key]?.backends[id]
    require(found == stage, "\(effect) of a backend that is \(found, default: "not there")")
  }

  private mutating func perform(_ effect: DeviceEffect, _ key: Int) {
    guard var device = devices[key] else { return violate("\(effect) of no device") }
    defer { devices[key] = device }
    switch effect {
    case .start(let id):
      require(device.backends.isEmpty, "\(id) is started beside \(device.backends)")
      require(!device.hasLostState, "\(id) is started with the state of a place that is another's")
      device.backends[id] = .opening
      device.unjoined += 1
      device.isCorrected = false
      device.isDisplaced = false
      device.hasState = true
      device.openedImage = device.image
    case .stop(let id):
      expect(key, id, .open, effect)
      device.backends[id] = .stopAsked
      queue.append(.unplug(key, id))
    case .join(let id):
      expect(key, id, .finished, effect)
      device.backends[id] = nil
      device.unjoined -= 1
    case .resume(let id): expect(key, id, .open, effect)
    case .adjust(let id, _):
      expect(key, id, .open, effect)
      device.adjusting.insert(id)
    case .insert(let id, _):
      expect(key, id, .open, effect)
      require(!device.isInserted, "inserted twice")
      require(device.openedImage == device.image, "\(effect) of a backend of another image")
      require(
        !device.isFilling && !device.isDisplaced, "\(effect) of an image that nobody has seen, or in another's place")
      queue.append(.insert(key, id))
    case .claim: queue.append(.claim(key))
    case .plug(let id):
      expect(key, id, .open, effect)
      require(device.openedImage == device.image, "\(effect) of a backend of another image")
      require(!device.isFilling, "\(effect) of an image that nobody has seen")
      queue.append(.plug(key, id))
    case .remove: queue.append(.remove(key))
    case .leave: queue.append(.leave(key))
    case .connect(let sequence, _, _): queue.append(.connect(key, sequence: sequence))
    case .disconnect: queue.append(.disconnect(key))
    case .offer: require(!device.isMapped && device.isInserted, "offered while mapped or absent")
    case .writeState(.connected, _):
      require(device.isInserted && (device.style == .registers || device.isMapped), "connected and is not")
    case .writeState(.closed, _): require(!device.isMapped, "closed with pages mapped")
    case .writeState(let state, _):
      require(state == .initWait, "state \(state)")
      require(!device.hasWindow || device.isClaimed, "the guest is let go on while nobody answers its accesses")
    case .writeClosed:
      device.closedWrites += 1
      require(device.closedWrites == 1, "closed is written again")
      expectNothingLeft(key, device)
    case .schedule(let timer, let pause):
      require(pause > 0, "\(timer) without a pause")
      device.timers.insert(timer)
    case .watchDrain(let number): device.drains.insert(number)
    case .tell(.deviceGone, _):
      device.gone += 1
      require(device.gone == 1, "gone again")
    case .limit(let limits, _): device.limits = limits
    case .assign(let image):
      device.isFilling = true
      device.image = image
    case .empty:
      device.isFilling = false
      device.image = nil
    case .forgetState:
      // One whose backend may save it again is forgotten again.
      let isAgain = machine[key]?.owesForgetting == true
      require(device.backends.isEmpty || isAgain, "forgotten with \(device.backends)")
      if !isAgain { (device.hasState, device.hasLostState) = (false, false) }
    case .removeTraces:
      require(device.backends.isEmpty && !device.isMapped, "traces are removed while there is \(device)")
      queue.append(.removeTraces(key))
    case .tell, .forgive, .needReset, .writeConfiguration, .publishConfiguration, .acknowledge, .writeError,
      .removeEntry,
      .lookAgain, .forgetAssignment:
      break
    case .saveAssignment: device.isFilling = false
    case .readFrontend: device.isReading = true
    case .retryBus, .leaving, .released: violate("\(effect) is for the guest's machine")
    case .unexpected(let words): violate(words)
    }
  }

  /// State 6 lets the toolstack destroy the guest.
  private mutating func expectNothingLeft(_ key: Int, _ device: Device) {
    require(device.backends.isEmpty && !device.isInserted && !device.isMapped, "closed is written while \(device)")
    let isLast = machine.members.allSatisfy { $0.machine.isEnding }
    require(!isLast || !hasMemory, "closed is written of the last device while the guest's memory is mapped")
  }

  /// Not while a backend may touch it: one that is behind the transport is quiet by then, one that has been taken off is not.
  private mutating func withdraw(_ key: Int, isReset: Bool) {
    for (id, stage) in devices[key]?.backends ?? [:] {
      switch stage {
      case .opening, .finished: break
      case .closing: violate("memory is withdrawn while \(id) is being closed")
      case .open, .stopAsked: require(isReset, "memory is withdrawn while \(id) is at work")
      }
    }
  }

  // MARK: The guest's thread

  enum Outcome: Hashable {
    case good
    case bad
    case noRoom
  }

  /// Does the first operation of the guest's thread and reports it.
  mutating func work(_ outcome: Outcome) {
    let operation = queue.removeFirst()
    require(!isThreadJoined, "\(operation) on a thread that is joined")
    switch operation {
    case .startServer:
      require(!hasServer, "a second server")
      hasServer = outcome == .good
      handle(outcome == .good ? .serverStarted : .serverFailed("no server"))
    case .leaveServer:
      hasServer = false
      for (key, device) in devices {
        require(!device.isInOthersPlace, "the guest finds \(key) in a place that is another's")
      }
    case .claim(let key):
      if outcome == .good, hasServer { devices[key]?.isClaimed = true }
      tell(key, .claimed(outcome == .good && hasServer ? nil : "no room"))
    case .releaseMemory:
      for (key, device) in devices where machine[key]?.isReleased ?? true {
        require(device.backends.isEmpty, "memory is released while \(key) has \(device.backends)")
      }
      if devices.values.allSatisfy({ $0.backends.isEmpty }) { hasMemory = false }
      handle(.memoryReleased)
    case .removeTraces(let key): tell(key, .cleared)
    case .closeServer:
      for (key, device) in devices {
        require(
          !isHandedOver || !device.hasLostState, "\(key) is left to the next daemon in a place that is another's")
        require(device.backends.isEmpty, "memory is withdrawn while \(key) has \(device.backends)")
        require(!device.isMapped, "\(key) is mapped when the guest's memory goes")
        require(isHandedOver || !device.isInserted, "\(key) is in its place when the server goes")
      }
      require(
        isHandedOver || machine.windows == .over || !devices.values.contains { $0.isClaimed },
        "the server goes while the guest runs that looks for its devices")
      hasServer = false
      hasMemory = false
      handle(.serverClosed)
    case .insert(let key, let id):
      if outcome == .good {
        devices[key]?.isInserted = true
        if devices[key]?.hasWindow == true { devices[key]?.isClaimed = true }
        devices[key]?.behindTransport = id
        hasMemory = true
      }
      tell(key, outcome == .good ? .plugged(id, .absent) : .insertFailed(id, "no room"))
    case .plug(let key, let id):
      require(devices[key]?.isInserted == true, "plugged where no transport is")
      devices[key]?.behindTransport = id
      tell(key, .plugged(id, outcome == .good ? .live : .broken("")))
    case .unplug(let key, let id):
      if devices[key]?.behindTransport == id { devices[key]?.behindTransport = nil }
      let stage = devices[key]?.backends[id]
      require(stage == .stopAsked, "\(id) is unplugged as \(stage, default: "nobody")")
      devices[key]?.backends[id] = .closing
    case .remove(let key):
      // No driver has found a device that makes way for another.
      if devices[key]?.isInOthersPlace == false { withdraw(key, isReset: true) }
      devices[key]?.behindTransport = nil
      devices[key]?.isInserted = false
      devices[key]?.isInOthersPlace = false
      devices[key]?.isMapped = false
      tell(key, .removed)
    case .leave(let key):
      withdraw(key, isReset: false)
      devices[key]?.isMapped = false
      tell(key, .removed)
    case .connect(let key, let sequence):
      require(devices[key]?.isMapped == false, "connected twice")
      devices[key]?.isMapped = outcome == .good
      let result: DeviceEvent.ConnectResult =
        switch outcome {
        case .good: .connected
        case .bad: .refused("bad")
        case .noRoom: .noRoom("full")
        }
      tell(key, .connected(sequence: sequence, result))
    case .disconnect(let key):
      withdraw(key, isReset: true)
      devices[key]?.isMapped = false
      tell(key, .disconnected)
    }
  }
}
