import CXen
import EventLoop
import Glibc

extension XenStore {
  /// Makes a directory whose nodes belong to one domain and may be read by another; nodes made below it inherit that.
  package func makeDirectory(
    _ path: String, owner: DomainID, reader: DomainID, in transaction: UInt32
  ) throws(XenError) {
    guard xs_mkdir(handle, transaction, path) else { throw XenError("xs_mkdir \(path)", Errno.last) }
    // The first entry names the owner and what everybody else may do; xenstored's own values are 0 none, 1 read.
    var permissions = [
      xs_permissions(id: UInt32(owner), perms: .init(XS_PERM_NONE)),
      xs_permissions(id: UInt32(reader), perms: .init(XS_PERM_READ)),
    ]
    guard xs_set_permissions(handle, transaction, path, &permissions, 2) else {
      throw XenError("xs_set_permissions \(path)", Errno.last)
    }
  }
}
