import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Synchronization
import Transport
import Virtqueue
import Xen

/// Devices over Xenbus (deploy/guest-module/PROTOCOL.md): grants reach the guest's memory, event channels its driver, and Xenstore holds the
/// handshake. For devices of PV and PVH guests that have no address in the guest, and for every guest of a driver domain, which has
/// no rights over its guests.
final class XenbusBus: GuestBus {
  static let name = "xenbus"
  static let style = BusStyle.handshake
  static let hasServer = false
  /// The guest's module does without indirect descriptors from this size on, since large requests do not fill such a ring.
  static let diskQueueSize: UInt16 = 1024
  /// What the module's driver keeps to, SEG_MAX with header and status: the journals of larger ones would fill /run.
  static let longestDiskChain: Int? = BlockConfiguration.segmentsMaximum + 2
  static let hostNodes = ["evtchn", "gntdev"]

  let guestNeeds = "the kernel module virtio_xenbus (deploy/guest-module) and the device's driver"

  /// A device with an address has a driver that looks for registers there.
  static func serves(_ guest: GuestFacts, _ device: DeviceWish) -> Bool {
    device.base == 0 && (guest.isDriverDomain || guest.isParavirtual)
  }

  /// Pages that a guest may take of the budget that all share: twice what its module grants for each queue.
  private static let pagesForEachQueue = 4096

  private struct Seat {
    let pool: GrantPool
    let frontend: String
    var transport: XenbusTransport?
    /// Of the present offer.
    var epoch: UInt32 = 0
    /// What `vx-config` says.
    var published = ""
    /// As an earlier daemon left them.
    var registers: DriverState?

    func offer(_ identity: DeviceIdentity, configurationBytes: Int) -> XenbusOffer {
      XenbusOffer(
        identity: identity,
        maximumPages: UInt32(min(Int(XenbusOffer.maximumPages), identity.queueSizes.count * pagesForEachQueue)),
        configurationBytes: configurationBytes, epoch: epoch)
    }
  }

  private let domain: DomainID
  private let host: BusHost
  private let share: GrantShare
  /// Opened with the first device.
  private let grants = Mutex<(any GrantHandle)?>(nil)
  private let seats = Mutex<[DeviceKey: Seat]>([:])

  init(_ ground: GuestGround) throws(XenError) {
    domain = ground.facts.domain
    host = ground.host
    share = GrantShare(of: host.grantBudget, limit: host.settings.grantShare)
  }

  var facts: [Fact] { [Fact(name: "guest memory", value: "by grants, no privilege needed")] }

  // MARK: Devices

