import Devices
import Engines

/// Options of disks that libxl cannot carry.
extension BlockSettings {
  package static let options = OptionTable<BlockSettings>(
    [
      .number("queues", 1...64, \.queues, "virtqueues"),
      .number("threads", 1...64, \.threads, "threads that serve them"),
      .number(
        "queueSize", 1...32768, \.queueSize,
        "maximum entries of each queue; a power of two, unless `packed` is true; 1024 over Xenbus when it is not given"),
      .flag("packed", \.packed, "offer the packed ring format (not over Xenbus)"),
      .flag("inOrder", \.inOrder, "offer in-order use of buffers"),
      .flag("direct", \.direct, "try O_DIRECT"),
      .choice(
        "engine", \.engine,
        "how requests get to the kernel: `auto`, which is `libaio` in this version; or `io_uring`, which is an experiment: try it with "
          + "your load first. Where the kernel permits no io_uring, libaio is used; `vxctl show` has the engine and the reason"
      ),
      OptionRow(
        "blockSize", .powerOfTwo(512...4096),
        "logical block size of the disk in bytes; smaller than direct I/O on the image needs, it makes I/O buffered",
        default: "what direct I/O on the image needs", read: { $0.blockSize.map { "\($0)" } ?? "not set" }
      ) { settings, given in settings.blockSize = UInt32(clamping: given.number) },
      .choice(
        "cache", \.cache,
        "`writeback`: durable on flush, and the guest may switch to write-through; `writethrough`: every write is durable when it "
          + "completes; `unsafe`: flushes do nothing"),
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
        "stuckSeconds", 1...86_400, \.stuckMilliseconds, unit: 1000, "age from which the watchdog reports a request"),
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
        "bounceMiB", .number(1...256), "memory for data in flight, for each queue, in MiB",
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
