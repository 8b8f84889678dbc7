package import EventLoop

/// Why an image cannot be opened. The message says what the operator can do.
package enum ImageFault: Error {
  case cannotOpen(path: String, Errno)
  /// A link on the way, or the way itself.
  case cannotFollow(path: String, String)
  /// A block device in use; by one of our own disks, where that is known.
  case busy(path: String, holder: String?)
  case notAnImage(path: String)
  case tooSmall(path: String, bytes: UInt64)
  case locked(path: String, holder: String)
  case cannotResize(path: String, String)
  /// A URI that names no export of an NBD server.
  case badAddress(String, String)
  case nbd(String, String)
  case host(what: String, Errno)

  package var message: String {
    switch self {
    case .cannotOpen(let path, let errno): "cannot open '\(path)': \(errno)"
    case .cannotFollow(let path, let reason): "cannot open '\(path)': \(reason)"
    case .busy(let path, let holder?): "'\(path)' is in use by \(holder); two writers would corrupt it"
    case .busy(let path, nil):
      "'\(path)' is in use on this host: mounted, part of a volume group or RAID, swap, or open elsewhere (see lsblk); two writers would corrupt it"
    case .notAnImage(let path): "'\(path)' is neither a regular file nor a block device"
    case .tooSmall(let path, let bytes): "'\(path)' has \(bytes) bytes; a disk needs at least 512"
    case .locked(let path, let holder): "'\(path)' is in use by \(holder); two writers would corrupt it"
    case .cannotResize(let path, let reason): "cannot resize '\(path)': \(reason)"
    case .badAddress(let address, let reason): "'\(address)' is not a valid NBD address: \(reason)"
    case .nbd(let address, let reason): "cannot use '\(address)': \(reason)"
    case .host(let what, let errno): "\(what): \(errno)"
    }
  }
}
