package import Devices
package import EventLoop
package import JSON
package import Lifecycle
package import Virtqueue
package import Xen

/// One block backend, as the supervisor wants it. Values are checked already.
package struct BlockSettings: DeviceSettings {
  /// The image: a raw file, a block device, or the address of an NBD export (`NBDAddress`).
  package var path: String
  package var readOnly: Bool
  /// Whether the guest may discard; offered only where the image can.
  package var discard: Bool
  /// Answer to GET_ID, at most 20 bytes are used.
  package var serial: String
  /// Try O_DIRECT first.
  package var direct = true
  /// How requests get to the kernel; of no meaning for NBD.
  package var engine = BlockEngineChoice.auto
  /// The logical block size that the guest sees, a power of two from 512 to 4096; nil for what the store needs.
  package var blockSize: UInt32?
  package var cache = BlockCacheMode.writeback
  package var errors = BlockErrorPolicy()
  /// How long a request is tried again where `errors` says so, in milliseconds.
  package var retryMilliseconds: UInt64 = 30_000 {
    didSet {
      for member in [\BlockErrorPolicy.onError, \BlockErrorPolicy.onNoSpace] {
        if case .retry = errors[keyPath: member] { errors[keyPath: member] = .retry(milliseconds: retryMilliseconds) }
      }
    }
  }
  /// Virtqueues, 1 to 64; an NBD export whose connections do not see each other's writes gets one.
  package var queues = 1
  /// Threads that serve them, 1 to `queues`.
  package var threads = 1
  /// Entries of each virtqueue at most, 1 to 32768; a power of two where the driver uses split rings.
  package var queueSize: UInt16 = 256
  /// Buffers that a chain may have, where the driver is known to look at SEG_MAX; nil for what its queues could hold. Each of them has its
  /// place in the journal.
  package var longestChain: Int?
  /// Offer the packed ring format.
  package var packed = false
  /// Offer to use buffers in order: a slow request then holds back the answers of those after it.
  package var inOrder = false
  /// Memory for data on its way between the guest and the image, in bytes, for each queue.
  package var bounceBytes = 4 << 20
  /// How long requests wait for a lost NBD server before they fail, in milliseconds.
  package var reconnectMilliseconds: UInt64 = 60_000
  /// Age of a request from which on the watchdog reports it, in milliseconds.
  package var stuckMilliseconds: UInt64 = 30_000
  /// A store that is gone (its device was removed) stops the device until it is restarted, instead of failing requests.
  package var stopsWhenStorageIsGone = false
  /// Offer exactly these features: what the driver of a running device knows. What the store cannot do of them fails as unsupported.
  package var offered: FeatureBits?
  package var transport: RegisterTransport?
  /// What its supervisor does when the backend fails.
  package var restart = RestartPolicy()
  package var slot: UInt8?
  /// What the device may use.
  package var limits = RateLimits()
  /// Copy through the bounce buffers also where the engine could reach guest memory: for measurements.
  package var copiesAlways = false

  package init(path: String, readOnly: Bool, discard: Bool, serial: String) {
    self.path = path
    self.readOnly = readOnly
    self.discard = discard
    self.serial = serial
  }

  /// Requests of one queue that are worked on at a time at most.
  var slots: Int { min(Int(queueSize), 256) }

  /// Bits that come from the settings alone.
  var ringFeatures: FeatureBits {
    var features: FeatureBits = []
    if packed { features.insert(.ringPacked) }
    if inOrder { features.insert(.inOrder) }
    return features
  }

  var pump: BlockPumpSettings {
    var settings = BlockPumpSettings()
    settings.serial = Array(serial.utf8)
    settings.bounceBytes = bounceBytes
    settings.copiesAlways = copiesAlways
    settings.cache = cache
    settings.errors = errors
    settings.stopsWhenStorageIsGone = stopsWhenStorageIsGone
    let threads = max(1, min(self.threads, queues))
    settings.queuesOnThread = (queues + threads - 1) / threads
    return settings
  }

  // MARK: DeviceSettings

  package static let type = VirtioType.disk
  /// A disk needs an image, which comes with its entry in Xenstore or later: profiles declare spares.
  package static let canBeDeclared = false

  package var image: String? {
    get { path }
    set { path = newValue ?? "" }
  }

  package init(options members: [JSONValue.Member], for owner: DeviceOwner, _ field: String) throws(SettingFault) {
    self.init(path: "", readOnly: false, discard: true, serial: owner.device)
    try apply(members, field)
  }

  /// Options of a profile on top of what is there.
  package mutating func apply(_ members: [JSONValue.Member], _ field: String) throws(SettingFault) {
    try Self.options.apply(members, to: &self, field)
    try checkOptions(field)
  }

  package var optionTexts: [(name: String, value: String)] { Self.options.texts(self) }

  package static var documents: [OptionDocument] {
    [
      options.document("Disks", BlockSettings(path: "", readOnly: false, discard: false, serial: ""))
        .withoutCommonOptions
    ]
  }

  package mutating func keep(queueSizes: [UInt16]) {
    queues = queueSizes.count
    threads = min(threads, queues)
    queueSize = queueSizes.first ?? queueSize
  }

  /// The size of its blocks is what the driver of a running disk asked for once: another store follows it.
  package mutating func keep(configuration: [UInt8]) {
    if let size = BlockConfiguration.logicalBlock(of: configuration) { blockSize = size }
  }

  package func start(
    _ context: DeviceBackend.Context,
    completion: @escaping @Sendable (Result<DeviceBackend, StartFault>) -> Void
  ) -> [LoopThread] {
    BlockBackend.start(self, context, decorate: context.decorate) { completion($0.map { $0 }) }
  }
}
