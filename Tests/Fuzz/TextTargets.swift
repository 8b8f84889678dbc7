import ControlAPI
import DeviceHost
import Engines
import Supervisor
import Xen

/// Entries of Xenstore: keys and values from the input, one "key=value" a line; and what their values may name.
enum EntryTarget {
  private static let correct = [
    "frontend": "/local/domain/5/device/virtio_disk/51776", "frontend-id": "5", "online": "1", "state": "1",
    "params": "/disk.img", "type": "standalone", "specification": "virtio", "transport": "mmio", "dev": "xvde",
    "mode": "w", "discard-enable": "1", "base": "0", "irq": "0",
  ]

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    let text = String(decoding: bytes, as: UTF8.self)
    var keys = correct
    for line in text.split(separator: "\n", maxSplits: 32) {
      let parts = line.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      if parts.count == 2 { keys[String(parts[0])] = String(parts[1]) } else { keys[String(parts[0])] = nil }
    }
    for kind in [DeviceKey.Kind.disk, .generic] {
      let key = DeviceKey(kind: kind, domain: 5, device: 51776)
      guard let entry = try? DeviceEntry.parse(key, keys) else { continue }
      consume(try? entry.slot(key, taken: [0, 1], count: 8))
    }
    consume(try? NBDAddress(text))
    if let number = try? DeviceEntry.number("x", text) {
      consume(DeviceEntry.diskIndex(UInt32(truncatingIfNeeded: number)))
    }
    consume(FrontendText.key(.disk, path: text))
  }
}

/// Messages on the control socket, with the daemon's own methods; and profiles, which are JSON too.
enum ControlTarget {
  private static let methods = SupervisorControl.methods(board: StatusBoard(), isSimulated: true)

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    let message = Array(bytes)
    if let answer = methods.answer(message, subscribe: { _ in .null }) {
      // What is sent must be JSON again.
      precondition((try? JSONText.parse(Array(JSONText.text(answer).utf8))) != nil, "the answer is no JSON")
    }
    if let value = try? JSONText.parse(message) { consume(try? Profiles(value)) }
  }
}
