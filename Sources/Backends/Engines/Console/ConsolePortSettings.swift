/// One port of a console device: its name in the guest, and who is at its other end, several at once.
package struct ConsolePortSettings: Equatable, Sendable {
  package enum Socket: Equatable, Sendable {
    /// A Unix socket that is made here; one client at a time.
    case listen(String)
    /// Another program's Unix socket, tried every second: all the time, or while the guest has its port open.
    case connect(String, whenOpen: Bool)
  }

  /// What happens to output that an end cannot take now.
  package enum Overflow: String, CaseIterable, Sendable {
    /// It is dropped and counted: the guest never waits.
    case drop
    /// The guest waits.
    case wait
  }

  /// The port's name in the guest (/dev/virtio-ports/NAME); a console may have none.
  package var name: String
  /// A terminal for the guest (/dev/hvcN), rather than a channel for a program.
  package var isConsole: Bool
  package var overflow: Overflow
  package var socket: Socket?
  /// Path of a link to a pty's other side.
  package var pty: String?
  package var log: ConsoleLogSettings?
  /// Lines go to the daemon's log.
  package var logsLines = false
  /// Bytes that are remembered for whoever attaches; 0 for none.
  package var historyBytes: Int

  package init(name: String, isConsole: Bool) {
    self.name = name
    self.isConsole = isConsole
    overflow = isConsole ? .drop : .wait
    historyBytes = isConsole ? 64 << 10 : 0
  }
}
