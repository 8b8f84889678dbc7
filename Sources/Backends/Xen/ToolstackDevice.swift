/// A virtio device in Xenstore as the toolstack sees it, from dom0: made, taken away and given to another backend while the guest runs,
/// for which libxl has no command. What is written is what libxl writes (xen: libxl_disk.c, libxl_virtio.c), so `xl destroy` cleans it
/// up; before libxl 4.18, which does not know the generic kind, vxd does that for its devices.
package struct ToolstackDevice {
  /// What keeps an operation from being done; nothing has been changed then.
  package struct Fault: Error {
    package var message: String
    package var remedy: String?

    package init(_ message: String, remedy: String? = nil) {
      self.message = message
      self.remedy = remedy
    }
  }

  /// libxl's kinds of devices.
  package enum Kind: String, CaseIterable, Sendable {
    case disk = "virtio_disk"
    case generic = "virtio"
  }

  package let xenstore: XenStore
  package let guest: DomainID
  package let kind: Kind
  /// libxl's number of the virtual disk, or of the generic device.
  package let device: UInt32

  package init(_ xenstore: XenStore, guest: DomainID, device: UInt32, kind: Kind = .disk) {
    self.xenstore = xenstore
    self.guest = guest
    self.device = device
    self.kind = kind
  }

  /// By the name that operators use: xvda to xvdp, or net0, console1, rng2.
  package init(_ xenstore: XenStore, guest: DomainID, name: String) throws(Fault) {
    for type in VirtioType.generic where name.hasPrefix(type.prefix) {
      guard let number = UInt32(name.dropFirst(type.prefix.count)), "\(type.prefix)\(number)" == name else {
        continue
      }
      self.init(xenstore, guest: guest, device: number, kind: .generic)
      return
    }
    self.init(xenstore, guest: guest, device: try Self.number(name))
  }

  /// The name that operators use.
  package var name: String {
    guard kind == .generic else { return Self.name(device) }
    let entryType = xenstore.read("\(library)/type")
    return "\(VirtioType.generic.first { $0.entryType == entryType }?.prefix ?? "virtio")\(device)"
  }

  // MARK: Names

  /// A domain by its number or name.
  package static func domain(_ word: String, _ xenstore: XenStore) throws(Fault) -> DomainID {
    let domains = (xenstore.list("/local/domain") ?? []).compactMap { DomainID($0) }
    if let number = DomainID(word) {
      guard domains.contains(number) else {
        throw Fault("there is no domain \(number)", remedy: "'xl list' lists them")
      }
      return number
    }
    let named = domains.filter { xenstore.read("/local/domain/\($0)/name") == word }
    guard let first = named.first else { throw Fault("there is no domain '\(word)'", remedy: "'xl list' lists them") }
    guard named.count == 1 else {
      throw Fault("\(named.count) domains are called '\(word)'", remedy: "use the number of one of them")
    }
    return first
  }

  /// The number of a virtual disk: xvda to xvdp. Linux's Xenbus has no room for the longer numbers behind those.
  package static func number(_ name: String) throws(Fault) -> UInt32 {
    let letters = Array(name.utf8)
    guard letters.count == 4, name.hasPrefix("xvd"), (UInt8(ascii: "a")...UInt8(ascii: "p")).contains(letters[3]) else {
      throw Fault("vdev: expected xvda to xvdp, not '\(name)'")
    }
    return 202 << 8 | UInt32(letters[3] - UInt8(ascii: "a")) << 4
  }

  package static func name(_ number: UInt32) -> String {
    let index = UInt8(truncatingIfNeeded: number >> 4 & 15)
    return "xvd" + String(UnicodeScalar(UInt8(ascii: "a") + index))
  }

  /// The first name that the guest has no disk of.
  package static func free(_ xenstore: XenStore, guest: DomainID) throws(Fault) -> UInt32 {
    let taken = Set(
      ["virtio_disk", "vbd"].flatMap { xenstore.list("/libxl/\(guest)/device/\($0)") ?? [] }.compactMap { UInt32($0) })
    guard let free = (0..<16).map({ 202 << 8 | UInt32($0) << 4 }).first(where: { !taken.contains($0) }) else {
      throw Fault("all names from xvda to xvdp are in use")
    }
    return free
  }

  /// The first number that the guest has no generic device of.
  package static func freeGeneric(_ xenstore: XenStore, guest: DomainID) throws(Fault) -> UInt32 {
    let taken = Set((xenstore.list("/libxl/\(guest)/device/virtio") ?? []).compactMap { UInt32($0) })
    guard let free = (0..<64).first(where: { !taken.contains($0) }) else {
      throw Fault("the guest already has 64 generic virtio devices")
    }
    return free
  }

  /// Every virtio device of every guest.
  package static func all(_ xenstore: XenStore) -> [ToolstackDevice] {
    (xenstore.list("/libxl") ?? []).compactMap { DomainID($0) }.flatMap { guest in
      Kind.allCases.flatMap { kind in
        (xenstore.list("/libxl/\(guest)/device/\(kind.rawValue)") ?? []).compactMap { UInt32($0) }.map {
          ToolstackDevice(xenstore, guest: guest, device: $0, kind: kind)
        }
      }
    }
  }

  // MARK: Paths

  package var library: String { "/libxl/\(guest)/device/\(kind.rawValue)/\(device)" }
  package var frontend: String { "/local/domain/\(guest)/device/\(kind.rawValue)/\(device)" }
  /// The backend's directory, as libxl has it written down.
  package var backend: String? { xenstore.read("\(library)/backend") }
  package var exists: Bool { xenstore.read("\(library)/frontend") != nil }

  private func backend(of domain: DomainID) -> String {
    "/local/domain/\(domain)/backend/\(kind.rawValue)/\(guest)/\(device)"
  }

  // MARK: Changes

  /// Makes the disk's entries, all at once.
  ///
  /// - Parameter target: what the backend's domain calls the image.
  package func create(backend domain: DomainID, target: String, readOnly: Bool) throws(Fault) {
    guard !exists else {
      throw Fault("domain \(guest) already has a disk \(name)", remedy: "choose another name with --device")
    }
    let plain = xenstore.list("/libxl/\(guest)/device/vbd") ?? []
    guard plain.isEmpty else {
      throw Fault(
        "domain \(guest) has plain Xen disks; libxl loses all disks of a guest with both kinds when it reboots",
        remedy: "give the guest only virtio disks")
    }
    let keys = [
      ("frontend", frontend), ("frontend-id", "\(guest)"), ("online", "1"), ("state", "1"), ("params", target),
      ("type", "standalone"), ("specification", "virtio"), ("transport", "mmio"), ("dev", Self.name(device)),
      ("device-type", "disk"), ("mode", readOnly ? "r" : "w"), ("removable", "0"), ("bootable", "1"),
      ("discard-enable", "1"), ("base", "0"), ("irq", "0"),
    ]
    try create(domain, keys)
  }

  /// Makes a generic device's entries, all at once.
  ///
  /// - Parameter options: what libxl has no room for: options as in profiles, JSON.
  package func create(backend domain: DomainID, type: VirtioType, options: String?) throws(Fault) {
    guard !exists else {
      throw Fault("domain \(guest) already has a generic device \(device)", remedy: "choose another name with --device")
    }
    var keys = [
      ("frontend", frontend), ("frontend-id", "\(guest)"), ("online", "1"), ("state", "1"),
      ("type", type.entryType), ("transport", "mmio"), ("base", "0"), ("irq", "0"),
      ("grant_usage", "1"),
    ]
    if let options { keys.append(("vx-options", options)) }
    try create(domain, keys)
  }

  /// The guest's UUID, by which profiles in a driver domain know it: that may not see the guest's own nodes.
  private var identity: [(String, String)] {
    let uuid = xenstore.read("/local/domain/\(guest)/vm").flatMap { $0.split(separator: "/").last.map(String.init) }
    return uuid.map { [("vx-uuid", $0)] } ?? []
  }

  /// Tells the device's backend who the guest is.
  ///
  /// - Returns: the UUID; nil when there is no backend, or no UUID.
  package func identify() throws(Fault) -> String? {
    guard let path = backend, xenstore.read("\(path)/frontend") != nil, let (name, uuid) = identity.first else {
      return nil
    }
    // With the permissions of the folder: the backend's domain owns it, and the guest can read it.
    try change { transaction throws(XenError) in
      try xenstore.write("\(path)/\(name)", uuid, in: transaction)
      try xenstore.write("\(library)/\(name)", uuid, in: transaction)
    }
    return uuid
  }

  private func create(_ domain: DomainID, _ given: [(String, String)]) throws(Fault) {
    let keys = given + identity
    try change { transaction throws(XenError) in
      try writeBackend(domain, keys, transaction)
      try writeFrontend(domain, transaction)
      try xenstore.makeDirectory(library, owner: 0, reader: 0, in: transaction)
      try xenstore.write("\(library)/frontend", frontend, in: transaction)
      try xenstore.write("\(library)/backend", backend(of: domain), in: transaction)
      for (key, value) in keys where key != "frontend" {
        try xenstore.write("\(library)/\(key)", value, in: transaction)
      }
    }
  }

  /// Gives the disk to another backend domain: the driver in the guest finds it anew.
  package func move(to domain: DomainID) throws(Fault) {
    guard let old = backend else { throw Fault("domain \(guest) has no virtio device \(name)") }
    var keys: [(String, String)] = [("frontend", frontend)]
    for name in xenstore.list(library) ?? [] where !["frontend", "backend", "vx-uuid"].contains(name) {
      keys.append((name, xenstore.read("\(library)/\(name)") ?? ""))
    }
    keys += identity
    try change { transaction throws(XenError) in
      if old != backend(of: domain) { try xenstore.remove(old, in: transaction) }
      // Made anew: nodes that are there already would keep the old backend's permissions.
      try xenstore.remove(frontend, in: transaction)
      try writeBackend(domain, keys, transaction)
      try writeFrontend(domain, transaction)
      try xenstore.write("\(library)/backend", backend(of: domain), in: transaction)
    }
  }

  private func writeBackend(_ domain: DomainID, _ keys: [(String, String)], _ transaction: UInt32) throws(XenError) {
    let path = backend(of: domain)
    try xenstore.makeDirectory(path, owner: domain, reader: guest, in: transaction)
    for (key, value) in keys { try xenstore.write("\(path)/\(key)", value, in: transaction) }
    try xenstore.write("\(path)/online", "1", in: transaction)
    try xenstore.write("\(path)/state", "1", in: transaction)
  }

  private func writeFrontend(_ domain: DomainID, _ transaction: UInt32) throws(XenError) {
    try xenstore.makeDirectory(frontend, owner: guest, reader: domain, in: transaction)
    var keys = [("backend-id", "\(domain)"), ("state", "1"), ("trusted", "1"), ("backend", backend(of: domain))]
    if kind == .disk { keys += [("virtual-device", "\(device)"), ("device-type", "disk")] }
    for (key, value) in keys { try xenstore.write("\(frontend)/\(key)", value, in: transaction) }
  }

  /// Asks the driver and the backend to end the disk.
  package func requestEnd() throws(Fault) {
    guard let path = backend else { throw Fault("domain \(guest) has no virtio device \(name)") }
    try change { transaction throws(XenError) in
      guard xenstore.read("\(path)/state", in: transaction) != nil else { return }
      try xenstore.write("\(path)/online", "0", in: transaction)
      try xenstore.write("\(path)/state", "5", in: transaction)
    }
  }

  /// Takes the frontend away: the backend lets go, whatever the driver does.
  package func forceEnd() throws(Fault) {
    try change { transaction throws(XenError) in try xenstore.remove(frontend, in: transaction) }
  }

  /// Whether the backend has given everything back, or is gone.
  package var hasEnded: Bool {
    guard let path = backend, let state = xenstore.read("\(path)/state") else { return true }
    return state == "6"
  }

  /// Removes what is left of the entries.
  package func remove() throws(Fault) {
    let path = backend
    try change { transaction throws(XenError) in
      try xenstore.remove(frontend, in: transaction)
      if let path { try xenstore.remove(path, in: transaction) }
      try xenstore.remove(library, in: transaction)
    }
  }

  private func change(_ body: (UInt32) throws(XenError) -> Void) throws(Fault) {
    do throws(XenError) {
      try xenstore.transaction(body)
    } catch {
      throw Fault("Xenstore cannot be changed: \(error)", remedy: "run this in dom0, as root")
    }
  }

  // MARK: Waiting

  /// Waits until `condition` holds, woken by each change below the disk's nodes.
  ///
  /// - Returns: false when the time is over.
  package func wait(seconds: Int, until condition: () -> Bool) -> Bool {
    xenstore.wait(on: [backend, frontend].compactMap { $0 }, seconds: seconds, until: condition)
  }
}
