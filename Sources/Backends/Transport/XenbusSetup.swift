package import Virtqueue

/// Why a guest's setup of a Xenbus device cannot be used: the words of the device's `vx-ack` node.
package struct SetupFault: Error, Equatable {
  package var message: String

  package init(_ message: String) { self.message = message }
}

/// What a device offers over Xenbus: the backend's `vx-offer` node (deploy/guest-module/PROTOCOL.md).
package struct XenbusOffer: Equatable, Sendable {
  package static let version = 1
  /// Pages of an arena at most: 32 directories of 1024 references.
  package static let maximumPages: UInt32 = 32768
  /// A chain of a disk's with so many device-writable bytes is left with none of them unwritten.
  package static let filledBytes = 2 << 20

  package var identity: DeviceIdentity
  package var maximumPages: UInt32
  package var configurationBytes: Int
  /// Different in each life of the device.
  package var epoch: UInt32

  package init(identity: DeviceIdentity, maximumPages: UInt32, configurationBytes: Int, epoch: UInt32) {
    self.identity = identity
    self.maximumPages = maximumPages
    self.configurationBytes = configurationBytes
    self.epoch = epoch
  }

  /// Features that make no sense here: rings are reset together, and the in-flight area needs split rings used in any order.
  private static let withheld: FeatureBits = [.ringReset, .ringPacked, .inOrder]

  /// What a backend's features become: addresses are offsets into the arena, which the driver must take from the DMA API.
  package static func features(_ device: FeatureBits) -> FeatureBits {
    device.subtracting(withheld).union([.accessPlatform, .version1])
  }

  package var text: String {
    let sizes = identity.queueSizes.map { "\($0)" }.joined(separator: ",")
    let features = String(Self.features(identity.offeredFeatures).rawValue, radix: 16)
    return "version=\(Self.version) device=\(identity.deviceID) vendor=0x1af4 features=0x\(features) "
      + "queues=\(identity.queueSizes.count) sizes=\(sizes) arena=\(maximumPages) config=\(configurationBytes) epoch=\(epoch) "
      + "readonly=1" + (identity.deviceID == 2 ? " fills=\(Self.filledBytes)" : "")
  }
}

/// The setup page, checked: what the driver accepted, where its rings are, and by which ports it is reached.
///
/// Made of a copy: the guest may change the page at any time.
package struct XenbusSetup: Equatable, Sendable {
  package static let bytes = 4096
  private static let magic: UInt32 = 0x3153_5856
  private static let directoryCapacity = 1024
  private static let queuesOffset = 0x100
  private static let queueBytes = 48

  package struct Queue: Equatable, Sendable {
    package var layout: QueueLayout
    /// The guest's port.
    package var port: UInt32
  }

  /// What was accepted, less what concerns the transport alone.
  package var features: FeatureBits
  package var pages: UInt32
  /// Pages 1 to this one are granted read-only, and hold what a device only reads of its rings.
  package var readOnlyPages: UInt32
  /// Grant references of the directory pages.
  package var directories: [UInt32]
  /// By number; nil where the driver uses none.
  package var queues: [Queue?]
}

