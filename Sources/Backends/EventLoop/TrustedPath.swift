package import CLinux
package import Glibc

/// Opens paths that an operator or a profile names without following symbolic links into other hands: vxd may open more than whoever can put a
/// link into one of the folders on the way. A link is followed if root or vxd's own user owns it. (Linux does not let users make hard links to
/// others' files, fs.protected_hardlinks.)
package struct TrustedPath: ~Copyable {
  /// Why a path leads nowhere.
  package struct Fault: Error, CustomStringConvertible {
    package var errno: Errno
    package var description: String

    init(_ errno: Errno) {
      self.errno = errno
      description = errno.description
    }

    init(link: String, owner: UInt32) {
      errno = Errno(ELOOP)
      description =
        "'\(link)' is a symbolic link of user \(owner), and only those of root are followed (name its target, or use 'chown -h root')"
    }
  }

  /// Links on the way at most, as the kernel has it.
  private static let linkLimit = 40

  /// The folder, opened with O_PATH.
  package let folder: OwnedDescriptor
  /// A name in it; "." for the folder itself.
  package let name: String

  /// Finds the folder of a path, which must be there.
  ///
  /// - Parameters:
  ///   - path: absolute.
  ///   - followsLast: whether a link at the path's end is followed.
  package init(_ path: String, followsLast: Bool) throws(Fault) {
    guard path.hasPrefix("/"), !path.utf8.contains(0) else { throw Fault(Errno(EINVAL)) }
    var folder = OwnedDescriptor(adopting: try Self.step(AT_FDCWD, "/", O_DIRECTORY))
    var rest = Self.parts(path)
    var links = 0
    while let name = rest.popLast() {
      let isLast = rest.isEmpty
      guard !isLast || followsLast && name != ".." else {
        if name == ".." { throw Fault(Errno(EINVAL)) }
        self.folder = folder
        self.name = name
        return
      }
      let next: Int32
      do throws(Fault) { next = try Self.step(folder.raw, name, isLast: isLast) } catch {
        // A file that is to be created has a place all the same.
        guard isLast, error.errno.code == ENOENT else { throw error }
        self.folder = folder
        self.name = name
        return
      }
      let entry = OwnedDescriptor(adopting: next)
      var status = stat()
      guard fstat(entry.raw, &status) == 0 else { throw Fault(Errno.last) }
      guard status.st_mode & S_IFMT == S_IFLNK else {
        if isLast {
          self.folder = folder
          self.name = name
          return
        }
        folder = entry
        continue
      }
      links += 1
      guard links <= Self.linkLimit else { throw Fault(Errno(ELOOP)) }
      guard status.st_uid == 0 || status.st_uid == geteuid() else { throw Fault(link: name, owner: status.st_uid) }
      let target = try Self.target(entry.raw)
      if target.hasPrefix("/") { folder = OwnedDescriptor(adopting: try Self.step(AT_FDCWD, "/", O_DIRECTORY)) }
      rest += Self.parts(target)
    }
    self.folder = folder
    self.name = "."
  }

  /// The last component first.
  private static func parts(_ path: String) -> [String] {
    path.split(separator: "/").filter { $0 != "." }.reversed().map(String.init)
  }

  private static func step(_ folder: Int32, _ name: String, _ flags: Int32) throws(Fault) -> Int32 {
    do throws(Errno) {
      return try retrying { openat(folder, name, clinux_o_path() | O_CLOEXEC | flags) }
    } catch {
      throw Fault(error)
    }
  }

  /// One component, which may be a link. O_DIRECTORY has the kernel mount what is to be mounted there (autofs), and refuses links.
  private static func step(_ folder: Int32, _ name: String, isLast: Bool) throws(Fault) -> Int32 {
    guard !isLast else { return try step(folder, name, O_NOFOLLOW) }
    do throws(Fault) {
      return try step(folder, name, O_NOFOLLOW | O_DIRECTORY)
    } catch {
      guard error.errno.code == ENOTDIR else { throw error }
      return try step(folder, name, O_NOFOLLOW)
    }
  }

  private static func target(_ link: Int32) throws(Fault) -> String {
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = bytes.withUnsafeMutableBytes { bytes in
      bytes.baseAddress.map { readlinkat(link, "", $0, bytes.count) } ?? -1
    }
    guard count > 0, count < bytes.count else { throw Fault(count < 0 ? Errno.last : Errno(ENAMETOOLONG)) }
    return String(decoding: bytes[..<count], as: UTF8.self)
  }

  /// A path of the same file that no link is on the way of, for calls that take paths only. Ends with this value.
  package var path: String { "/proc/self/fd/\(folder.raw)/\(name)" }

  /// Opens the file, which is no link.
  package func open(_ flags: Int32, mode: mode_t = 0) throws(Errno) -> Int32 {
    try retrying { openat(folder.raw, name, flags | O_CLOEXEC | O_NOCTTY | O_NOFOLLOW, mode) }
  }

  /// What is there; nil for nothing.
  package var status: stat? {
    var status = stat()
    return fstatat(folder.raw, name, &status, AT_SYMLINK_NOFOLLOW) == 0 ? status : nil
  }

  /// Removes a file of a type; anything else at that place is somebody's.
  ///
  /// - Throws: EADDRINUSE for another type.
  package func remove(type: mode_t) throws(Errno) {
    guard let status else { return }
    guard status.st_mode & S_IFMT == type else { throw Errno(EADDRINUSE) }
    unlinkat(folder.raw, name, 0)
  }

  /// Renames a file whose name begins with this one, to another such name.
  package func rename(_ old: String, to new: String) {
    renameat(folder.raw, name + old, folder.raw, name + new)
  }
}

