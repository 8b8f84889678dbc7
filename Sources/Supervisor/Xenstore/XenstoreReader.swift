import EventLoop
import Lifecycle
import Xen

/// The one place that reads Xenstore, and has the connection and its watches. Confined to the supervisor's loop, which may block for as
/// long as xenstored takes.
///
/// Functions that throw do so when xenstored does not answer: nothing may follow from that.
final class XenstoreReader {
  /// What a watch tells: something below this may have changed.
  enum Change: Hashable {
    case entry(DeviceKey)
    /// Any entry of a kind.
    case kind(DeviceKey.Kind)
    /// A domain is gone.
    case domainGone
    case domainAppeared
    case name(DomainID)
    /// A device's frontend; nil for any.
    case frontend(DomainID, DeviceKey.Kind?, device: UInt32?)
  }

  private static let releaseWatch = "@releaseDomain"
  private static let introduceWatch = "@introduceDomain"
  private static let nameToken = "name:"
  private static let frontendToken = "frontends:"

  private let socketPath: String?
  private(set) var connection: XenStore?
  /// Whether this is not dom0: guests are reached over Xenbus only, and their entries are removed here.
  private(set) var isDriverDomain = false
  /// Domains whose names are watched, and directories of frontends, with how many guests need them.
  private var names: Set<DomainID> = []
  private var folders: [String: Int] = [:]

  /// - Parameter socketPath: of a simulated xenstored; nil for the real one.
  init(socketPath: String?) { self.socketPath = socketPath }

  // MARK: Connection

  /// Connects, and sets every watch that is wanted. The first events of the watches say what is there already.
  ///
  /// - Parameter note: told that a watch cannot be had which the domain may do without.
  func connect(note: (String) -> Void) throws(XenError) {
    let xenstore = try XenStore(socketPath: socketPath)
    isDriverDomain = (xenstore.read("domid") ?? "0") != "0"
    for kind in DeviceKey.Kind.watched { try xenstore.watch("backend/\(kind.rawValue)", token: kind.rawValue) }
    do throws(XenError) {
      try xenstore.watch(Self.releaseWatch, token: Self.releaseWatch)
      if !isDriverDomain { try xenstore.watch(Self.introduceWatch, token: Self.introduceWatch) }
    } catch {
      // A driver domain may not watch it before Xen 4.22; it learns of a death by its devices' nodes.
      note("no watch on @releaseDomain: \(error)")
    }
    // Of a guest that a driver domain may not see, nothing comes.
    for domain in names { try? xenstore.watch(Self.namePath(domain), token: "\(Self.nameToken)\(domain)") }
    for folder in folders.keys { try xenstore.watch("/" + folder, token: Self.frontendToken + folder) }
    connection = xenstore
  }

  func disconnect() { connection = nil }

  var isAlive: Bool { connection?.isAlive == true }
  var watchCount: Int { connection?.watchCount ?? 0 }

  // MARK: Watches

  func watch(name domain: DomainID) {
    guard names.insert(domain).inserted else { return }
    try? connection?.watch(Self.namePath(domain), token: "\(Self.nameToken)\(domain)")
  }

  func unwatch(name domain: DomainID) {
    guard names.remove(domain) != nil else { return }
    connection?.unwatch(Self.namePath(domain), token: "\(Self.nameToken)\(domain)")
  }

  func watch(frontends folder: String) {
    folders[folder, default: 0] += 1
    guard folders[folder] == 1 else { return }
    try? connection?.watch("/" + folder, token: Self.frontendToken + folder)
  }

  func unwatch(frontends folder: String) {
    guard let count = folders[folder] else { return }
    folders[folder] = count > 1 ? count - 1 : nil
    if count == 1 { connection?.unwatch("/" + folder, token: Self.frontendToken + folder) }
  }

  /// Takes every event that is there, merged.
  func changes() -> Set<Change> {
    var changes: Set<Change> = []
    while let event = connection?.nextEvent() {
      if let change = Self.change(event.token, path: event.path) { changes.insert(change) }
    }
    return changes
  }

  private static func change(_ token: String, path: String) -> Change? {
    if token == releaseWatch { return .domainGone }
    if token == introduceWatch { return .domainAppeared }
    if token.hasPrefix(nameToken) { return DomainID(token.dropFirst(nameToken.count)).map { .name($0) } }
    if token.hasPrefix(frontendToken) { return frontend(path: path) }
    guard let kind = DeviceKey.Kind(rawValue: token) else { return nil }
    return key(kind, path: path).map { .entry($0) } ?? .kind(kind)
  }

  /// The device that a changed path belongs to: backend/KIND/DOMAIN/DEVICE/...; nil for a path above that.
  static func key(_ kind: DeviceKey.Kind, path: String) -> DeviceKey? {
    let parts = path.split(separator: "/", omittingEmptySubsequences: false)
    guard parts.count >= 4, let domain = DomainID(parts[2]), let device = UInt32(parts[3]) else { return nil }
    return DeviceKey(kind: kind, domain: domain, device: device)
  }

  /// The devices that a changed path of a frontend belongs to: /local/domain/FE/device/KIND/DEVICE/..., or one above.
  private static func frontend(path: String) -> Change? {
    let parts = path.split(separator: "/")
    guard parts.count >= 3, let domain = DomainID(parts[2]) else { return nil }
    let kind = parts.count >= 5 ? DeviceKey.Kind(rawValue: String(parts[4])) : nil
    return .frontend(domain, kind, device: parts.count >= 6 ? UInt32(parts[5]) : nil)
  }

  // MARK: Entries

