import ControlAPI
import EventLoop
import Glibc

/// QEMU's monitor, for one client: greets, takes the handshake, says what is on the bus.
final class MonitorOfQEMU {
  private let thread: LoopThread

  init(path: String, devices: String) throws {
    let listener = OwnedDescriptor(adopting: socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0))
    try UnixSocket.withAddress(path) { bind(listener.raw, $0, $1) }
    guard listen(listener.raw, 1) == 0 else { throw Errno.last }
    thread = try LoopThread(name: "monitor")
    thread.loop.enqueue {
      let client = OwnedDescriptor(adopting: accept(listener.raw, nil, nil))
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

  func end() { thread.stopAndJoin() }
}
