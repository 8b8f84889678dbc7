package import Glibc

/// A loop device of a file, made by losetup.
package struct LoopDevice {
  package let path: String
  package var number: dev_t {
    var status = stat()
    stat(path, &status)
    return status.st_rdev
  }

  package static let areThere: Bool = {
    let folder = TemporaryFolder()
    guard let device = LoopDevice(folder.file("probe", bytes: 1 << 20)) else { return false }
    device.detach()
    return true
  }()

  package init?(_ file: String) {
    guard let made = try? ChildProcess.run("losetup", ["--find", "--show", file]), made.status == 0 else { return nil }
    path = made.output.split(separator: "\n").first.map(String.init) ?? ""
  }

  package func detach() { _ = try? ChildProcess.run("losetup", ["--detach", path]) }
}
