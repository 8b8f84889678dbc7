import Devices
import Engines
import EventLoop

/// What a block backend stores its data with: an image that all queues share, or a connection to a server for each queue.
enum BlockStorage {
  case raw(RawImage)
  /// A disk of no size, to be filled later.
  case empty
  case nbd(NBDAddress, first: NBDEngine)

  /// Opens what the settings name.
  ///
  /// - Parameter name: the device, for whoever finds the image in use.
  static func open(_ settings: BlockSettings, name: String, notice: @escaping NBDEngine.Notice) throws(ImageFault)
    -> BlockStorage
  {
    if settings.path.isEmpty { return .empty }
    guard NBDAddress.isAddress(settings.path) else {
      return .raw(
        try RawImage(
          path: settings.path, holder: name, readOnly: settings.readOnly, discard: settings.discard,
          direct: settings.direct, block: settings.blockSize))
    }
    let address = try NBDAddress(settings.path)
    return .nbd(address, first: try connect(address, settings, notice))
  }

  private static func connect(
    _ address: NBDAddress, _ settings: BlockSettings, _ notice: @escaping NBDEngine.Notice
  ) throws(ImageFault) -> NBDEngine {
    try NBDEngine(
      address: address, readOnly: settings.readOnly, discard: settings.discard, depth: settings.slots,
      reconnectMilliseconds: settings.reconnectMilliseconds, onNotice: notice)
  }

  private static func emptyEngine(_ settings: BlockSettings) throws(ImageFault) -> EmptyEngine {
    do throws(Errno) {
      return try EmptyEngine(depth: settings.slots)
    } catch {
      throw .host(what: "cannot make an empty disk", error)
    }
  }

  /// Queues that the store can serve.
  func queueCount(_ settings: BlockSettings) -> Int {
    switch self {
    case .raw, .empty: settings.queues
    case .nbd(_, let first): first.allowsSeveralQueues ? settings.queues : 1
    }
  }

  /// The engine of one queue.
  func engine(queue: Int, _ settings: BlockSettings, notice: @escaping NBDEngine.Notice) throws(ImageFault)
    -> any BlockEngine
  {
    switch self {
    case .raw(let image): try AIOEngine(image: image, depth: settings.slots)
    case .empty: try Self.emptyEngine(settings)
    case .nbd(let address, let first): queue == 0 ? first : try Self.connect(address, settings, notice)
    }
  }

  /// How data gets to the store, for people.
  var mode: String {
    switch self {
    case .raw(let image) where image.isDirect: "direct I/O"
    case .raw(let image) where image.hasSmallBlocks: "buffered I/O: direct I/O needs larger blocks than the disk has"
    case .raw: "buffered I/O: the file system refuses O_DIRECT"
    case .nbd: "NBD"
    case .empty: "empty"
    }
  }

  var isDirect: Bool {
    if case .raw(let image) = self { image.isDirect } else { false }
  }

  /// Follows the size of the store, see `RawImage.resize`.
  func resize(to bytes: UInt64?) throws(ImageFault) -> UInt64 {
    switch self {
    case .raw(let image): return try image.resize(to: bytes)
    case .empty: throw .cannotResize(path: "", "the disk is empty; 'vxctl attach' fills it")
    case .nbd(let address, _):
      throw .cannotResize(path: address.text, "the size of an NBD export is read when the device is made")
    }
  }
}
