import EventLoop
import Synchronization
package import Xen

/// An in-process hypervisor with simulated domains.
package final class SimulatedHypervisor: Hypervisor {
  private let domains = Mutex<[DomainID: SimulatedDomain]>([:])

  package init() {}

  package var summary: String { "simulated Xen" }

  package func open(_ domain: DomainID) throws(XenError) -> any GuestHandle {
    guard let found = domains.withLock({ $0[domain] }) else { throw XenError("open", Errno(3 /* ESRCH */)) }
    if SimulatedDomain.strikes(found.openFailures) { throw XenError("open", Errno(24 /* EMFILE */)) }
    return try SimulatedGuestHandle(found)
  }

  package func openGrants(_ domain: DomainID) throws(XenError) -> any GrantHandle {
    guard let found = domains.withLock({ $0[domain] }) else { throw XenError("openGrants", Errno(3 /* ESRCH */)) }
    return SimulatedGrantHandle(found)
  }

  package func hasXenDrivers(_ domain: DomainID) -> Bool? {
    domains.withLock { $0[domain] }?.hasXenDrivers.load(ordering: .relaxed)
  }

  func domain(_ identifier: DomainID) -> SimulatedDomain? { domains.withLock { $0[identifier] } }

  /// Makes a domain known; it runs from now on.
  package func add(_ domain: SimulatedDomain) { domains.withLock { $0[domain.identifier] = domain } }

  /// Destroys a domain: calls of its handles fail from now on.
  package func remove(_ identifier: DomainID) {
    let gone = domains.withLock { $0.removeValue(forKey: identifier) }
    gone?.destroy()
  }
}
