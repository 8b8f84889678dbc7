import DeviceHost
import Devices
import EventLoop
import Lifecycle
import Logging
import Xen

/// Who is to be there: follows Xenstore's entries, the profiles, and what an earlier daemon left, and tells the guests' machines. Confined to
/// the supervisor's loop.
final class Population {
  private let hypervisor: any Hypervisor
  private let settings: SupervisorSettings
  private let reader: XenstoreReader
  private let writer: XenstoreWriter
  private let table: GuestTable
  private let log: Logger
  private let grantBudget: GrantBudget
  /// Kinds of devices whose entries have been looked at since the start.
  private var seenKinds: Set<DeviceKey.Kind> = []
  private var hasSwept = false
  /// Devices whose guest could not be reached; they are tried again (`tryAgain`).
  private var unreached: Set<DeviceKey> = []

  init(
    _ hypervisor: any Hypervisor, _ settings: SupervisorSettings, _ reader: XenstoreReader, _ writer: XenstoreWriter,
    _ table: GuestTable, _ log: Logger
  ) {
    self.hypervisor = hypervisor
    self.settings = settings
    self.reader = reader
    self.writer = writer
    self.table = table
    self.log = log
    grantBudget = GrantBudget(limit: settings.grantBudget)
  }

  private var entries: EntryMaker { table.runner.entries }

  // MARK: Events

  /// Brings everything in line that may have changed.
  func follow(_ changes: Set<XenstoreReader.Change>, for supervisor: Supervisor) {
    var keys: Set<DeviceKey> = []
    var frontends: Set<DeviceKey> = []
    for change in changes {
      switch change {
      case .entry(let key): keys.insert(key)
      case .kind(let kind):
        keys.formUnion(reader.keys(kind).union(knownKeys { $0.kind == kind }))
        seenKinds.insert(kind)
      case .domainGone: keys.formUnion(knownKeys(where: \.kind.isInXenstore))
      case .name(let domain): rename(domain)
      case .frontend(let domain, let kind, let device):
        frontends.formUnion(
          knownKeys {
            $0.domain == domain && (kind == nil || $0.kind == kind) && (device == nil || $0.device == device)
          })
      case .domainAppeared: break
      }
    }
    // Lower numbers first: disks get their slots in their order.
    for key in keys.sorted(by: { ($0.domain, $0.device) < ($1.domain, $1.device) }) {
      reconcile(key, for: supervisor)
    }
    for key in frontends { if let event = table.view(key) { tell(key, event, supervisor) } }
    // A new domain has its devices by now, or none: who has none is found here.
    if changes.contains(.domainAppeared) { findGuests(supervisor) }
    if changes.contains(.domainGone) { closeOrphans(supervisor) }
    guard !hasSwept, seenKinds.count == DeviceKey.Kind.watched.count else { return }
    hasSwept = true
    findGuests(supervisor)
    sweepSavedState(supervisor)
    removeOrphans(supervisor)
  }

  private func knownKeys(where isMeant: (DeviceKey) -> Bool) -> Set<DeviceKey> {
    // One that has ended to begin anew elsewhere is known too: should its entry have gone meanwhile, that must be seen.
    Set(table.guests.values.flatMap { $0.machine.moving.union($0.devices.keys) }.filter(isMeant))
  }

  /// The guest was renamed, or its name is looked at for the first time.
  private func rename(_ domain: DomainID) {
    guard let guest = table.guests[domain], let name = reader.name(domain), name != guest.name else { return }
    let old = guest.name
    guest.name = name
    table.herald.tell(.guestRenamed, guest, reason: "it was '\(old)'")
    table.updateBoard(guest)
  }

  // MARK: Entries

