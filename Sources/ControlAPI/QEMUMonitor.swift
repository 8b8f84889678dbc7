import Glibc

/// QEMU's monitor of a guest: what it has on the guest's PCI bus. vxd's functions are not QEMU's: one that is there too is another device in the
/// same place, and the guest finds only one of them.
package enum QEMUMonitor {
  /// Where libxl has QEMU's monitors (xen: tools/libs/light, libxl_dm.c).
  package static let folder = "/var/run/xen"

  /// xenstat's own monitor: that of libxl takes one client at a time.
  private static func path(_ domain: UInt16, _ folder: String) -> String { "\(folder)/qmp-libxenstat-\(domain)" }

  package static func isThere(of domain: UInt16, folder: String) -> Bool { access(path(domain, folder), F_OK) == 0 }

  /// Functions on bus 0; nil where QEMU cannot be asked. Waits for it, two seconds for each of its answers at most.
  package static func functions(of domain: UInt16, folder: String) -> [(device: UInt8, function: UInt8)]? {
    guard let monitor = try? ControlClient(path: path(domain, folder)) else { return nil }
    do throws(ControlClient.Failure) {
      _ = try monitor.receive(2000)
      _ = try execute("qmp_capabilities", monitor)
      guard let buses = try execute("query-pci", monitor)?.arrayValue else { return nil }
      var found: [(device: UInt8, function: UInt8)] = []
      for bus in buses where bus["bus"]?.integerValue == 0 {
        for device in bus["devices"]?.arrayValue ?? [] {
          guard let slot = device["slot"]?.integerValue.flatMap({ UInt8(exactly: $0) }), slot < 32,
            let function = device["function"]?.integerValue.flatMap({ UInt8(exactly: $0) }), function < 8
          else { continue }
          found.append((slot, function))
        }
      }
      return found
    } catch {
      return nil
    }
  }

  /// - Returns: what the command returned; nil for an error.
  private static func execute(
    _ command: String, _ monitor: ControlClient
  ) throws(ControlClient.Failure) -> JSONValue? {
    try monitor.send(Array(JSONText.text(["execute": .string(command)]).utf8))
    // Events may come in between; not many, in so short a time.
    for _ in 0..<100 {
      let answer = try monitor.receive(2000)
      if let result = answer["return"] { return result }
      if answer["error"] != nil { return nil }
    }
    return nil
  }
}
