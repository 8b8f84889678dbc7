import EventLoop
import Glibc

/// A listening Unix socket on a loop.
final class ConsoleListener {
  private let descriptor: OwnedDescriptor
  private var accepting: AcceptLoop?
  private let place: TrustedPath

  /// - Parameters:
  ///   - mode: who may connect.
  ///   - onClient: gets each connection, which is its from then on.
  init(path: String, mode: mode_t = 0o660, loop: EventLoop, onClient: @escaping (Int32) -> Void) throws(ConsoleFault) {
    do throws(TrustedPath.Fault) {
      place = try TrustedPath(path, followsLast: false)
    } catch {
      throw ConsoleFault(message: "\(error)")
    }
    do throws(Errno) {
      let raw = try UnixSocket.listen(at: place, mode: mode, backlog: 16)
      descriptor = OwnedDescriptor(adopting: raw)
      accepting = try AcceptLoop(raw, on: loop, onClient: onClient)
    } catch {
      throw ConsoleFault(message: "\(error)")
    }
  }

  func close() {
    accepting?.close()
    try? place.remove(type: S_IFSOCK)
  }
}