extension UnixSocket {
  /// Calls `body`, which answers as `connect` does, with the address of a socket that is there, whatever comes to be at its path meanwhile.
  package static func withAddress(
    ofSocket path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
  ) throws(Errno) {
    let raw: Int32
    do throws(TrustedPath.Fault) {
      let place = try TrustedPath(path, followsLast: true)
      do throws(Errno) { raw = try place.open(clinux_o_path()) } catch { throw TrustedPath.Fault(error) }
    } catch {
      throw error.errno
    }
    let socket = OwnedDescriptor(adopting: raw)
    try withAddress("/proc/self/fd/\(socket.raw)", body)
  }

  /// A non-blocking connection; a listener whose queue is full refuses it.
  package static func connect(trusted path: String) throws(Errno) -> Int32 {
    let raw = try make(nonBlocking: true)
    do throws(Errno) {
      try withAddress(ofSocket: path) { Glibc.connect(raw, $0, $1) }
    } catch {
      close(raw)
      throw error
    }
    return raw
  }

  /// A socket with a name that is made now; one that an earlier daemon left is replaced. Listens, and is non-blocking.
  package static func listen(at place: borrowing TrustedPath, mode: mode_t, backlog: Int32) throws(Errno) -> Int32 {
    let raw = try make(nonBlocking: true)
    do throws(Errno) {
      try place.remove(type: S_IFSOCK)
      try withAddress(place.path) { bind(raw, $0, $1) }
      // Not by the mask of the process: other threads make files too. And not by the path, at which by now may be something else.
      let made = OwnedDescriptor(adopting: try place.open(clinux_o_path()))
      var status = stat()
      guard fstat(made.raw, &status) == 0 else { throw Errno.last }
      guard status.st_mode & S_IFMT == S_IFSOCK, status.st_uid == geteuid() else { throw Errno(EADDRINUSE) }
      guard chmod("/proc/self/fd/\(made.raw)", mode) == 0, Glibc.listen(raw, backlog) == 0 else { throw Errno.last }
    } catch {
      close(raw)
      throw error
    }
    return raw
  }
}
