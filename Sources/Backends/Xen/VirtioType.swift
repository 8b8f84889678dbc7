/// A device type of virtio (virtio 1.2, chapter 5) by the names that operators, libxl and the standard give it. Which of them vxd serves is said
/// by `DeviceTypes`; `vxctl` writes the entries of any of them, which the vxd of another domain may serve.
package struct VirtioType: Hashable, Sendable {
  /// In profiles, and on vxctl's command line.
  package let name: String
  /// What names of such devices begin with: net0.
  package let prefix: String
  /// virtio's number of the type.
  package let number: UInt32

  /// libxl's `type` of a generic device: the number is hexadecimal.
  package var entryType: String { "virtio,device\(String(number, radix: 16))" }

  package init(name: String, prefix: String, number: UInt32) {
    self.name = name
    self.prefix = prefix
    self.number = number
  }

  package static let network = VirtioType(name: "network", prefix: "net", number: 1)
  package static let disk = VirtioType(name: "disk", prefix: "disk", number: 2)
  package static let console = VirtioType(name: "console", prefix: "console", number: 3)
  package static let entropy = VirtioType(name: "entropy", prefix: "rng", number: 4)

  /// Those that libxl's generic kind can carry, and that have a meaning behind a transport of Xen's.
  package static let generic = [
    network, console, entropy,
    VirtioType(name: "scsi", prefix: "scsi", number: 8),
    VirtioType(name: "gpu", prefix: "gpu", number: 16), VirtioType(name: "input", prefix: "input", number: 18),
    VirtioType(name: "vsock", prefix: "vsock", number: 19), VirtioType(name: "crypto", prefix: "crypto", number: 20),
    VirtioType(name: "sound", prefix: "sound", number: 25), VirtioType(name: "fs", prefix: "fs", number: 26),
    VirtioType(name: "i2c", prefix: "i2c", number: 34), VirtioType(name: "gpio", prefix: "gpio", number: 41),
  ]
}