  /// Devices of a kind that have an entry; of one domain, or of all.
  func keys(_ kind: DeviceKey.Kind, of domain: DomainID? = nil) -> Set<DeviceKey> {
    var keys: Set<DeviceKey> = []
    let root = "backend/\(kind.rawValue)"
    let domains = domain.map { [$0] } ?? (connection?.list(root) ?? []).compactMap { DomainID($0) }
    for domain in domains {
      for device in connection?.list("\(root)/\(domain)") ?? [] {
        if let device = UInt32(device) { keys.insert(DeviceKey(kind: kind, domain: domain, device: device)) }
      }
    }
    return keys
  }

  /// All nodes of an entry as of one moment; nil when there is none.
  func nodes(_ key: DeviceKey) throws(XenError) -> [String: String]? {
    let xenstore = try connected()
    let nodes = try xenstore.transaction { transaction throws(XenError) -> [String: String]? in
      guard let names = try xenstore.listIfThere(key.path, in: transaction) else { return nil }
      var nodes: [String: String] = [:]
      for name in names { nodes[name] = try xenstore.readIfThere("\(key.path)/\(name)", in: transaction) }
      return nodes
    }
    return nodes?.isEmpty == true ? nil : nodes
  }

  /// The nodes of an entry of which only those that tell its progress may have changed: most events are echoes of states that were
  /// written here, and a host with hundreds of devices has many.
  ///
  /// - Parameter known: the other nodes.
  func progress(_ key: DeviceKey, of known: [String: String]) throws(XenError) -> [String: String]? {
    let xenstore = try connected()
    guard let state = try xenstore.readIfThere("\(key.path)/state") else { return try nodes(key) }
    var nodes = known
    nodes["state"] = state
    nodes["online"] = try xenstore.readIfThere("\(key.path)/online")
    return nodes
  }

  func node(_ key: DeviceKey, _ name: String) -> String? { connection?.read("\(key.path)/\(name)") }

  /// A toolstack that died halfway leaves entries behind whose guest is no more: the frontend's directory is gone then, or belongs
  /// to another backend.
  func hasFrontend(
    _ key: DeviceKey, _ nodes: [String: String], in transaction: UInt32 = 0
  ) throws(XenError) -> Bool {
    // Who parses the entry names a node that is missing or wrong.
    guard let frontend = nodes["frontend"], frontend.hasPrefix("/") else { return true }
    guard let backend = try connected().readIfVisible("\(frontend)/backend", in: transaction) else { return false }
    return backend.hasSuffix("/" + key.path)
  }

  // MARK: Frontends

  /// What a Xenbus frontend says; nil when it is gone.
  func view(frontend: String) throws(XenError) -> FrontendView? {
    let xenstore = try connected()
    guard let state = try xenstore.readIfVisible("\(frontend)/state").map({ XenbusState(rawValue: $0) }) else {
      return nil
    }
    guard state?.isSetUp == true else { return FrontendView(state: state) }
    return FrontendView(
      state: state, setup: FrontendView.Setup(xenstore.read("\(frontend)/vx-setup")),
      write: xenstore.read("\(frontend)/vx-cfgw").flatMap { FrontendView.ConfigurationWrite($0) })
  }

  func state(frontend: String) -> XenbusState? {
    connection?.read("\(frontend)/state").flatMap(XenbusState.init(rawValue:))
  }

  // MARK: Domains

  private static func namePath(_ domain: DomainID) -> String { "/local/domain/\(domain)/name" }

  func name(_ domain: DomainID) -> String? { connection?.read(Self.namePath(domain)) }

  /// Whether a domain has a name, that is: whether it is there.
  func isThere(_ domain: DomainID) throws(XenError) -> Bool {
    try connected().readIfThere(Self.namePath(domain)) != nil
  }

  func uuid(_ domain: DomainID) -> String? {
    connection?.read("/local/domain/\(domain)/vm").map { $0.split(separator: "/").last.map(String.init) ?? $0 }
  }

  /// When libxl started the domain (xen: tools/libs/light, libxl_create.c, "start_time"); nil where nobody says.
  func started(_ domain: DomainID) -> String? {
    guard let vm = connection?.read("/local/domain/\(domain)/vm"), vm.hasPrefix("/vm/") else { return nil }
    return connection?.read("\(vm)/start_time")
  }

  /// The guest's UUID as dom0 wrote it into an entry (`vxctl attach`, `vxctl identify`): a driver domain may not see the guest's own nodes.
  func uuid(_ key: DeviceKey) -> String? {
    guard isDriverDomain, let text = node(key, "vx-uuid"), text.utf8.count <= 64, !text.isEmpty else { return nil }
    return text
  }

  /// What dom0 wrote into any of a guest's entries: one says whose all of them are.
  func writtenUUID(_ domain: DomainID) -> String? {
    guard isDriverDomain else { return nil }
    for kind in DeviceKey.Kind.watched {
      for key in keys(kind, of: domain).sorted(by: { $0.device < $1.device }) {
        if let uuid = uuid(key) { return uuid }
      }
    }
    return nil
  }

  var domains: [DomainID] {
    (connection?.list("/local/domain") ?? []).compactMap { DomainID($0) }.filter { $0 != 0 }
  }

  /// What decides how a guest's devices are reached.
  func facts(_ domain: DomainID) -> GuestFacts {
    GuestFacts(
      domain: domain, isDriverDomain: isDriverDomain, type: connection?.read("/libxl/\(domain)/type"))
  }

  private func connected() throws(XenError) -> XenStore {
    guard let connection else { throw XenError("xenstored is not there", Errno(107) /* ENOTCONN */) }
    return connection
  }
}
