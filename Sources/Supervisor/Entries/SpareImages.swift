import ControlAPI
import DeviceHost
import Engines

/// Images that role operate may give a guest's spare disks, from its profile:
///
///     "spareImages": ["/srv/images/web/", "/dev/vg0/web1-data", "nbd://store1/web/"]
///
/// A name that ends with a slash stands for everything below it. Everything else is for role admin.
struct SpareImages: Equatable, Sendable {
  private var names: [String] = []

  init() {}

  /// - Throws: for a name that could mean something else than it seems to.
  init(_ values: [JSONValue], _ field: String) throws(SettingFault) {
    guard values.count <= 64 else {
      throw SettingFault(field: field, reason: "\(values.count) entries; expected at most 64")
    }
    for (index, value) in values.enumerated() {
      let place = "\(field)[\(index)]"
      guard let name = value.stringValue else { throw SettingFault(place, expected: "a string", not: value) }
      if let reason = Self.fault(of: name) { throw SettingFault(field: place, reason: "'\(name)': \(reason)") }
      names.append(name)
    }
  }

  private static func fault(of name: String) -> String? {
    if NBDAddress.isAddress(name) {
      if case .unix = (try? NBDAddress(name))?.place {
        return nil
      }
      // The address that a whole name begins with must be whole itself: "nbd://store" is the beginning of "nbd://store.example.org".
      guard name.hasPrefix("nbd://"), name.utf8.count(where: { $0 == UInt8(ascii: "/") }) > 2 else {
        return
          "expected nbd://HOST[:PORT]/EXPORT, nbd://HOST[:PORT]/ for all exports of a server, or nbd+unix:///EXPORT?socket=PATH"
      }
      return (try? NBDAddress(name)) == nil ? "not an NBD address" : nil
    }
    guard name.hasPrefix("/"), name != "/", name.utf8.count < 4096 else {
      return
        "expected an absolute path of at most 4095 bytes, other than /; one that ends with / stands for everything below it"
    }
    return isPlain(name) ? nil : "expected a path without '.', '..' and empty components"
  }

  /// Whether a path says where it leads: without components that lead elsewhere.
  private static func isPlain(_ path: String) -> Bool {
    let parts = path.dropFirst().split(separator: "/", omittingEmptySubsequences: false)
    let named = parts.last?.isEmpty == true ? parts.dropLast() : parts
    return !named.isEmpty && !named.contains { $0.isEmpty || $0 == "." || $0 == ".." } && !path.utf8.contains(0)
  }

  /// Whether an image is one of these.
  ///
  /// - Parameter image: an absolute path, or an address.
  func contain(_ image: String) -> Bool {
    let isAddress = NBDAddress.isAddress(image)
    guard isAddress || Self.isPlain(image) && !image.hasSuffix("/") else { return false }
    return names.contains { name in
      guard NBDAddress.isAddress(name) == isAddress else { return false }
      guard name.hasSuffix("/"), !name.hasPrefix("nbd+") else { return image == name }
      return image.hasPrefix(name) && image != name
    }
  }
}