  /// What an earlier daemon served goes on, when the driver is still where that one left it.
  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
    var seat = makeSeat(nodes["frontend"] ?? "")
    defer { seats.withLock { $0[key] = seat } }
    let state = nodes["state"].flatMap(XenbusState.init(rawValue:))
    if let folder = host.settings.stateFolder {
      if state == .connected, frontend?.isSetUp == true,
        let saved = try? DeviceState(path: folder.devicePath(key)), saved.place == .xenbus,
        saved.saved.status.contains(.driverOK)
      {
        seat.registers = saved.saved.registers
        seat.epoch = saved.saved.registers.epoch
        return (.adoptable(.live), saved)
      }
      folder.forget(key)
    }
    if state == .connected, frontend == .connected {
      return (.lost("no saved state for a device in use: the guest must reset the device"), nil)
    }
    if state == .initWait, let epoch = FrontendText.epoch(offer: nodes["vx-offer"]) {
      // An offer that was made, and perhaps answered, before this daemon was there.
      seat.epoch = epoch
      return (.offered, nil)
    }
    return (.nothing, nil)
  }

  private func makeSeat(_ frontend: String) -> Seat { Seat(pool: GrantPool(share: share), frontend: frontend) }

  private func seat(of key: DeviceKey) -> Seat? { seats.withLock { $0[key] } }

  func admit(_ key: DeviceKey, _ entry: DeviceEntry) throws(EntryFault) {
    guard key.kind.isInXenstore else {
      throw EntryFault(
        key.kind == .spare ? "spareDisks" : "devices",
        """
        this guest has no slots in which it could find the device (only HVM guests have them); use 'vxctl attach' while it runs, or on Arm \
        add a line to its configuration: \(key.kind == .spare ? "disk = [ ... ]" : "virtio = [ ... ]" + #" and "create": false here"#)
        """)
    }
    let seat = seat(of: key)
    if let wanted = entry.settings.transport, seat?.transport == nil, seat?.registers == nil {
      throw EntryFault("transport", "expected none, not '\(wanted)': the guest has this device over Xenbus")
    }
    do throws(XenError) {
      try openGrants()
    } catch {
      throw EntryFault("frontend-id", "the guest's grants cannot be used: \(error)")
    }
    // Nothing is there of a device whose entry names another frontend than before: it could not be served.
    if seat?.frontend != entry.frontend, seat?.transport == nil {
      seats.withLock { $0[key] = makeSeat(entry.frontend) }
    }
  }

  private func openGrants() throws(XenError) {
    guard grants.withLock({ $0 == nil }) else { return }
    let opened = try host.hypervisor.openGrants(domain)
    grants.withLock { $0 = opened }
  }

  func vacate(_ key: DeviceKey) {}
  func forget(_ key: DeviceKey) { seats.withLock { $0[key] = nil } }

  func memory(of key: DeviceKey) -> (any GuestMemorySource)? { seat(of: key)?.pool }
  func place(of key: DeviceKey) -> DevicePlace { .xenbus }
  func transport(of key: DeviceKey) -> (any DeviceTransport)? { seat(of: key)?.transport }
  func facts(of key: DeviceKey) -> DeviceFacts {
    guard let seat = seat(of: key) else { return DeviceFacts() }
    let (gauges, channels) = (seat.pool.gauges, seat.transport?.boundChannels)
    let row = Reading.text([
      gauges.access, ", ", .count(gauges.pages.mappedPages), " pages, ", channels.map { .count($0) } ?? "0",
      " event channels",
    ])
    return DeviceFacts(rows: [Fact(name: "grants", value: row)], grants: gauges, channels: channels)
  }
  func frontend(of key: DeviceKey) -> String? { seat(of: key)?.frontend }

  // MARK: The guest

  func insert(
    _ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool, _ here: OnGuestThread
  ) -> BusEvent {
    let report = host.report
    let transport = XenbusTransport(
      // Its driver's state is known by the handshake.
      device: backend, state: backend.state, onStatus: { _ in }, onConfiguration: { report(.configuration(key)) })
    seats.withLock { $0[key]?.transport = transport }
    return .device(key, .plugged(id, Driver(transport.currentStatus)))
  }

  func remove(_ key: DeviceKey) -> @Sendable (OnGuestThread) -> Void { { [self] _ in reset(key) } }

  func leave(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent {
    let seat = seat(of: key)
    seat?.transport?.leave()
    seat?.pool.detach()
    return .device(key, .removed)
  }

  func disconnect(_ key: DeviceKey, _ here: OnGuestThread) -> BusEvent {
    reset(key)
    return .device(key, .disconnected)
  }

  private func reset(_ key: DeviceKey) {
    let seat = seat(of: key)
    seat?.transport?.disconnect()
    seat?.pool.detach()
  }

  func connect(
    _ key: DeviceKey, sequence: UInt32, reference: UInt32, adopts: Bool, _ here: OnGuestThread
  ) -> BusEvent {
    let result: DeviceEvent.ConnectResult
    do throws(ConnectFault) {
      try connect(key, reference, adopts: adopts)
      result = .connected
    } catch {
      switch error {
      case .noRoom(let words): result = .noRoom(words)
      case .setup(let words): result = .refused(words)
      }
    }
    return .device(key, .connected(sequence: sequence, result))
  }

  private func connect(_ key: DeviceKey, _ reference: UInt32, adopts: Bool) throws(ConnectFault) {
    guard let seat = seat(of: key), let transport = seat.transport, let grants = grants.withLock({ $0 }) else {
      throw .setup("the device is not there")
    }
    let offer = seat.offer(transport.identity, configurationBytes: 0)
    let (setup, doorbells) = try XenbusConnection.open(grants, setup: reference, offer: offer, pool: seat.pool)
    if adopts, let saved = seat.registers, !Self.fits(saved, setup) {
      seat.pool.detach()
      throw .setup("the setup page has changed since the device was connected")
    }
    guard transport.accepts(setup.features) else {
      seat.pool.detach()
      throw .setup("the accepted features contradict each other")
    }
    transport.connect(setup, epoch: seat.epoch, doorbells: doorbells, adopts: adopts)
  }

  /// Whether a setup page says what it did when the queues' journals began.
  private static func fits(_ saved: DriverState, _ setup: XenbusSetup) -> Bool {
    guard saved.driverFeatures == setup.features.rawValue, saved.queues.count == setup.queues.count else {
      return false
    }
    return zip(zip(saved.queues, saved.ready), setup.queues).allSatisfy { old, new in
      guard let layout = new?.layout else { return !old.1 }
      return old.1 && old.0.size == layout.size && old.0.descriptorArea == layout.descriptorArea
        && old.0.driverArea == layout.driverArea && old.0.deviceArea == layout.deviceArea
    }
  }

  func write(_ key: DeviceKey, _ write: FrontendView.ConfigurationWrite, _ here: OnGuestThread) {
    seat(of: key)?.transport?.write(offset: write.offset, bytes: write.bytes)
  }

  // MARK: The offer

  func offer(_ key: DeviceKey) -> (offer: String, configuration: String)? {
    guard let transport = seat(of: key)?.transport else { return nil }
    let text = transport.configurationText
    let space = text.split(separator: " ", omittingEmptySubsequences: false).last?.utf8.count ?? 0
    return seats.withLock { seats in
      seats[key]?.epoch = UInt32.random(in: 1...UInt32.max)
      seats[key]?.registers = nil
      seats[key]?.published = text
      return seats[key].map { ($0.offer(transport.identity, configurationBytes: space / 2).text, text) }
    }
  }

  func changedConfiguration(_ key: DeviceKey) -> String? {
    guard let text = seat(of: key)?.transport?.configurationText else { return nil }
    return seats.withLock { seats in
      guard seats[key]?.published != text else { return nil }
      seats[key]?.published = text
      return text
    }
  }
}

extension GrantGauges {
  /// How the guest's memory is reached.
  var access: Reading { .choice(mode, GrantPool.Mode.allCases.map { "\($0.rawValue)" }) }
}
