import CLinux
import EventLoop
import Glibc

/// Interfaces of this host, by their names, and the bridges that they are in.
package enum NetworkInterface {
  private static let folder = "/sys/class/net"

  /// Whether the name is one that an interface can have (linux: IFNAMSIZ, dev_valid_name).
  package static func isName(_ name: String) -> Bool {
    (1...15).contains(name.utf8.count) && name != "." && name != ".."
      && name.utf8.allSatisfy { $0 > 32 && $0 < 127 && $0 != UInt8(ascii: "/") && $0 != UInt8(ascii: ":") }
  }

  /// Not by `access`, which asks for the real user without his capabilities.
  private static func isThere(_ path: String) -> Bool {
    var status = stat()
    return stat(path, &status) == 0
  }

  package static func exists(_ name: String) -> Bool { isName(name) && isThere("\(folder)/\(name)") }

  package static func isTap(_ name: String) -> Bool { exists(name) && number("tun_flags", of: name) != nil }

  /// Every interface that there is.
  package static var all: [String] { namesInFolder(folder) }

  /// A number that the kernel tells of an interface.
  package static func number(_ attribute: String, of name: String) -> Int? {
    guard isName(name), let file = fopen("\(folder)/\(name)/\(attribute)", "re") else { return nil }
    defer { fclose(file) }
    var text = [CChar](repeating: 0, count: 64)
    guard fgets(&text, 64, file) != nil else { return nil }
    let digits = String(decoding: text.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    return digits.hasPrefix("0x") ? Int(digits.dropFirst(2), radix: 16) : Int(digits)
  }

  /// The speed of a link, a macvtap's lower device or the quickest port of a bridge, in Mbit/s; nil when the kernel knows none. A tap's own is 10,
  /// whatever it can do.
  package static func speed(of name: String) -> UInt32? {
    number("speed", of: name).flatMap { $0 > 10 && $0 <= Int(Int32.max) ? UInt32($0) : nil }
  }

  /// Adds an interface to a bridge; one that is there stays.
  static func add(_ name: String, to bridge: String) throws(TapFault) {
    guard isThere("\(folder)/\(bridge)/bridge") else { return try addToVirtualSwitch(name, bridge) }
    if isThere("\(folder)/\(bridge)/brif/\(name)") { return }
    let result = clinux_bridge_add(bridge, Int32(clamping: number("ifindex", of: name) ?? 0))
    guard result == 0 else {
      throw TapFault(message: "bridge: '\(name)' cannot be added to '\(bridge)': \(Errno(result))")
    }
  }

  // MARK: Open vSwitch

  /// Its bridges have no directory of the kernel's bridges; its own tool adds the port.
  private static func addToVirtualSwitch(_ name: String, _ bridge: String) throws(TapFault) {
    let status = run(["ovs-vsctl", "--timeout=10", "--may-exist", "add-port", bridge, name])
    guard status == 0 else {
      throw TapFault(
        message:
          "bridge: '\(bridge)' is not a Linux bridge, and ovs-vsctl cannot add '\(name)' to it (\(words(status)))")
    }
  }

  static func leaveVirtualSwitch(_ name: String) {
    // Only those that have a switch as their master.
    guard isThere("\(folder)/\(name)/master/ifindex"),
      !isThere("\(folder)/\(name)/master/bridge")
    else { return }
    _ = run(["ovs-vsctl", "--timeout=10", "--if-exists", "del-port", name])
  }

  private static func words(_ status: Int32) -> String {
    status == 127 ? "it is not installed" : "exit code \(status)"
  }

  /// Runs a program of the path and waits for it: on a device's own thread, as it opens.
  private static func run(_ arguments: [String]) -> Int32 {
    var pointers = arguments.map { strdup($0) } + [nil]
    defer { for pointer in pointers { free(pointer) } }
    var child = pid_t()
    guard posix_spawnp(&child, arguments[0], nil, nil, &pointers, environ) == 0 else { return 127 }
    var status: Int32 = 0
    while waitpid(child, &status, 0) == -1 && errno == EINTR {}
    return status & 0x7f == 0 ? status >> 8 & 0xff : 126
  }
}
