import ControlAPI
import Xen

/// What QEMU has on a guest's PCI bus, as its monitor says. vxd's functions are not QEMU's: one that is there too is another device in the same
/// place, and the guest finds only one of them.
enum QEMUBus {
  /// Where libxl has QEMU's monitors (xen: tools/libs/light, libxl_dm.c).
  static let folder = "/var/run/xen"

  /// Functions on bus 0 as lspci shows them, such as 00:10.0; nil where QEMU cannot be asked.
  static func functions(of domain: DomainID, folder: String) -> Set<String>? {
    // xenstat's own monitor: that of libxl takes one client at a time.
    guard let monitor = try? ControlClient(path: "\(folder)/qmp-libxenstat-\(domain)") else { return nil }
    do throws(ControlClient.Failure) {
      _ = try monitor.receive(2000)
      _ = try execute("qmp_capabilities", monitor)
      guard let buses = try execute("query-pci", monitor)?.arrayValue else { return nil }
      var found: Set<String> = []
      for bus in buses where bus["bus"]?.integerValue == 0 {
        for device in bus["devices"]?.arrayValue ?? [] {
          guard let slot = device["slot"]?.integerValue.flatMap({ UInt8(exactly: $0) }),
            let function = device["function"]?.integerValue.flatMap({ UInt8(exactly: $0) })
          else { continue }
          found.insert("\(PCIAddress(device: slot, function: function))")
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
