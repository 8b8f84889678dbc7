package import Virtqueue

/// The host's side of one port of a console device. Called on the device's data thread.
package protocol ConsoleChannel: AnyObject {
  /// Takes what the guest wrote.
  ///
  /// - Returns: how many bytes are done with. Fewer than given: somebody must be waited for, and the pump is run again when he is ready.
  func take(_ bytes: UnsafeRawBufferPointer) -> Int
  /// Gives what there is for the guest; returns how many bytes.
  func give(_ buffer: UnsafeMutableRawBufferPointer) -> Int
  /// Whether `give` would give something.
  var hasInput: Bool { get }
  /// Whether somebody listens, or will once the guest opens its port: what the guest sees as the port's other end being open.
  var isOpen: Bool { get }
  /// Whether somebody listens now: what operators see.
  var isConnected: Bool { get }
  /// Whether its connection is there only while the guest has its port open: what one opening of the guest's was not given is for none that follows,
  /// nor is what it wrote.
  var followsGuest: Bool { get }
  /// The guest opens or closes its port.
  ///
  /// - Parameter resumes: it had it open before this backend began.
  func guest(isOpen: Bool, resumes: Bool)
  /// Whether output beyond a rate is dropped; else it waits.
  var dropsOutput: Bool { get }
  /// The size of the terminal, when there is one.
  var size: TerminalSize? { get }
  /// Ends it.
  func close()
}

extension ConsoleChannel {
  package var isConnected: Bool { isOpen }
  package var followsGuest: Bool { false }
  package func guest(isOpen: Bool, resumes: Bool) {}
}

/// Characters of a terminal.
package struct TerminalSize: Equatable, Sendable {
  package var columns: UInt16
  package var rows: UInt16

  package init(columns: UInt16, rows: UInt16) {
    self.columns = columns
    self.rows = rows
  }
}

/// Feature bits of a console device (virtio 1.2, 5.3.3).
extension FeatureBits {
  package static let consoleSize = FeatureBits(rawValue: 1 << 0)  // VIRTIO_CONSOLE_F_SIZE
  package static let consoleMultiport = FeatureBits(rawValue: 1 << 1)  // VIRTIO_CONSOLE_F_MULTIPORT
  package static let consoleEmergencyWrite = FeatureBits(rawValue: 1 << 2)  // VIRTIO_CONSOLE_F_EMERG_WRITE
}

/// The configuration space of a console device (virtio 1.2, 5.3.4) and its limits.
package enum ConsoleConfiguration {
  package static let deviceID: UInt32 = 3
  /// Ports beside port 0: with two control queues, all fit the 64 queues that a device may have.
  package static let namedPortLimit = 30
  /// Where the driver writes a character when it has nothing else left.
  package static let emergencyOffset = 8

  package static let features: FeatureBits = [
    .version1, .indirectDescriptors, .eventIndex, .ringReset, .consoleSize, .consoleMultiport, .consoleEmergencyWrite,
  ]

  /// The 12 bytes: columns, rows, ports, emergency write.
  package static func bytes(_ size: TerminalSize?, ports: Int) -> [UInt8] {
    let size = size ?? TerminalSize(columns: 80, rows: 25)
    var bytes: [UInt8] = []
    for value in [size.columns, size.rows] { bytes += [UInt8(value & 255), UInt8(value >> 8)] }
    bytes += [UInt8(truncatingIfNeeded: ports), 0, 0, 0, 0, 0, 0, 0]
    return bytes
  }

  package static func set(_ size: TerminalSize, in bytes: inout [UInt8]) {
    for (index, value) in [size.columns, size.rows].enumerated() {
      bytes[2 * index] = UInt8(value & 255)
      bytes[2 * index + 1] = UInt8(value >> 8)
    }
  }
}
