import Lifecycle
import Logging
import Xen

/// The one place that writes Xenstore. Confined to the supervisor's loop.
///
/// Every write is guarded: an entry that the toolstack has removed meanwhile must not come back by it.
final class XenstoreWriter {
  private let reader: XenstoreReader
  private let log: Logger

  init(_ reader: XenstoreReader, log: Logger) {
    self.reader = reader
    self.log = log
  }

  func write(_ key: DeviceKey, _ name: String, _ value: String) {
    change(key, "write \(key.path)/\(name)") { xenstore, transaction throws(XenError) in
      try xenstore.write("\(key.path)/\(name)", value, in: transaction)
    }
  }

  /// The `error` node; nil removes it.
  func writeError(_ key: DeviceKey, _ reason: String?) {
    if let reason { return write(key, "error", reason) }
    guard reader.node(key, "error") != nil else { return }
    try? reader.connection?.remove("\(key.path)/error")
  }

  /// The `state` node, when it holds one of `over` now.
  func writeState(_ key: DeviceKey, _ state: XenbusState, over: [XenbusState]) {
    // Most often it does not, and needs no transaction.
    guard let old = reader.node(key, "state"), over.contains(where: { $0.rawValue == old }) else { return }
    change(key, "write \(key.path)/state") { xenstore, transaction throws(XenError) in
      guard let old = xenstore.read("\(key.path)/state", in: transaction), old != state.rawValue,
        over.contains(where: { $0.rawValue == old })
      else { return }
      try xenstore.write("\(key.path)/state", state.rawValue, in: transaction)
    }
  }

  /// Tells the toolstack that everything of the device is given back.
  ///
  /// Only an entry whose end is wanted is told so, as it is now: the toolstack may have removed it meanwhile, which a write would undo, or
  /// have made the device anew, which would never be served then.
  func writeClosed(_ key: DeviceKey) {
    change(key, "write \(key.path)/state") { [reader] xenstore, transaction throws(XenError) in
      guard let old = try xenstore.readIfThere("\(key.path)/state", in: transaction), old != XenbusState.closed.rawValue
      else { return }
      if old != XenbusState.closing.rawValue,
        try xenstore.readIfThere("\(key.path)/online", in: transaction) != "0",
        let frontend = try xenstore.readIfThere("\(key.path)/frontend", in: transaction),
        try reader.hasFrontend(key, ["frontend": frontend], in: transaction)
      {
        return
      }
      try xenstore.write("\(key.path)/state", XenbusState.closed.rawValue, in: transaction)
    }
  }

  /// State 2, with what the driver needs to set the device up.
  func offer(_ key: DeviceKey, _ offer: String, configuration: String) {
    change(key, "write the offer of \(key.path)") { xenstore, transaction throws(XenError) in
      let path = key.path
      // An end that the toolstack wants is not overwritten.
      guard xenstore.read("\(path)/state", in: transaction) != XenbusState.closing.rawValue else { return }
      // What was said of an earlier setup is not about one of this offer.
      try xenstore.remove("\(path)/vx-ack", in: transaction)
      try xenstore.write("\(path)/vx-offer", offer, in: transaction)
      try xenstore.write("\(path)/vx-config", configuration, in: transaction)
      try xenstore.write("\(path)/state", XenbusState.initWait.rawValue, in: transaction)
    }
  }

  /// Removes an entry, and what is empty then, as libxl does.
  func remove(_ key: DeviceKey) {
    guard let xenstore = reader.connection else { return }
    try? xenstore.remove(key.path)
    let parent = "backend/\(key.kind.rawValue)"
    for path in ["\(parent)/\(key.domain)", parent] where xenstore.list(path)?.isEmpty == true {
      try? xenstore.remove(path)
    }
  }

  private func change(
    _ key: DeviceKey, _ words: String, _ body: (XenStore, UInt32) throws(XenError) -> Void
  ) {
    guard let xenstore = reader.connection else { return }
    do throws(XenError) {
      try xenstore.transaction { transaction throws(XenError) in
        guard xenstore.list(key.path, in: transaction) != nil else { return }
        try body(xenstore, transaction)
      }
    } catch {
      log.warning("cannot \(words): \(error)")
    }
  }
}
