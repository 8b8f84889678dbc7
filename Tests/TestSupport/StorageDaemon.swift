import Engines
import EventLoop
import Glibc

/// qemu-storage-daemon with one raw export over a Unix socket.
package final class StorageDaemon {
  /// The export's NBD address.
  package let address: String
  private let socket: String
  private let process: ChildProcess

  /// Whether there is one here: tests that need it are skipped otherwise.
  package static let isInstalled = ChildProcess.isInstalled("qemu-storage-daemon")

  package init(folder: TemporaryFolder, image: String) throws {
    socket = folder.path + "/nbd.sock"
    address = "nbd+unix:///disk?socket=\(socket)"
    unlink(socket)
    let arguments = [
      "--blockdev", "driver=file,node-name=file,filename=\(image),discard=unmap", "--blockdev",
      "driver=raw,node-name=image,file=file,discard=unmap", "--nbd-server", "addr.type=unix,addr.path=\(socket)",
      "--export", "type=nbd,id=export,node-name=image,name=disk,writable=on",
    ]
    process = try ChildProcess("qemu-storage-daemon", arguments)
    let path = socket
    guard eventually({ access(path, F_OK) == 0 && (try? NBDProbe.connect(path)) != nil }) else {
      throw Errno(ETIMEDOUT)
    }
  }

  /// Freezes the server: connections stay, nothing is answered.
  package func pause() { process.signal(SIGSTOP) }
  package func resume() { process.signal(SIGCONT) }

  package func stop() {
    process.kill()
    unlink(socket)
  }
}

/// Whether somebody listens.
private enum NBDProbe {
  static func connect(_ path: String) throws {
    _ = try NBDEngine(
      address: try NBDAddress("nbd+unix:///disk?socket=\(path)"), readOnly: true, discard: false, depth: 1,
      reconnectMilliseconds: 0, onNotice: { _ in })
  }
}
