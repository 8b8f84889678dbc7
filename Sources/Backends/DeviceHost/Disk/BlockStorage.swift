import Devices
import Engines
import EventLoop

/// How the requests on an image or a block device get to the kernel, as operators choose it.
package enum BlockEngineChoice: String, CaseIterable, Sendable {
  /// libaio, in this version.
  case auto
  case ioUring = "io_uring"
  case libaio
}

/// What a block backend stores its data with: an image that all queues share, or a connection to a server for each queue.
enum BlockStorage {
  case raw(RawImage, by: Way)
  /// A disk of no size, to be filled later.
  case empty
  case nbd(NBDAddress, first: NBDEngine)

  /// How requests on an image get to the kernel.
  enum Way {
    case ioUring
    /// - Parameter instead: why not by io_uring, where that was wanted.
    case libaio(instead: String?)
  }

  /// Opens what the settings name.
  ///
  /// - Parameters:
  ///   - name: the device, for whoever finds the image in use.
  ///   - left: how to wait for requests that an ended process left behind.
  static func open(
    _ settings: BlockSettings, name: String, notice: @escaping NBDEngine.Notice, after left: LeftRequests
  ) throws(ImageFault) -> BlockStorage {
    if settings.path.isEmpty { return .empty }
    guard NBDAddress.isAddress(settings.path) else {
      let image = try RawImage(
        path: settings.path, holder: name, readOnly: settings.readOnly, discard: settings.discard,
        direct: settings.direct, block: settings.blockSize, after: left)
      return .raw(image, by: way(settings.engine))
    }
    let address = try NBDAddress(settings.path)
    return .nbd(address, first: try connect(address, settings, notice))
  }

  private static func way(_ wanted: BlockEngineChoice) -> Way {
    switch wanted {
    // io_uring is for those who ask for it, until it has been through all that libaio has.
    case .auto, .libaio: return .libaio(instead: nil)
    case .ioUring: return .ioUring
    }
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

  /// The engine of one queue. Where the kernel makes no io_uring, this and the queues after it are served by libaio.
  mutating func engine(queue: Int, _ settings: BlockSettings, notice: @escaping NBDEngine.Notice) throws(ImageFault)
    -> any BlockEngine
  {
    switch self {
    case .raw(let image, .ioUring):
      do throws(Errno) {
        return try IOUringEngine(image: image, depth: settings.slots)
      } catch {
        self = .raw(image, by: .libaio(instead: IOUringEngine.reason(error)))
        return try AIOEngine(image: image, depth: settings.slots)
      }
    case .raw(let image, .libaio): return try AIOEngine(image: image, depth: settings.slots)
    case .empty: return try Self.emptyEngine(settings)
    case .nbd(let address, let first): return queue == 0 ? first : try Self.connect(address, settings, notice)
    }
  }

  /// How data gets to the store, for people.
  var mode: String {
    switch self {
    case .raw(let image, let way): "\(Self.access(image)), by \(Self.name(way))"
    case .nbd: "NBD"
    case .empty: "empty"
    }
  }

  private static func access(_ image: RawImage) -> String {
    image.isDirect
      ? "direct I/O"
      : image.hasSmallBlocks
        ? "buffered I/O: direct I/O needs larger blocks than the disk has"
        : "buffered I/O: the file system refuses O_DIRECT"
  }

  private static func name(_ way: Way) -> String {
    switch way {
    case .ioUring: "io_uring"
    case .libaio(nil): "libaio"
    case .libaio(let reason?): "libaio: \(reason)"
    }
  }

  /// The engine in use: a name of `BlockEngineChoice`; nil where there is no choice.
  var engineName: BlockEngineChoice? {
    switch self {
    case .raw(_, .ioUring): .ioUring
    case .raw(_, .libaio): .libaio
    case .nbd, .empty: nil
    }
  }

  var isDirect: Bool {
    if case .raw(let image, _) = self { image.isDirect } else { false }
  }

  /// Follows the size of the store, see `RawImage.resize`.
  func resize(to bytes: UInt64?) throws(ImageFault) -> UInt64 {
    switch self {
    case .raw(let image, _): return try image.resize(to: bytes)
    case .empty: throw .cannotResize(path: "", "the disk is empty; 'vxctl attach' fills it")
    case .nbd(let address, _):
      throw .cannotResize(path: address.text, "the size of an NBD export is read when the device is made")
    }
  }
}
