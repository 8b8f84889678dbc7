import Engines
import EventLoop
import Glibc

/// qemu-storage-daemon with one raw export over a Unix socket.
package final class StorageDaemon {
  /// The export's NBD address.
  package let address: String
  private let socket: String
  private var process: pid_t = 0

  package init(folder: TemporaryFolder, image: String) throws {
    socket = folder.path + "/nbd.sock"
    address = "nbd+unix:///disk?socket=\(socket)"
    unlink(socket)
    let arguments = [
      "qemu-storage-daemon", "--blockdev", "driver=file,node-name=file,filename=\(image),discard=unmap", "--blockdev",
      "driver=raw,node-name=image,file=file,discard=unmap", "--nbd-server", "addr.type=unix,addr.path=\(socket)",
      "--export", "type=nbd,id=export,node-name=image,name=disk,writable=on",
    ]
    var pointers: [UnsafeMutablePointer<CChar>?] = arguments.map { strdup($0) } + [nil]
    defer { for pointer in pointers { free(pointer) } }
    let result = posix_spawnp(&process, "qemu-storage-daemon", nil, nil, &pointers, environ)
    guard result == 0 else { throw Errno(result) }
    let path = socket
    guard eventually({ access(path, F_OK) == 0 && (try? NBDProbe.connect(path)) != nil }) else {
      throw Errno(ETIMEDOUT)
    }
  }

  /// Freezes the server: connections stay, nothing is answered.
  package func pause() { kill(process, SIGSTOP) }
  package func resume() { kill(process, SIGCONT) }

  package func stop() {
    kill(process, SIGKILL)
    var status: Int32 = 0
    waitpid(process, &status, 0)
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