  /// Brings one device in line with its entry. May be called at any time, for the same device again and again.
  func reconcile(_ key: DeviceKey, for supervisor: Supervisor) {
    unreached.remove(key)
    // Before anything is made of the entry, which may be another device's than the one that the guest is known by.
    if let guest = table.guests[key.domain], guest.uuid == nil, let uuid = reader.uuid(key) {
      identify(guest, uuid, for: supervisor)
    }
    let known = table.known(key)
    let nodes: [String: String]?
    let hasFrontend: Bool
    do throws(XenError) {
      // The description of a device at work is looked at when something has failed.
      if let (guest, device) = known, guest.machine[key]?.phase.isWell == true {
        nodes = try reader.progress(key, of: device.nodes)
      } else {
        nodes = try reader.nodes(key)
      }
      hasFrontend = try nodes.map { nodes throws(XenError) in try reader.hasFrontend(key, nodes) } ?? false
    } catch {
      // Nothing follows from an answer that did not come: a xenstored that is gone takes no device with it.
      return log.warning("cannot read \(key.path): \(error)")
    }
    let action = Reconciler.action(
      nodes.map { Reconciler.Entry(nodes: $0, hasFrontend: hasFrontend) },
      known.map { guest, device in
        Reconciler.Known(
          isEnding: guest.machine[key]?.isEnding ?? true,
          description: Reconciler.Entry.description(device.nodes))
      }, style(of: key, nodes ?? [:]))
    if action != .open, known == nil, table.guests[key.domain]?.machine.moving.contains(key) == true {
      table.handle(.absent(key), of: key.domain, for: supervisor)
    }
    switch action {
    case .nothing: break
    case .open: if let nodes { open(key, nodes, for: supervisor) }
    case .tell(let change):
      guard change == .corrected, let nodes, let (guest, device) = known else {
        return tell(key, .entry(change), supervisor)
      }
      device.nodes = nodes
      // What the guest does not know yet may be reached otherwise than it was said first.
      let moves =
        guest.machine[key]?.connection == .absent
        && guest.buses.moves(wish(key, nodes, facts(key.domain)), from: device.bus)
      tell(key, .entry(moves ? .moved : .corrected), supervisor)
    case .sayClosed:
      writer.writeClosed(key)
      supervisor.onLoop { $0.removeEntryLater(key) }
    }
  }

  private func style(of key: DeviceKey, _ nodes: [String: String]) -> BusStyle {
    if let device = table.known(key)?.1 { return type(of: device.bus).style }
    let facts = facts(key.domain)
    return settings.bus(facts, wish(key, nodes, facts))?.style ?? .registers
  }

  private func wish(_ key: DeviceKey, _ nodes: [String: String], _ facts: GuestFacts) -> DeviceWish {
    let guest = table.guests[key.domain]
    return entries.wish(
      key, nodes, guest: guest?.profileName ?? reader.name(key.domain) ?? "",
      uuid: guest?.uuid ?? reader.uuid(key.domain) ?? reader.writtenUUID(key.domain), else: facts.transport)
  }

  private func tell(_ key: DeviceKey, _ event: DeviceEvent, _ supervisor: Supervisor) {
    table.handle(.device(key, event), of: key.domain, for: supervisor)
  }

  private func open(_ key: DeviceKey, _ nodes: [String: String], for supervisor: Supervisor) {
    do throws(XenError) {
      let facts = facts(key.domain)
      let wish = wish(key, nodes, facts)
      guard settings.bus(facts, wish) != nil else { throw GuestBuses.isNotServed(facts, wish) }
      let guest = try guest(key.domain, supervisor)
      try add(key, nodes, .toolstack, to: guest, for: supervisor)
    } catch {
      unreached.insert(key)
      let reason = "frontend-id: the guest cannot be reached: \(error)"
      guard nodes["error"] != reason else { return }
      table.herald.tellUnreachable(key.domain, reason)
      writer.write(key, "error", reason)
    }
  }

  /// Looks again at devices whose guests could not be reached, as when vxd had no file descriptor or no memory left.
  func tryAgain(for supervisor: Supervisor) {
    for key in unreached.sorted(by: { ($0.domain, $0.device) < ($1.domain, $1.device) }) {
      reconcile(key, for: supervisor)
    }
  }

  private func add(
    _ key: DeviceKey, _ nodes: [String: String], _ origin: GuestMachine<DeviceKey>.Origin, to guest: Guest,
    for supervisor: Supervisor
  ) throws(XenError) {
    // While a guest ends, its entries wait; they are looked at again when it is gone.
    guard guest.machine.acceptsDevices, guest.devices[key] == nil else { return }
    let wish = wish(key, nodes, facts(guest.domain))
    let bus = try guest.buses.bus(for: key, wish)
    let device = Device(key, on: bus, by: wish, nodes, rate: RateNode(parent: guest.rate))
    let frontend = nodes["frontend"].flatMap { reader.state(frontend: $0) }
    let (earlier, state) = guest.buses.earlier(key, on: bus, nodes, frontend: frontend)
    device.state = state
    guest.devices[key] = device
    var rules = DeviceRules()
    rules.faultLimit = settings.faultLimit
    rules.startRetry = settings.startRetry
    let machine = DeviceMachine(
      type(of: bus).style, rules, needsServer: type(of: bus).hasServer,
      hasWindow: type(of: bus).hasWindow(wish), earlier: earlier, spare: entries.spare(key),
      numbersAfter: table.newNumbers())
    // A device whose guest waits for it is not slowed.
    let pause = earlier == .nothing ? table.herald.churn.pause(for: key, at: .now) : 0
    let fuse = settings.crashes?.reason(for: key)
    table.handle(.add(key, origin, machine, after: pause, fuse: fuse), of: guest.domain, for: supervisor)
  }

