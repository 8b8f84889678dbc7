import ControlAPI
import EventLoop
import SimulatedXen
import TestSupport
import Testing
import Xen

/// A simulated Xen and xenstored of this process, and a vxd beside it that can be killed.
final class DaemonStage {
  let folder = TemporaryFolder()
  let hypervisor = SimulatedHypervisor()
  let server: XenstoreServer
  let simulator: SimulatorServer
  let toolstack: SimulatedToolstack
  let daemon: DaemonProcess
  let socket: String
  let state: String

  /// - Parameter wrapper: a program with its arguments that starts vxd in its place.
  init(profiles: String? = nil, under wrapper: [String] = []) throws {
    server = try XenstoreServer(path: folder.path + "/xenstored")
    simulator = try SimulatorServer(hypervisor: hypervisor, path: folder.path + "/xen")
    toolstack = try SimulatedToolstack(server: server, hypervisor: hypervisor)
    socket = folder.path + "/control.sock"
    state = folder.path + "/state"
    var arguments = [
      "--simulated-xen", simulator.path, "--simulated-xenstore", server.path, "--socket", socket, "--state", state,
    ]
    if let profiles { arguments += ["--profiles", folder.file("profiles.json", text: profiles)] }
    daemon = DaemonProcess(arguments, log: folder.path + "/log", under: wrapper)
    try daemon.start()
  }

  deinit {
    daemon.kill()
    simulator.stop()
    server.stop()
  }

  func guest(_ identifier: DomainID, name: String, disks: [String], vcpus: Int = 1) throws -> SimulatedDomain {
    let domain = try SimulatedDomain(identifier: identifier, memoryBytes: 32 << 20, vcpuCount: vcpus)
    try toolstack.create(domain, name: name)
    for disk in disks {
      try toolstack.attach(disk: disk, image: folder.file("\(name)-\(disk).img", bytes: 4 << 20), to: identifier)
    }
    for disk in disks {
      try #require(
        toolstack.wait(for: "2", of: "state", disk: disk, domain: identifier), "\(disk): \(daemon.report)")
    }
    return domain
  }

  /// Whether a vxd answers that serves so many devices.
  func isServing(_ devices: Int64) -> Bool {
    guard let client = try? ControlClient(path: socket), let list = try? client.call("device.list") else {
      return false
    }
    return list.arrayValue?.filter { $0["state"] == "connected" }.count ?? 0 == devices
  }
}
