import ControlAPI
import EventLoop
import Glibc

/// QEMU's monitor, for one client: greets, takes the handshake, says what is on the bus.
final class MonitorOfQEMU {
  private let thread: LoopThread
  private let listener: OwnedDescriptor
  /// Opened when somebody has connected.
  let isAsked = Latch()

  /// - Parameter devices: nil for a QEMU that hangs: who connects hears nothing.
  init(path: String, devices: String?) throws {
    listener = OwnedDescriptor(adopting: socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0))
    let listening = listener.raw
    try UnixSocket.withAddress(path) { bind(listening, $0, $1) }
    guard listen(listening, 1) == 0 else { throw Errno.last }
    thread = try LoopThread(name: "monitor")
    thread.loop.enqueue { [isAsked] in
      let client = OwnedDescriptor(adopting: accept(listening, nil, nil))
      isAsked.open()
      guard let devices else {
        var byte: UInt8 = 0
        // Until the other end has enough of it.
        while recv(client.raw, &byte, 1, 0) > 0 {}
        return
      }
      func say(_ line: String) {
        var bytes = Array((line + "\r\n").utf8)
        _ = send(client.raw, &bytes, bytes.count, Int32(MSG_NOSIGNAL))
      }
      func hear() -> String {
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = recv(client.raw, &bytes, bytes.count, 0)
        return String(decoding: bytes.prefix(max(count, 0)), as: UTF8.self)
      }
      say(#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#)
      guard hear().contains("qmp_capabilities") else { return }
      say(#"{"return": {}}"#)
      guard hear().contains("query-pci") else { return }
      say(#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RTC_CHANGE", "data": {"offset": 0}}"#)
      say(#"{"return": [{"bus": 0, "devices": [\#(devices)]}]}"#)
      _ = hear()
    }
  }

  /// Also where nobody has come.
  func end() {
    shutdown(listener.raw, Int32(SHUT_RDWR))
    thread.stopAndJoin()
  }
}