  // MARK: Guests

  /// Dom0 has said who a guest is. Its profile holds from now on: limits and restart policies at once, the rest for devices that are opened
  /// from then on. A device that was offered keeps the form in which its driver may know it; one that failed is tried again.
  private func identify(_ guest: Guest, _ uuid: String, for supervisor: Supervisor) {
    guest.uuid = uuid
    log.notice("guest \(guest.name): its UUID is \(uuid)", metadata: ["GUEST": "\(guest.name)"])
    let domain = guest.domain
    supervisor.onLoop { $0.follow(domain) }
    for device in guest.devices.values.sorted(by: { $0.key.device < $1.key.device }) {
      guard case .failed = guest.machine[device.key]?.phase else { continue }
      tell(device.key, .entry(.corrected), supervisor)
    }
  }

  /// What of a guest decides how it has its devices. It keeps what it began with: another profile is for its next life.
  private func facts(_ domain: DomainID) -> GuestFacts {
    var facts = reader.facts(domain)
    let uuid = reader.uuid(domain)
    facts.started = reader.started(domain)
    if let saved = settings.stateFolder?.guest(domain), saved.isOf(uuid: uuid, started: facts.started) {
      facts.transport = saved.transport
    } else {
      facts.transport = entries.profiles.options(guest: reader.name(domain) ?? "", uuid: uuid).transport
    }
    return facts
  }

  /// The guest of a domain, made when its first device appears.
  private func guest(_ domain: DomainID, _ supervisor: Supervisor) throws(XenError) -> Guest {
    if let known = table.guests[domain] { return known }
    let host = BusHost(
      hypervisor: hypervisor, settings: settings, grantBudget: grantBudget,
      report: { report in supervisor.onLoop { $0.heard(report) } })
    let facts = facts(domain)
    let buses = try GuestBuses(facts, host)
    let uuid = reader.uuid(domain) ?? reader.writtenUUID(domain)
    let saved = settings.stateFolder?.guest(domain).flatMap { $0.isOf(uuid: uuid, started: facts.started) ? $0 : nil }
    let lost: [(DeviceKey, String)]
    do throws(XenError) {
      // Before there is a guest: one whose server cannot be reached now is not taken for one that has none.
      lost = try settings.stateFolder.map { folder throws(XenError) in try buses.restore(folder, uuid: uuid) } ?? []
    } catch {
      buses.thread.stopAndJoin()
      throw error
    }
    let guest = Guest(
      domain, name: reader.name(domain) ?? Supervisor.placeholder(domain),
      uuid: uuid, buses: buses, saved: saved, rate: RateNode(parent: table.rate),
      numbersAfter: table.newNumbers(), retry: settings.startRetry)
    if guest.profileName.isEmpty, guest.uuid == nil, entries.profiles.namesNumbers {
      log.warning(
        """
        guest \(guest.name): profiles for 'domain-N' do not apply, because that number may belong to another guest after a reboot; use \
        the guest's UUID, and run 'vxctl identify' in dom0
        """, metadata: ["GUEST": "\(guest.name)"])
    }
    table.insert(guest)
    let limits = entries.profiles.options(guest: guest.profileName, uuid: guest.uuid).limits
    table.handle(.limit(limits), of: domain, for: supervisor)
    tellOfRestored(guest, lost)
    table.handle(.begin, of: domain, for: supervisor)
    addDeclared(guest, supervisor)
    reader.watch(name: domain)
    table.countWatches()
    return guest
  }

  private func tellOfRestored(_ guest: Guest, _ lost: [(DeviceKey, String)]) {
    for (key, reason) in lost {
      log.error("guest \(guest.name), device \(key.device): \(reason)", metadata: ["GUEST": "\(guest.name)"])
    }
    let count = guest.buses.unclaimed.count
    guard count + lost.count > 0 else { return }
    log.notice(
      "guest \(guest.name): \(count) devices of an earlier vxd are resumed",
      metadata: ["GUEST": "\(guest.name)"])
  }

