import EventLoop
import Glibc
package import Xen

/// Plays xl: writes a domain's entries as libxl does, waits for what libxl waits for, takes them away again.
package final class SimulatedToolstack {
  private let xenstore: XenStore
  private let hypervisor: SimulatedHypervisor
  private let server: XenstoreServer

  package init(server: XenstoreServer, hypervisor: SimulatedHypervisor) throws(XenError) {
    self.server = server
    self.hypervisor = hypervisor
    xenstore = try XenStore(socketPath: server.path)
  }

  /// The disk's number of a name such as xvde (xen: libxl__device_disk_dev_number).
  package static func deviceNumber(_ name: String) -> UInt32 {
    let index = UInt32((name.utf8.last ?? 97) - 97)
    return index < 16 ? 202 << 8 | index << 4 : 1 << 28 | index << 8
  }

  package static func backendPath(_ domain: DomainID, _ disk: String) -> String {
    "/local/domain/0/backend/virtio_disk/\(domain)/\(deviceNumber(disk))"
  }

  /// What libxl writes otherwise of the first virtio disk of a guest on Arm, which it has put into the guest's device tree.
  package static let armDisk: [String: String?] = [
    "base": "33554432", "irq": "33", "transport": "mmio", "grant_usage": "0",
  ]

  /// Makes a domain without devices.
  ///
  /// - Parameter type: as xl's: hvm, pvh, pv.
  package func create(
    _ domain: SimulatedDomain, name: String, uuid: String? = nil, type: String = "hvm"
  ) throws(XenError) {
    hypervisor.add(domain)
    let path = "/local/domain/\(domain.identifier)"
    try xenstore.transaction { transaction throws(XenError) in
      try xenstore.write("\(path)/name", name, in: transaction)
      let vm = uuid ?? "00000000-0000-4000-8000-00000000\(1000 + domain.identifier)"
      try xenstore.write("\(path)/vm", "/vm/\(vm)", in: transaction)
      let now = EventLoop.now()
      try xenstore.write("/vm/\(vm)/start_time", "\(now / 1_000_000_000).\(now % 1_000_000_000)", in: transaction)
      try xenstore.write("\(path)/device", "", in: transaction)
      try xenstore.write("/libxl/\(domain.identifier)/type", type, in: transaction)
    }
    server.fire(special: "@introduceDomain")
  }

  /// Adds a disk's three directories in one transaction, as libxl's device_disk_add.
  ///
  /// - Parameter changes: keys to write otherwise; nil leaves one out.
  package func attach(
    disk: String, image: String, to domain: DomainID, readOnly: Bool = false, discard: Bool = true,
    changes: [String: String?] = [:]
  ) throws(XenError) {
    let frontend = "/local/domain/\(domain)/device/virtio_disk/\(Self.deviceNumber(disk))"
    let backend = Self.backendPath(domain, disk)
    var keys: [String: String] = [
      "frontend": frontend, "frontend-id": "\(domain)", "online": "1", "state": "1", "params": image,
      "type": "standalone", "specification": "virtio", "transport": "mmio", "dev": disk, "device-type": "disk",
      "mode": readOnly ? "r" : "w", "removable": "0", "bootable": "1", "discard-enable": discard ? "1" : "0",
      "base": "0", "irq": "0",
    ]
    for (key, value) in changes { keys[key] = value }
    try xenstore.transaction { transaction throws(XenError) in
      try xenstore.write("\(frontend)/backend", backend, in: transaction)
      try xenstore.write("\(frontend)/backend-id", "0", in: transaction)
      try xenstore.write("\(frontend)/state", "1", in: transaction)
      for (key, value) in keys { try xenstore.write("\(backend)/\(key)", value, in: transaction) }
    }
  }

  /// Adds a generic device, as libxl 4.18 does for `virtio = [ "type=..." ]`.
  ///
  /// - Parameter options: what `vxctl attach` writes beside it.
  package func attachGeneric(
    type: String, device: Int, to domain: DomainID, options: String? = nil, base: String = "0", irq: String = "0"
  ) throws(XenError) {
    let frontend = "/local/domain/\(domain)/device/virtio/\(device)"
    let backend = "/local/domain/0/backend/virtio/\(domain)/\(device)"
    var keys = [
      ("frontend", frontend), ("frontend-id", "\(domain)"), ("online", "1"), ("state", "1"), ("type", type),
      ("transport", "mmio"), ("base", base), ("irq", irq), ("grant_usage", "0"),
    ]
    if let options { keys.append(("vx-options", options)) }
    try xenstore.transaction { transaction throws(XenError) in
      try xenstore.write("\(frontend)/backend", backend, in: transaction)
      try xenstore.write("\(frontend)/backend-id", "0", in: transaction)
      try xenstore.write("\(frontend)/state", "1", in: transaction)
      for (key, value) in keys { try xenstore.write("\(backend)/\(key)", value, in: transaction) }
    }
  }

  /// Changes a key of an entry.
  package func set(_ key: String, _ value: String, disk: String, of domain: DomainID) throws(XenError) {
    try xenstore.write("\(Self.backendPath(domain, disk))/\(key)", value)
  }

  package func value(_ key: String, disk: String, of domain: DomainID) -> String? {
    xenstore.read("\(Self.backendPath(domain, disk))/\(key)")
  }

  /// Waits until an entry's key has a value, as libxl waits for states; false when the time is over.
  package func wait(for value: String, of key: String, disk: String, domain: DomainID, seconds: Int = 30) -> Bool {
    let path = "\(Self.backendPath(domain, disk))/\(key)"
    return xenstore.wait(on: [path], seconds: seconds) { xenstore.read(path) == value }
  }

  /// Takes the devices away as `xl destroy` does: frontend deleted, online 0, state 5; waits for state 6; deletes the rest.
  ///
  /// - Returns: whether every backend reached state 6 in time.
  package func destroy(_ domain: DomainID, disks: [String], seconds: Int = 30) throws(XenError) -> Bool {
    for disk in disks {
      try xenstore.transaction { transaction throws(XenError) in
        try xenstore.remove(
          "/local/domain/\(domain)/device/virtio_disk/\(Self.deviceNumber(disk))", in: transaction)
        try xenstore.write("\(Self.backendPath(domain, disk))/online", "0", in: transaction)
        try xenstore.write("\(Self.backendPath(domain, disk))/state", "5", in: transaction)
      }
    }
    var allClosed = true
    for disk in disks where !wait(for: "6", of: "state", disk: disk, domain: domain, seconds: seconds) {
      allClosed = false
    }
    try xenstore.remove("/local/domain/0/backend/virtio_disk/\(domain)")
    try xenstore.remove("/local/domain/\(domain)")
    try xenstore.remove("/libxl/\(domain)")
    hypervisor.remove(domain)
    server.fire(special: "@releaseDomain")
    return allClosed
  }

  /// The domain dies without its toolstack: Xen's view is gone, and xenstored removes the nodes that it owned.
  package func crash(_ domain: DomainID) throws(XenError) {
    try xenstore.remove("/local/domain/\(domain)/device")
    hypervisor.remove(domain)
    server.fire(special: "@releaseDomain")
  }

  /// Removes what the frontend sees of its devices.
  package func removeFrontend(of domain: DomainID) throws(XenError) {
    try xenstore.remove("/local/domain/\(domain)/device/virtio_disk")
  }

  /// Removes every disk's entry with one blow.
  package func removeAllEntries() throws(XenError) { try xenstore.remove("/local/domain/0/backend/virtio_disk") }

  /// How many guests have a directory among the backends.
  package var backendNodes: Int { xenstore.list("/local/domain/0/backend/virtio_disk")?.count ?? 0 }

  /// Renames a domain.
  package func rename(_ domain: DomainID, _ name: String) throws(XenError) {
    try xenstore.write("/local/domain/\(domain)/name", name)
  }

  /// Removes an entry without any ceremony.
  package func removeEntry(disk: String, of domain: DomainID) throws(XenError) {
    try xenstore.remove(Self.backendPath(domain, disk))
  }
}
