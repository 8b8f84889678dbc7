import ControlAPI
import DeviceHost
import Devices
package import EventLoop
import Glibc
import Lifecycle
import Xen

/// The folder with what must survive the daemon: a small file for each guest (which ioreq server in Xen is ours) and one for each
/// device (`DeviceState`). In the runtime directory, so that it ends with the host.
package struct StateFolder: Sendable {
  package let path: String

  /// A guest's file.
  struct Guest: Equatable {
    /// nil when there was none at the end.
    var server: UInt16?
    var uuid: String?
    var transport = RegisterTransport.mmio
    /// See `GuestFacts.started`; nil where nobody said, and in files of earlier versions.
    var started: String?
    /// Where the guest looks for devices in its device tree: the server must answer there as long as the guest runs.
    var windows: [UInt64] = []

    /// Whether it is what a domain is now: the same guest in the same life.
    func isOf(uuid: String?, started: String?) -> Bool {
      self.uuid == uuid && (self.started == nil || started == nil || self.started == started)
    }
  }

  /// Makes the folder when it is not there.
  package init(path: String) throws(Errno) {
    self.path = path
    guard mkdir(path, 0o700) == 0 || errno == EEXIST else { throw Errno.last }
  }

  private func guestPath(_ domain: DomainID) -> String { "\(path)/\(domain).guest" }

  func devicePath(_ key: DeviceKey) -> String { "\(path)/\(key.domain)-\(key.kind.rawValue)-\(key.device).device" }

  // MARK: Guests

  func save(_ guest: Guest, of domain: DomainID) throws(Errno) {
    let text = JSONText.text([
      "version": 1, "server": guest.server.map { .count($0) } ?? .null,
      "uuid": guest.uuid.map(JSONValue.string) ?? .null,
      "transport": .string(guest.transport.rawValue), "started": guest.started.map(JSONValue.string) ?? .null,
      "windows": .array(guest.windows.map { .count($0) }),
    ])
    try Self.write(text, to: guestPath(domain))
  }

  /// What was saved of a guest; nil when there is nothing that can be used.
  func guest(_ domain: DomainID) -> Guest? {
    guard let value = Self.read(guestPath(domain)), let number = value["server"] else { return nil }
    let server = number.integerValue.flatMap(UInt16.init(exactly:))
    guard server != nil || number == .null else { return nil }
    // Earlier versions knew one transport, and did not name it.
    let transport = value["transport"]?.stringValue.flatMap(RegisterTransport.init(rawValue:)) ?? .mmio
    let windows = (value["windows"]?.arrayValue ?? []).compactMap { $0.integerValue.flatMap(UInt64.init(exactly:)) }
    return Guest(
      server: server, uuid: value["uuid"]?.stringValue, transport: transport, started: value["started"]?.stringValue,
      windows: windows)
  }

  // MARK: Contents

  /// Every guest and device that has a file.
  var contents: (guests: Set<DomainID>, devices: Set<DeviceKey>) {
    var guests: Set<DomainID> = []
    var devices: Set<DeviceKey> = []
    for name in namesInFolder(path) {
      if name.hasSuffix(".guest"), let domain = DomainID(name.dropLast(6)) { guests.insert(domain) }
      let parts = name.split(separator: "-")
      if name.hasSuffix(".device"), parts.count == 3, let domain = DomainID(parts[0]),
        let kind = DeviceKey.Kind(rawValue: String(parts[1])), let device = UInt32(parts[2].dropLast(7))
      {
        devices.insert(DeviceKey(kind: kind, domain: domain, device: device))
      }
    }
    return (guests, devices)
  }

  func forget(_ key: DeviceKey) { unlink(devicePath(key)) }

  // MARK: Spares

  /// What a spare disk was filled with.
  struct SpareAssignment: Equatable {
    var image: String
    var limits: RateLimits
  }

  private func assignmentPath(_ key: DeviceKey) -> String { "\(path)/\(key.domain)-\(key.device).filling" }

  func save(_ assignment: SpareAssignment, of key: DeviceKey) throws(Errno) {
    try Self.write(
      JSONText.text(["version": 1, "image": .string(assignment.image), "limits": assignment.limits.json]),
      to: assignmentPath(key))
  }

  func assignment(_ key: DeviceKey) -> SpareAssignment? {
    guard let value = Self.read(assignmentPath(key)), let image = value["image"]?.stringValue else { return nil }
    var limits = RateLimits()
    try? limits.change(value["limits"] ?? .object([]), "limits")
    return SpareAssignment(image: image, limits: limits)
  }

  func forgetAssignment(_ key: DeviceKey) { unlink(assignmentPath(key)) }

  // MARK: Files

  /// Replaces a file by another, whole.
  static func write(_ text: String, to path: String) throws(Errno) {
    let temporary = path + ".new"
    let raw = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
    guard raw >= 0 else { throw Errno.last }
    let descriptor = OwnedDescriptor(adopting: raw)
    var bytes = Array(text.utf8)
    let count = Glibc.write(descriptor.raw, &bytes, bytes.count)
    guard count == bytes.count, rename(temporary, path) == 0 else {
      // A part of it that was written is no error to the kernel: the file system is full.
      let failure = count >= 0 && count < bytes.count ? Errno(ENOSPC) : Errno.last
      unlink(temporary)
      throw failure
    }
  }

  /// A file's value, if it has version 1.
  static func read(_ path: String) -> JSONValue? {
    guard let file = fopen(path, "re") else { return nil }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 16384)
    let count = fread(&bytes, 1, bytes.count, file)
    guard let value = try? JSONText.parse(Array(bytes[..<count])), value["version"]?.integerValue == 1 else {
      return nil
    }
    return value
  }

  func forget(_ domain: DomainID) { unlink(guestPath(domain)) }

  /// Forgets everything of a domain: another guest has its number now.
  func forgetAll(_ domain: DomainID) {
    for key in contents.devices where key.domain == domain {
      forget(key)
      forgetAssignment(key)
    }
    forget(domain)
  }
}