  /// Makes a guest's spares and declared devices, those of an earlier daemon included.
  private func addDeclared(_ guest: Guest, _ supervisor: Supervisor) {
    // Of a guest that is no more, only the traces are looked after.
    guard reader.name(guest.domain) != nil else { return }
    let kept = guest.buses.unclaimed.map(\.key).filter { $0.kind == .spare }.sorted { $0.device < $1.device }
    let keys = Reconciler.additions(
      wanted: entries.declared(guest), kept: kept, known: Set(guest.devices.keys))
    for key in keys {
      do throws(XenError) {
        try add(key, [:], .profile, to: guest, for: supervisor)
      } catch {
        log.error(
          "guest \(guest.name), \(key.kind.rawValue) \(key.device): \(error)", metadata: ["GUEST": "\(guest.name)"])
      }
    }
  }

  /// Looks for guests whose profile declares devices: a guest's name is there when xenstored is told of it.
  private func findGuests(_ supervisor: Supervisor) {
    guard !reader.isDriverDomain, entries.profiles.declaresDevices else { return }
    let domains = reader.domains.map { domain in (domain: domain, declares: declaresDevices(domain)) }
    let found = Reconciler.guests(domains: domains, known: table.guests.keys.map { ($0, false) })
    for domain in found.appear {
      do throws(XenError) {
        _ = try guest(domain, supervisor)
      } catch {
        log.error("guest \(reader.name(domain) ?? "\(domain)"): its declared devices cannot be served: \(error)")
      }
    }
  }

  private func declaresDevices(_ domain: DomainID) -> Bool {
    guard table.guests[domain] == nil, let name = reader.name(domain) else { return false }
    return entries.profiles.options(guest: name, uuid: reader.uuid(domain)).devices.contains(where: \.isCreated)
  }

  /// Ends the declared devices of guests that are no more.
  private func closeOrphans(_ supervisor: Supervisor) {
    for domain in table.guests.keys.sorted() where (try? reader.isThere(domain)) == false {
      table.handle(.domainGone, of: domain, for: supervisor)
    }
  }

  // MARK: What an earlier daemon left

  /// Ends what no entry in Xenstore speaks of any more.
  private func sweepSavedState(_ supervisor: Supervisor) {
    guard let folder = settings.stateFolder else { return }
    // Of guests that are there and cannot be reached now: their devices are tried again, and find it.
    var kept = Set(unreached.map(\.domain))
    for domain in folder.contents.guests where table.guests[domain] == nil && !kept.contains(domain) {
      do throws(XenError) {
        _ = try guest(domain, supervisor)
        guard reader.name(domain) != nil else {
          log.notice("domain \(domain): an earlier vxd left an ioreq server of a guest that is gone")
          table.handle(.domainGone, of: domain, for: supervisor)
          continue
        }
        // It stays where the guest looks for devices that are not there any more.
        table.handle(.settle, of: domain, for: supervisor)
      } catch {
        if reader.name(domain) == nil { folder.forgetAll(domain) } else { kept.insert(domain) }
      }
    }
    for guest in table.guests.values {
      for (key, bus) in guest.buses.unclaimed {
        folder.forget(key)
        table.runner.discard(key, on: bus, of: guest)
      }
    }
    for key in folder.contents.devices where table.known(key) == nil && !kept.contains(key.domain) {
      folder.forget(key)
    }
  }

  /// What devices of guests that are no more have left on the host. Other programs may have to be waited for. A domain's number does not
  /// come again before 32 thousand others, so that no guest can have appeared under one that had no guest a moment ago.
  private func removeOrphans(_ supervisor: Supervisor) {
    let (types, alive) = (settings.types, Set(table.guests.keys))
    table.runner.aside("vxd-sweep", for: supervisor) {
      for type in types { type.removeOrphans { !alive.contains($0) } }
    }
  }

  // MARK: Entries that nobody else removes

  /// The toolstack of another domain leaves the removal of an entry to its backend's domain. So does libxl before 4.18 in dom0 with
  /// generic devices, which it does not know.
  func removesEntry(_ key: DeviceKey) -> Bool {
    key.kind.isInXenstore && (reader.isDriverDomain || key.kind == .generic)
  }

  /// - Returns: whether it is to be tried again: the toolstack is not done with the guest.
  func removeEntry(_ key: DeviceKey) -> Bool {
    guard table.known(key) == nil, reader.connection != nil else { return false }
    if reader.isDriverDomain {
      let isOver = reader.node(key, "online") == "0" && reader.node(key, "state") == XenbusState.closed.rawValue
      if isOver { writer.remove(key) }
      return false
    }
    guard reader.name(key.domain) != nil else {
      writer.remove(key)
      return false
    }
    return reader.node(key, "frontend") != nil
  }
}
