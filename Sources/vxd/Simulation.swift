import Logging
import SimulatedXen
import Xen

/// `vxd --simulate`: the simulated Xen.
final class Simulation {
  let socketPath = ""
  let hypervisor: any Hypervisor

  init(_ h: any Hypervisor) { hypervisor = h }
  static func make() throws -> Simulation { Simulation(LibxenHypervisor()) }
  func play(log: Logger) {}
  func stop() {}
}
