import Devices
import Engines
import EventLoop
import Glibc
import TestSupport
import Testing

/// Paths on whose way somebody else has put a link: vxd may open more than whoever can do that.
@Suite(.serialized, .enabled(if: geteuid() == 0, "links of other users can be made by root only"))
struct TrustedPathTests {
  private let folder = TemporaryFolder()
  private static let stranger: UInt32 = 54321

  /// A link of another user.
  private func link(_ name: String, to target: String, owner: UInt32 = stranger) -> String {
    let path = folder.path + "/" + name
    #expect(symlink(target, path) == 0)
    #expect(lchown(path, owner, owner) == 0)
    return path
  }

  private func imageFault(_ path: String) -> String? {
    do {
      _ = try RawImage(path: path, holder: "a", readOnly: false, discard: false)
      return nil
    } catch {
      return error.message
    }
  }

  @Test func imageIsNotOpenedThroughALinkOfAnotherUser() throws {
    let image = folder.file("image", bytes: 1 << 20)
    #expect(imageFault(link("own", to: image, owner: 0)) == nil)
    #expect(
      imageFault(link("relative", to: "../\(folder.path.split(separator: "/").last ?? "")/image", owner: 0)) == nil)
    let fault = imageFault(link("foreign", to: image))
    #expect(fault?.contains("'foreign' is a symbolic link of user 54321") == true, "\(fault ?? "opened")")
    // Neither is one on the way, nor one that a trusted link leads to.
    mkdir(folder.path + "/folder", 0o755)
    _ = folder.file("folder/image", bytes: 1 << 20)
    _ = link("way", to: folder.path + "/folder")
    #expect(imageFault(folder.path + "/way/image")?.contains("'way' is a symbolic link of user 54321") == true)
    #expect(imageFault(link("chain", to: "foreign", owner: 0))?.contains("'foreign'") == true)
    #expect(imageFault(folder.path + "/folder/../image") == nil)
  }

  @Test func linksThatLeadNowhereEnd() throws {
    #expect(
      imageFault(link("loop", to: "loop", owner: 0))
        == "cannot open '\(folder.path)/loop': Too many levels of symbolic links")
    #expect(imageFault(link("dangling", to: "nowhere", owner: 0))?.hasSuffix("No such file or directory") == true)
    #expect(imageFault(folder.path + "/image/x")?.hasSuffix("No such file or directory") == true)
    let image = folder.file("image", bytes: 1 << 20)
    #expect(imageFault(image + "/x")?.hasSuffix("Not a directory") == true)
    #expect(imageFault(folder.path) != nil)
    #expect(imageFault("/") != nil)
    #expect(imageFault(folder.path + "/..") != nil)
  }

  private func open(_ change: (inout ConsolePortSettings) -> Void) throws -> String? {
    var settings = ConsolePortSettings(name: "", isConsole: true)
    settings.historyBytes = 0
    change(&settings)
    let thread = try LoopThread(name: "console")
    defer { thread.stopAndJoin() }
    let final = settings
    let outcome = Outcome()
    thread.perform {
      let place = ConsolePort.Place(
        loop: thread.loop, counters: QueueCounters(), viewerPath: nil, historyPath: nil, mayAttach: { _ in true },
        logLine: { _ in })
      do { try ConsolePort(final, place).close() } catch { outcome.message = "\(error)" }
    }
    return outcome.message
  }

  private final class Outcome: @unchecked Sendable {
    // Invariant behind @unchecked Sendable: written before `perform` returns, read afterwards.
    var message: String?
  }

  @Test func consoleFilesAreNotMadeBehindALinkOfAnotherUser() throws {
    let precious = folder.path + "/precious"
    mkdir(precious, 0o755)
    _ = link("way", to: precious)
    let way = folder.path + "/way/file"
    #expect(try open { $0.log = ConsoleLogSettings(path: way) }?.contains("symbolic link of user") == true)
    #expect(try open { $0.socket = .listen(way) }?.contains("symbolic link of user") == true)
    #expect(try open { $0.pty = way }?.contains("symbolic link of user") == true)
    #expect(namesInFolder(precious) == [])
    // Where the link is root's, all of it works.
    #expect(lchown(folder.path + "/way", 0, 0) == 0)
    #expect(try open { $0.log = ConsoleLogSettings(path: way) } == nil)
    #expect(namesInFolder(precious) == ["file"])
    unlink(way)
    #expect(try open { $0.socket = .listen(way) } == nil)
    #expect(try open { $0.pty = way } == nil)
    #expect(namesInFolder(precious) == [])
  }

  @Test func socketHasItsModeAndIsReachedByItsPath() throws {
    let path = folder.path + "/socket"
    let listener = OwnedDescriptor(
      adopting: try UnixSocket.listen(at: TrustedPath(path, followsLast: false), mode: 0o640, backlog: 4))
    var status = stat()
    #expect(stat(path, &status) == 0)
    #expect(status.st_mode & 0o7777 == 0o640)
    close(try UnixSocket.connect(path))
    close(try UnixSocket.connect(trusted: path))
    #expect(throws: Errno(ELOOP)) { _ = try UnixSocket.connect(trusted: link("foreign", to: path)) }
    _ = listener.raw
  }

  /// As a mounted file system, a volume group or swap: the kernel knows who uses a block device.
  @Test(.enabled(if: LoopDevice.areThere, "loop devices cannot be made here"))
  func blockDeviceThatTheHostUsesIsRefused() throws {
    let device = try #require(LoopDevice(folder.file("store", bytes: 4 << 20)))
    defer { device.detach() }
    let user = Glibc.open(device.path, O_RDONLY | O_EXCL | O_CLOEXEC)
    #expect(user >= 0)
    #expect(imageFault(device.path)?.contains("is in use on this host") == true)
    // Reading is nobody's harm.
    #expect(throws: Never.self) {
      _ = try RawImage(path: device.path, holder: "a", readOnly: true, discard: false)
    }
    close(user)
    let disk = try RawImage(path: device.path, holder: "web1/xvde", readOnly: false, discard: false)
    #expect(imageFault(device.path)?.contains("in use by web1/xvde") == true)
    // Another node of the same device is another file, and the same store.
    let alias = folder.path + "/alias"
    #expect(mknod(alias, S_IFBLK | 0o600, device.number) == 0)
    #expect(imageFault(alias)?.contains("is in use on this host") == true)
    withExtendedLifetime(disk) {}
  }
}