extension XenbusSetup {
  package init(_ copy: UnsafeRawBufferPointer, _ offer: XenbusOffer) throws(SetupFault) {
    guard copy.count >= Self.bytes else { throw SetupFault("the setup page is cut") }
    func half(_ offset: Int) -> UInt16 {
      UInt16(littleEndian: copy.loadUnaligned(fromByteOffset: offset, as: UInt16.self))
    }
    func word(_ offset: Int) -> UInt32 {
      UInt32(littleEndian: copy.loadUnaligned(fromByteOffset: offset, as: UInt32.self))
    }
    func long(_ offset: Int) -> UInt64 {
      UInt64(littleEndian: copy.loadUnaligned(fromByteOffset: offset, as: UInt64.self))
    }
    guard word(0) == Self.magic else { throw SetupFault("the setup page has no magic number") }
    guard half(4) == XenbusOffer.version else { throw SetupFault("version \(half(4)) of the setup page is not known") }
    guard word(0x10) == offer.epoch else { throw SetupFault("the setup page answers another offer") }
    let accepted = FeatureBits(rawValue: long(8))
    let offered = XenbusOffer.features(offer.identity.offeredFeatures)
    guard accepted.isSubset(of: offered) else { throw SetupFault("features were accepted that were not offered") }
    guard accepted.isSuperset(of: [.version1, .accessPlatform]) else {
      throw SetupFault("VIRTIO_F_VERSION_1 and VIRTIO_F_ACCESS_PLATFORM must be accepted")
    }
    features = accepted.subtracting(.accessPlatform)
    pages = word(0x18)
    guard (2...min(offer.maximumPages, XenbusOffer.maximumPages)).contains(pages) else {
      throw SetupFault("an arena of \(pages) pages is not offered")
    }
    readOnlyPages = word(0x14)
    guard readOnlyPages < pages else {
      throw SetupFault("\(readOnlyPages) pages of an arena of \(pages) cannot be read-only")
    }
    let directoryCount = (Int(pages) + Self.directoryCapacity - 1) / Self.directoryCapacity
    guard Int(word(0x1c)) == directoryCount else {
      throw SetupFault("\(pages) pages need \(directoryCount) directories, not \(word(0x1c))")
    }
    directories = (0..<directoryCount).map { word(0x20 + 4 * $0) }
    queues = Array(repeating: nil, count: offer.identity.queueSizes.count)
    let count = Int(half(6))
    guard (1...queues.count).contains(count) else { throw SetupFault("\(count) queues are set up") }
    for position in 0..<count {
      let entry = Self.queuesOffset + position * Self.queueBytes
      let index = Int(half(entry))
      guard index < queues.count, queues[index] == nil else {
        throw SetupFault("queue \(index) is set up twice, or not offered")
      }
      queues[index] = try Self.queue(
        half(entry + 2), word(entry + 4), long(entry + 16), long(entry + 24), long(entry + 32), word(entry + 40),
        word(entry + 44), maximum: offer.identity.queueSizes[index], pages: pages, readOnlyPages: readOnlyPages,
        "queue \(index)")
    }
    let ports = queues.compactMap { $0?.port }
    guard Set(ports).count == ports.count else { throw SetupFault("two queues share a port") }
  }

  private static func queue(
    _ size: UInt16, _ port: UInt32, _ descriptors: UInt64, _ driver: UInt64, _ device: UInt64, _ inFlight: UInt32,
    _ inFlightBytes: UInt32, maximum: UInt16, pages: UInt32, readOnlyPages: UInt32, _ name: String
  ) throws(SetupFault) -> Queue {
    guard port != 0 else { throw SetupFault("\(name) has no port") }
    var layout = QueueLayout()
    layout.size = size
    layout.descriptorArea = descriptors
    layout.driverArea = driver
    layout.deviceArea = device
    if inFlightBytes != 0 {
      guard Int(inFlightBytes) == layout.inFlightBytes else {
        throw SetupFault("\(name): the in-flight area has a wrong size")
      }
      layout.inFlightArea = UInt64(inFlight)
    }
    do throws(VirtqueueFault) {
      try layout.validate(maximum: maximum)
    } catch {
      throw SetupFault("\(name): \(error.message)")
    }
    let end = UInt64(pages) << 12
    let writable = (UInt64(readOnlyPages) + 1) << 12
    let read = [(descriptors, layout.descriptorBytes), (driver, layout.driverBytes(packed: false))]
    var written = [(device, layout.deviceBytes(packed: false))]
    if let area = layout.inFlightArea { written.append((area, layout.inFlightBytes)) }
    for (start, length) in read + written {
      // No overflow: `validate` has looked at the sums.
      guard start >= 4096, start + UInt64(length) <= end else { throw SetupFault("\(name) is not inside the arena") }
    }
    if readOnlyPages > 0 {
      for (start, length) in read where start + UInt64(length) > writable {
        throw SetupFault("\(name): descriptors and available ring are not within the read-only pages")
      }
      for (start, _) in written where start < writable {
        throw SetupFault("\(name): the used ring or the in-flight area is in a read-only page")
      }
    }
    return Queue(layout: layout, port: port)
  }
}
