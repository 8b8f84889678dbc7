import EventLoop
import Glibc

/// Where a port's output is written down: a file that is rotated by its size, or lines for the daemon's log (the journal, under systemd).
final class ConsoleLog {
  private let settings: ConsoleLogSettings
  private var descriptor: Int32 = -1
  private var size: UInt64 = 0
  private var isLineStart = true

  init(_ settings: ConsoleLogSettings) throws(ConsoleFault) {
    self.settings = settings
    try openFile()
  }

  deinit { if descriptor >= 0 { close(descriptor) } }

  private func openFile() throws(ConsoleFault) {
    do {
      // Not through links of others: this process may write where those may not.
      descriptor = try TrustedPath(settings.path, followsLast: false).open(O_WRONLY | O_CREAT | O_APPEND, mode: 0o640)
    } catch {
      throw ConsoleFault(message: "\(error)")
    }
    var status = stat()
    size = fstat(descriptor, &status) == 0 ? UInt64(max(0, status.st_size)) : 0
  }

  /// Writes; what the file system does not take is lost.
  func write(_ bytes: UnsafeRawBufferPointer) {
    guard settings.hasTimestamps else { return put(bytes) }
    var text: [UInt8] = []
    for byte in bytes {
      if isLineStart { text += Self.timestamp }
      text.append(byte)
      isLineStart = byte == 10
    }
    text.withUnsafeBytes { put($0) }
  }

  private func put(_ bytes: UnsafeRawBufferPointer) {
    if size &+ UInt64(bytes.count) > settings.bytesLimit, size > 0 { rotate() }
    guard descriptor >= 0 else { return }
    let count = Glibc.write(descriptor, bytes.baseAddress, bytes.count)
    if count > 0 { size &+= UInt64(count) }
  }

  /// FILE becomes FILE.1, and so on up to the last that is kept.
  private func rotate() {
    close(descriptor)
    descriptor = -1
    if let place = try? TrustedPath(settings.path, followsLast: false) {
      for number in stride(from: settings.kept, to: 0, by: -1) {
        place.rename(number == 1 ? "" : ".\(number - 1)", to: ".\(number)")
      }
      if settings.kept == 0 { try? place.remove(type: S_IFREG) }
    }
    do throws(ConsoleFault) { try openFile() } catch { size = 0 }
  }

  /// Coordinated universal time, to the millisecond.
  private static var timestamp: [UInt8] {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    var parts = tm()
    var seconds = time.tv_sec
    gmtime_r(&seconds, &parts)
    var text = [CChar](repeating: 0, count: 32)
    let count = strftime(&text, 32, "%Y-%m-%dT%H:%M:%S", &parts)
    let milliseconds = "\(1000 + time.tv_nsec / 1_000_000)".dropFirst()
    return text[..<count].map { UInt8(bitPattern: $0) } + Array(".\(milliseconds)Z ".utf8)
  }
}

/// A log file of a port.
package struct ConsoleLogSettings: Equatable, Sendable {
  package var path: String
  /// Size beyond which a new file is begun, in bytes.
  package var bytesLimit: UInt64 = 1 << 20
  /// Older files that are kept.
  package var kept = 3
  package var hasTimestamps = false

  package init(path: String) { self.path = path }
}
