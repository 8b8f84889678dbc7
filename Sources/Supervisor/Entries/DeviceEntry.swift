package import DeviceHost
import Devices
import Engines
package import Xen

/// What is wrong with a device's entry: the key, and what its value should be.
package struct EntryFault: Error, Equatable {
  package var key: String
  package var reason: String

  package init(_ key: String, _ reason: String) {
    self.key = key
    self.reason = reason
  }

  package var message: String { "\(key): \(reason)" }
}

/// A `virtio_disk` or generic `virtio` entry as libxl writes it, checked.
package struct DeviceEntry: Sendable {
  /// Frontend's directory, absolute.
  package var frontend: String
  /// Name of the virtual device: xvde.
  package var name: String
  package var settings: any DeviceSettings
  /// Where libxl put the device; 0 on x86, where vxd chooses.
  package var base: UInt64
  package var irq: UInt32

  /// - Parameters:
  ///   - keys: the nodes of the backend directory.
  ///   - types: those that are served.
  ///   - change: what is made of a disk of this name beyond what libxl says.
  package static func parse(
    _ key: DeviceKey, _ keys: [String: String], types: [any DeviceSettings.Type] = DeviceTypes.all,
    change: (inout BlockSettings, _ name: String) -> Void = { _, _ in }
  ) throws(EntryFault) -> DeviceEntry {
    func required(_ name: String) throws(EntryFault) -> String {
      guard let value = keys[name] else { throw EntryFault(name, "the key is missing") }
      guard !value.isEmpty else { throw EntryFault(name, "the value is empty") }
      return value
    }
    let type = try required("type")
    if key.kind == .disk {
      guard type == "standalone" else { throw EntryFault("type", "expected 'standalone', not '\(type)'") }
      let specification = try required("specification")
      guard specification == "virtio" else {
        throw EntryFault("specification", "expected 'virtio', not '\(specification)'")
      }
    } else if types.declarable(entryType: type) == nil {
      let known = types.filter { $0.canBeDeclared }.map { "\($0.type.entryType) (\($0.type.name))" }
      throw EntryFault("type", "expected one of \(known.joined(separator: ", ")), not '\(type)'")
    }
    let transport = try required("transport")
    guard transport == "mmio" else { throw EntryFault("transport", "expected 'mmio', not '\(transport)'") }
    let frontend = try required("frontend")
    guard frontend.hasPrefix("/local/domain/\(key.domain)/") else {
      throw EntryFault("frontend", "expected a path below /local/domain/\(key.domain)/, not '\(frontend)'")
    }
    let frontendID = try number("frontend-id", required("frontend-id"))
    guard frontendID == UInt64(key.domain) else {
      throw EntryFault("frontend-id", "expected \(key.domain), the domain of the entry's path, not \(frontendID)")
    }
    let base = try number("base", required("base"))
    guard isWindow(base) else {
      throw EntryFault("base", "expected a multiple of 512 below 2^52, not 0x\(String(base, radix: 16))")
    }
    let irq = try number("irq", required("irq"))
    guard irq == 0 ? base == 0 : (32...1019).contains(irq) else {
      throw EntryFault("irq", "expected a shared peripheral interrupt (32 to 1019), or 0 with base 0, not \(irq)")
    }
    if key.kind == .generic, let type = types.declarable(entryType: type) {
      // Its options come from elsewhere: libxl has no room for them.
      let name = "\(type.type.prefix)\(key.device)"
      let settings = try plain(type, key, name)
      return DeviceEntry(frontend: frontend, name: name, settings: settings, base: base, irq: UInt32(irq))
    }
    let mode = try required("mode")
    guard mode == "r" || mode == "w" else { throw EntryFault("mode", "expected 'r' or 'w', not '\(mode)'") }
    let path = try required("params")
    if let fault = fault(ofImage: path) { throw EntryFault("params", fault) }
    let discard = try flag("discard-enable", keys["discard-enable"] ?? "0")
    let name = keys["dev"] ?? "\(key.device)"
    var disk = BlockSettings(path: path, readOnly: mode == "r", discard: discard, serial: name)
    change(&disk, name)
    return DeviceEntry(frontend: frontend, name: name, settings: disk, base: base, irq: UInt32(irq))
  }

  /// A device without options.
  private static func plain(
    _ type: any DeviceSettings.Type, _ key: DeviceKey, _ name: String
  ) throws(EntryFault) -> any DeviceSettings {
    // It gets its options, and what is derived for the guest, by `EntryMaker`.
    let owner = DeviceOwner(identity: "", domain: key.domain, device: name, suffix: "")
    do throws(SettingFault) {
      return try type.init(options: [], for: owner, "")
    } catch {
      throw EntryFault(error.field, error.reason)
    }
  }

  /// Bytes of the name of an image at most: a path's, or an address with as much in its export's name.
  private static let imageLimit = 4608

  /// What is wrong with the name of an image; nil when nothing is.
  static func fault(ofImage path: String) -> String? {
    // It is kept in events and answers, and shown.
    guard path.utf8.count <= imageLimit else { return "the name is longer than \(imageLimit) bytes" }
    if NBDAddress.isAddress(path) {
      do throws(ImageFault) { _ = try NBDAddress(path) } catch { return error.message }
      return nil
    }
    guard path.utf8.count < 4096, !path.utf8.contains(0) else {
      return "a path of \(path.utf8.count) bytes; expected at most 4095, without null bytes"
    }
    return path.hasPrefix("/")
      ? nil : "expected an absolute path of an image or an NBD address (nbd://, nbd+unix://), not '\(path)'"
  }

  /// Whether a device's registers can be at an address.
  static func isWindow(_ base: UInt64) -> Bool { base & 0x1ff == 0 && base < 1 << 52 }

  /// A number in decimal or, with 0x, hexadecimal: libxl writes `base` in decimal for disks and in hexadecimal for generic
  /// devices.
  package static func number(_ key: String, _ text: String) throws(EntryFault) -> UInt64 {
    let isHexadecimal = text.hasPrefix("0x") || text.hasPrefix("0X")
    let digits = isHexadecimal ? text.dropFirst(2) : text[...]
    // The initializer takes a sign too, which no such value has.
    guard let first = digits.utf8.first, first != UInt8(ascii: "+"), first != UInt8(ascii: "-"),
      let value = UInt64(digits, radix: isHexadecimal ? 16 : 10)
    else {
      throw EntryFault(key, "expected a number of at most 64 bits, decimal or hexadecimal with 0x, not '\(text)'")
    }
    return value
  }

  private static func flag(_ key: String, _ text: String) throws(EntryFault) -> Bool {
    guard text == "0" || text == "1" else { throw EntryFault(key, "expected 0 or 1, not '\(text)'") }
    return text == "1"
  }

  /// Where the device sits: libxl's choice, or the next free x86 slot.
  ///
  /// - Parameter taken: indexes of the x86 slots in use.
  package func slot(_ key: DeviceKey, taken: Set<Int>, count: Int) throws(EntryFault) -> DeviceSlot {
    guard base == 0 else { return DeviceSlot(index: nil, base: base, interrupt: .spi(irq)) }
    // The same disk gets the same slot, and so the same name in the guest, whatever else the guest has.
    if let wanted = Self.diskIndex(key.device).map({ $0 - 4 }), wanted >= 0, wanted < count, !taken.contains(wanted) {
      return SlotTable.slot(wanted)
    }
    guard let free = (0..<count).first(where: { !taken.contains($0) }) else {
      throw EntryFault(
        "params", "the guest's \(count) virtio-mmio slots are all in use (vxd --slots, vxctl acpi-table)")
    }
    return SlotTable.slot(free)
  }

  /// The letter of a virtual disk's number as an index: xvda is 0 (xen: libxl__device_disk_dev_number).
  package static func diskIndex(_ device: UInt32) -> Int? {
    if device >> 8 == 202 { return Int(device & 0xff) >> 4 }
    if device & (1 << 28) != 0 { return Int((device & 0x0fff_ffff) >> 8) }
    return nil
  }
}
