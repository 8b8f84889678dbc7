import CLinux
import Devices
import EventLoop
import Glibc
import Synchronization
package import Virtqueue

/// Why a network device cannot have its tap.
package struct TapFault: Error {
  package var message: String
}

/// Where a network device's packets go.
package enum NetAttachment: Equatable, Sendable {
  /// A tap of vxd's own, which it adds to a bridge (Linux' or Open vSwitch's) when one is named, and removes with the device.
  case created(bridge: String?)
  /// A tap that is somebody else's.
  case tap(String)
  /// A macvtap that is somebody else's.
  case macvtap(String)
}

/// A tap with a queue for each queue pair: a packet with its virtio-net header by each read and write.
package final class TapDevice: Sendable {
  package let name: String
  /// A descriptor for each queue, non-blocking.
  package let queues: [Int32]
  /// Whether the kernel segments UDP on both sides (Linux 6.2).
  package let segmentsUDP: Bool
  /// Whether it can be told to use fewer of its queues.
  private let canDetachQueues: Bool
  /// What the kernel was told last: each telling takes a lock of the whole host's network (RTNL). nil before.
  private let told = Mutex<(offloads: UInt32?, pairs: Int?)>((nil, nil))

  /// TUN_F_* (linux/if_tun.h).
  private enum Offload {
    static let checksum: UInt32 = 1
    static let tso4: UInt32 = 2
    static let tso6: UInt32 = 4
    static let ecn: UInt32 = 8
    static let ufo: UInt32 = 16
    static let uso: UInt32 = 32 | 64
  }

  /// Opens or makes the tap, and whatever `attachment` says of it.
  ///
  /// - Parameters:
  ///   - name: of a tap that is made here; it stays, with its place in the bridge, until `remove`.
  ///   - mtu: nil for the bridge's, or 1500.
  package init(_ attachment: NetAttachment, name: String, queues count: Int, mtu: Int?) throws(TapFault) {
    let (interface, path) = try Self.place(attachment, name)
    self.name = interface
    var descriptors: [Int32] = []
    func fail(_ words: String) -> TapFault {
      for descriptor in descriptors { close(descriptor) }
      return TapFault(message: "\(interface): \(words)")
    }
    for _ in 0..<count {
      let descriptor = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC)
      guard descriptor >= 0 else { throw fail("\(path) cannot be opened: \(Errno.last)") }
      descriptors.append(descriptor)
      let result = clinux_tap_attach(descriptor, interface, count > 1 ? 1 : 0)
      guard result == 0 else {
        let why =
          result == EBUSY
          ? "it is in use by another process"
          : result == EINVAL ? "not a tap device, or its queue count differs" : "\(Errno(result))"
        throw fail("the tap cannot be opened: \(why)")
      }
      let header = clinux_tap_header(descriptor, Int32(NetConfiguration.headerBytes))
      guard header == 0 else { throw fail("the kernel does not support virtio-net headers on it: \(Errno(header))") }
    }
    let segmentsUDP =
      clinux_tap_offloads(descriptors[0], Offload.checksum | Offload.tso4 | Offload.tso6 | Offload.uso) == 0
    _ = clinux_tap_offloads(descriptors[0], 0)
    if case .created(let bridge) = attachment {
      do throws(TapFault) {
        try Self.prepare(interface, descriptors[0], bridge, mtu)
      } catch {
        throw fail(error.message)
      }
    }
    // The descriptors are the object's from here on: nothing throws any more.
    queues = descriptors
    canDetachQueues = count > 1
    self.segmentsUDP = segmentsUDP
  }

  /// Of descriptors that behave as a tap's queues do; taken over.
  package init(name: String, queues: [Int32]) {
    self.name = name
    self.queues = queues
    segmentsUDP = false
    canDetachQueues = false
  }

  deinit { for queue in queues { close(queue) } }

  /// The interface and the device node of its queues.
  private static func place(_ attachment: NetAttachment, _ name: String) throws(TapFault) -> (String, String) {
    switch attachment {
    case .created: return (name, "/dev/net/tun")
    case .tap(let given):
      guard NetworkInterface.exists(given) else { throw TapFault(message: "tap: there is no interface '\(given)'") }
      return (given, "/dev/net/tun")
    case .macvtap(let given):
      guard let index = NetworkInterface.number("ifindex", of: given) else {
        throw TapFault(message: "macvtap: there is no interface '\(given)'")
      }
      return (given, "/dev/tap\(index)")
    }
  }

  private static func prepare(_ name: String, _ descriptor: Int32, _ bridge: String?, _ mtu: Int?) throws(TapFault) {
    if let bridge, !NetworkInterface.exists(bridge) {
      throw TapFault(message: "bridge: there is no bridge '\(bridge)'")
    }
    let persists = clinux_tap_persist(descriptor, 1)
    guard persists == 0 else { throw TapFault(message: "the tap cannot be made persistent: \(Errno(persists))") }
    // The highest address that is there: the bridge takes the lowest of its members as its own.
    _ = clinux_interface_address(name, [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff])
    let size = mtu ?? bridge.flatMap { NetworkInterface.number("mtu", of: $0) } ?? 1500
    let resized = clinux_interface_mtu(name, Int32(clamping: size))
    guard resized == 0 else { throw TapFault(message: "mtu: \(size) cannot be set: \(Errno(resized))") }
    if let bridge { try NetworkInterface.add(name, to: bridge) }
    let up = clinux_interface_up(name, 1)
    guard up == 0 else { throw TapFault(message: "the tap cannot be brought up: \(Errno(up))") }
  }

  /// The largest packet's bytes without its link header.
  package var mtu: Int { Self.mtu(of: name) }

  package static func mtu(of name: String) -> Int { NetworkInterface.number("mtu", of: name) ?? 1500 }

  /// Tells the kernel what the guest can take, unless it knows.
  ///
  /// - Returns: false when it cannot do that; what it was told before stays.
  package func setOffloads(_ features: FeatureBits) -> Bool {
    var flags: UInt32 = 0
    if features.contains(.netGuestChecksum) {
      flags |= Offload.checksum
      for (bit, flag): (FeatureBits, UInt32) in [
        (.netGuestTSO4, Offload.tso4), (.netGuestTSO6, Offload.tso6), (.netGuestECN, Offload.ecn),
        (.netGuestUFO, Offload.ufo),
      ] where features.contains(bit) { flags |= flag }
      if features.contains([.netGuestUSO4, .netGuestUSO6]) { flags |= Offload.uso }
    }
    return told.withLock { told in
      guard told.offloads != flags else { return true }
      let result = clinux_tap_offloads(queues[0], flags)
      // A pair of sockets in a tap's place has no such call.
      guard result == 0 || result == ENOTTY || result == EOPNOTSUPP else { return false }
      told.offloads = flags
      return true
    }
  }

  /// Uses the first `pairs` queues for what comes from the network.
  package func use(pairs: Int) {
    guard canDetachQueues else { return }
    told.withLock { told in
      guard told.pairs != pairs else { return }
      told.pairs = pairs
      for (index, queue) in queues.enumerated() { _ = clinux_tap_enable(queue, index < pairs ? 1 : 0) }
    }
  }

  /// The interface ends with its last descriptor.
  package func retire() {
    NetworkInterface.leaveVirtualSwitch(name)
    _ = clinux_tap_persist(queues[0], 0)
  }

  /// Ends a tap that was made here and that nobody serves, and its place in the bridge.
  package static func remove(_ name: String) {
    guard NetworkInterface.isTap(name) else { return }
    NetworkInterface.leaveVirtualSwitch(name)
    let descriptor = open("/dev/net/tun", O_RDWR | O_CLOEXEC)
    guard descriptor >= 0 else { return }
    // Of either sort: with several queues it wants to be asked for as such.
    if clinux_tap_attach(descriptor, name, 0) != 0 { _ = clinux_tap_attach(descriptor, name, 1) }
    _ = clinux_tap_persist(descriptor, 0)
    close(descriptor)
  }
}
