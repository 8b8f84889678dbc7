import CSystemd
import ControlAPI
import Glibc
package import Logging

/// Log lines to the journal, with priority and the fields GUEST= and DEVICE=.
package struct JournalLogHandler: LogHandler {
  package var metadata: Logger.Metadata = [:]
  /// The process's level; one logger alone has none.
  package var logLevel: Logger.Level {
    get { LogLevel.current }
    set {}
  }

  package init() {}

  package subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  package func log(event: LogEvent) {
    var fields = [
      "MESSAGE=\("\(event.message)".visible(keepsLines: true))", "PRIORITY=\(Self.priority(event.level))",
      "SYSLOG_IDENTIFIER=vxd",
    ]
    for (name, value) in metadata.merging(event.metadata ?? [:], uniquingKeysWith: { $1 }) {
      fields.append("\(name)=\("\(value)".visible(keepsLines: false))")
    }
    let texts = fields.map { Array($0.utf8) }
    let joined = texts.flatMap { $0 }
    joined.withUnsafeBytes { bytes in
      guard let start = bytes.baseAddress else { return }
      var offset = 0
      var vectors: [iovec] = []
      for text in texts {
        vectors.append(iovec(iov_base: UnsafeMutableRawPointer(mutating: start + offset), iov_len: text.count))
        offset += text.count
      }
      sd_journal_sendv(vectors, Int32(vectors.count))
    }
  }

  /// syslog's priorities.
  private static func priority(_ level: Logger.Level) -> Int {
    switch level {
    case .trace, .debug: 7
    case .info: 6
    case .notice: 5
    case .warning: 4
    case .error: 3
    case .critical: 2
    }
  }
}

/// Log lines to standard error: time, level, message.
package struct PlainLogHandler: LogHandler {
  package var metadata: Logger.Metadata = [:]
  /// The process's level; one logger alone has none.
  package var logLevel: Logger.Level {
    get { LogLevel.current }
    set {}
  }

  package init() {}

  package subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  package func log(event: LogEvent) {
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    var parts = tm()
    gmtime_r(&now.tv_sec, &parts)
    var stamp = [CChar](repeating: 0, count: 32)
    let length = strftime(&stamp, stamp.count, "%H:%M:%S", &parts)
    let time = String(decoding: stamp[..<length].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    let milliseconds = String(1000 + now.tv_nsec / 1_000_000).dropFirst()
    // To a terminal, as may be: words of guests among it.
    let line = "\(time).\(milliseconds) \(event.level) \("\(event.message)".visible(keepsLines: true))\n"
    var bytes = line[...]
    bytes.withUTF8 { _ = write(2, $0.baseAddress, $0.count) }
  }
}
