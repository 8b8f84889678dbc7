import Devices
import Engines

/// Options of disks that libxl cannot carry.
extension BlockSettings {
  package static let options = OptionTable<BlockSettings>(
    [
      .number("queues", 1...64, \.queues, "number of virtqueues"),
      .number("threads", 1...64, \.threads, "number of threads that serve the virtqueues"),
      .number(
        "queueSize", 1...32768, \.queueSize,
        "maximum number of entries of each queue; a power of two unless `packed` is true; over Xenbus, the default is 1024"
      ),
      .flag("packed", \.packed, "offer the packed ring format (not over Xenbus)"),
      .flag("inOrder", \.inOrder, "offer in-order use of buffers (VIRTIO_F_IN_ORDER)"),
      .flag("direct", \.direct, "use O_DIRECT if the image allows it"),
      .choice(
        "engine", \.engine,
        "kernel interface for I/O: `auto` means `libaio` in this version; `io_uring` is experimental, so test it with your load first. If the "
          + "kernel does not permit io_uring, libaio is used; `vxctl show` gives the engine and the reason"
      ),
      OptionRow(
        "blockSize", .powerOfTwo(512...4096),
        "logical block size of the disk in bytes; if direct I/O on the image needs a larger one, I/O is buffered",
        default: "what direct I/O on the image needs", read: { $0.blockSize.map { "\($0)" } ?? "not set" }
      ) { settings, given in settings.blockSize = UInt32(clamping: given.number) },
      .choice(
        "cache", \.cache,
        "`writeback`: writes are durable after a flush, and the guest may switch to write-through; `writethrough`: every write is durable when "
          + "it completes; `unsafe`: flushes do nothing"),
      action(
        "onError", \.onError,
        "action on I/O errors other than ENOSPC: `report` to the guest, `retry` for up to `retrySeconds`, or `hold` the device until "
          + "`vxctl resume`"),
      action("onNoSpace", \.onNoSpace, "action on ENOSPC: `report`, `retry` or `hold`"),
      OptionRow(
        "retrySeconds", .number(1...3600), "how long a request is retried",
        read: { "\($0.retryMilliseconds / 1000)" }
      ) { settings, given in settings.retryMilliseconds = given.number * 1000 },
      .number(
        "stuckSeconds", 1...86_400, \.stuckMilliseconds, unit: 1000, "age of a request at which the watchdog reports it"
      ),
      // libxl wants a target that exists: it names a file then, and the address stands here.
      OptionRow(
        "nbd", .text,
        "an NBD export that replaces the disk's target: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
        default: "", read: { NBDAddress.isAddress($0.path) ? $0.path : "not set" }
      ) { (settings: inout BlockSettings, given) throws(SettingFault) in
        do throws(ImageFault) {
          settings.path = try NBDAddress(given.text).text
        } catch {
          throw SettingFault(
            field: given.field,
            reason: "expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; \(error.message)")
        }
      },
      .number(
        "reconnectSeconds", 0...86_400, \.reconnectMilliseconds, unit: 1000,
        "how long requests wait for a lost NBD server before they fail"),
      OptionRow(
        "bounceMiB", .number(1...256), "memory for data in flight, in MiB for each queue",
        read: { "\($0.bounceBytes >> 20)" }
      ) { settings, given in settings.bounceBytes = Int(given.number) << 20 },
    ] + commonRows)

  private static func action(
    _ name: String, _ member: any WritableKeyPath<BlockErrorPolicy, BlockErrorPolicy.Action> & Sendable, _ help: String
  ) -> OptionRow<BlockSettings> {
    OptionRow(
      name, .choice(["report", "retry", "hold"]), help,
      read: {
        switch $0.errors[keyPath: member] {
        case .report: "report"
        case .retry: "retry"
        case .hold: "hold"
        }
      }
    ) { settings, given in
      settings.errors[keyPath: member] =
        switch given.text {
        case "retry": .retry(milliseconds: settings.retryMilliseconds)
        case "hold": .hold
        default: .report
        }
    }
  }

  /// What the options say only together.
  func checkOptions(_ field: String) throws(SettingFault) {
    guard packed || queueSize.nonzeroBitCount == 1 else {
      throw SettingFault(
        field: "\(field).queueSize",
        reason: "expected a power of two for split rings, not \(queueSize); or set \"packed\" to true")
    }
  }
}
