import Engines
import Xen

/// Taps that vxd made and did not remove: their names say whose they are ("vxDOMAIN.SUFFIX").
enum TapSweeper {
  static func domain(of name: String) -> DomainID? {
    guard name.hasPrefix("vx"), let dot = name.firstIndex(of: ".") else { return nil }
    return DomainID(name[name.index(name.startIndex, offsetBy: 2)..<dot])
  }

  static func remove(where isOrphan: (DomainID) -> Bool) {
    for name in NetworkInterface.all {
      if let domain = domain(of: name), isOrphan(domain) { TapDevice.remove(name) }
    }
  }
}
