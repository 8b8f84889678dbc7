import EventLoop
import Glibc

/// QEMU's monitor of a guest: what it has on the guest's PCI bus. vxd's functions are not QEMU's: one that is there too is another device in the
/// same place, and the guest finds only one of them.
package enum QEMUMonitor {
  /// Where libxl has QEMU's monitors (xen: tools/libs/light, libxl_dm.c).
  package static let folder = "/var/run/xen"

  /// xenstat's own monitor: that of libxl takes one client at a time.
  private static func path(_ domain: UInt16, _ folder: String) -> String { "\(folder)/qmp-libxenstat-\(domain)" }

  package static func isThere(of domain: UInt16, folder: String) -> Bool { access(path(domain, folder), F_OK) == 0 }

  /// Functions on bus 0; nil where QEMU cannot be asked, or does not answer in time.
  ///
  /// - Parameter milliseconds: for the whole conversation: a QEMU that is stopped or hangs holds nobody longer.
  package static func functions(
    of domain: UInt16, folder: String, within milliseconds: Int32 = 3000
  ) -> [(device: UInt8, function: UInt8)]? {
    let deadline = EventLoop.now() &+ UInt64(max(milliseconds, 1)) * 1_000_000
    guard let monitor = try? ControlClient(path: path(domain, folder), timeoutMilliseconds: milliseconds) else {
      return nil
    }
    do throws(ControlClient.Failure) {
      _ = try receive(monitor, deadline)
      _ = try execute("qmp_capabilities", monitor, deadline)
      guard let buses = try execute("query-pci", monitor, deadline)?.arrayValue else { return nil }
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
    _ command: String, _ monitor: ControlClient, _ deadline: UInt64
  ) throws(ControlClient.Failure) -> JSONValue? {
    try monitor.send(Array(JSONText.text(["execute": .string(command)]).utf8))
    while true {
      // Events may come in between.
      let answer = try receive(monitor, deadline)
      if let result = answer["return"] { return result }
      if answer["error"] != nil { return nil }
    }
  }

  /// The next message, before the deadline.
  private static func receive(
    _ monitor: ControlClient, _ deadline: UInt64
  ) throws(ControlClient.Failure) -> JSONValue {
    let now = EventLoop.now()
    guard now < deadline else { throw .protocolBroken("QEMU did not answer in time") }
    return try monitor.receive(Int32(clamping: (deadline &- now) / 1_000_000 &+ 1))
  }
}
