import CLinux
package import EventLoop
import Glibc

/// What a client may do, by who it is.
package enum ControlRole: Int, Comparable, Sendable, CaseIterable {
  /// Look.
  case view
  /// Change devices of guests.
  case operate
  /// Change the daemon.
  case admin

  package var name: String { "\(self)" }

  package static func < (left: ControlRole, right: ControlRole) -> Bool { left.rawValue < right.rawValue }
}

/// Which role a user has. Root and the daemon's own user are admin; others have the best role of their groups; anyone who can connect
/// has role view.
package struct ControlAccess: Equatable, Sendable {
  package var operators: Set<UInt32> = []
  package var admins: Set<UInt32> = []

  package init() {}

  /// The number of a group by name or number.
  package static func group(_ name: String) throws(Errno) -> UInt32 {
    if let number = UInt32(name) { return number }
    guard let entry = getgrnam(name) else { throw Errno(ENOENT) }
    return entry.pointee.gr_gid
  }

  /// The role of a user with groups.
  package func role(user: UInt32, groups: Set<UInt32>) -> ControlRole {
    if user == 0 || user == geteuid() || !admins.isDisjoint(with: groups) { return .admin }
    return operators.isDisjoint(with: groups) ? .view : .operate
  }

  /// A socket's peer, as it was when it connected.
  package func caller(of descriptor: Int32) -> ControlCaller {
    var (process, user, group): (UInt32, UInt32, UInt32) = (0, 0, 0)
    guard clinux_peer_credentials(descriptor, &process, &user, &group) == 0 else {
      return ControlCaller(role: .view, user: .max, group: .max)
    }
    var groups = [UInt32](repeating: 0, count: 256)
    let count = clinux_peer_groups(descriptor, &groups, UInt32(groups.count))
    let role = role(user: user, groups: Set(groups[..<Int(max(0, min(count, 256)))]).union([group]))
    return ControlCaller(role: role, user: user, group: group, process: process)
  }
}

/// The caller: the credentials of the process that connected, as the kernel reports them, and the resulting role.
package struct ControlCaller: Equatable, Sendable {
  package var role: ControlRole
  package var user: UInt32
  package var group: UInt32
  /// 0 when it is not known.
  package var process: UInt32

  package init(role: ControlRole, user: UInt32 = geteuid(), group: UInt32 = getegid(), process: UInt32 = 0) {
    self.role = role
    self.user = user
    self.group = group
    self.process = process
  }
}
