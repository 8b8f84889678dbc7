import CXen
import EventLoop
import Glibc

/// The real hypervisor, through libxendevicemodel, libxenforeignmemory and libxenevtchn.
package final class LibxenHypervisor: Hypervisor {
  package init() {}

  package var summary: String {
    func line(_ name: String) -> String {
      guard let file = fopen("/sys/hypervisor/\(name)", "re") else { return "" }
      defer { fclose(file) }
      var text = [CChar](repeating: 0, count: 64)
      guard fgets(&text, 64, file) != nil else { return "" }
      return String(decoding: text.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
    let major = line("version/major")
    return major.isEmpty ? "no Xen found" : "Xen \(major).\(line("version/minor"))\(line("version/extra"))"
  }

  package func open(_ domain: DomainID) throws(XenError) -> any GuestHandle {
    try LibxenGuest(domain)
  }

  package func openGrants(_ domain: DomainID) throws(XenError) -> any GrantHandle { try LibxenGrants(domain) }

  package func hasXenDrivers(_ domain: DomainID) -> Bool? {
    guard let call = xencall_open(nil, 0) else { return nil }
    defer { xencall_close(call) }
    var callback: UInt64 = 0
    guard cxen_hvm_parameter(call, domain, UInt32(HVM_PARAM_CALLBACK_IRQ), &callback) >= 0 else { return nil }
    return callback != 0
  }
}

/// Ties a file of event channels to one domain. Linux (drivers/xen/evtchn.c) cannot do that for domain 0, whose frontends a driver domain serves
/// as any other's.
func restrict(_ channels: OpaquePointer, to domain: DomainID) throws(XenError) {
  guard domain != 0, xenevtchn_restrict(channels, domain) < 0 else { return }
  throw XenError("xenevtchn_restrict", Errno.last)
}

/// Handles of the libxen libraries for one guest.
///
/// A set of handles per guest keeps guests apart: event channel calls take a mutex per open file in the kernel. And the kernel refuses
/// every call on them that concerns another domain, so that a confusion of guests ends as an error and not in a neighbour's memory.
final class LibxenGuest: GuestHandle, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the handles are immutable and their libraries may be called from any thread
  // (plain ioctls and mmap); `resource` belongs to the ioreq thread.

  private let domain: DomainID
  private let deviceModel: OpaquePointer
  private let foreignMemory: OpaquePointer
  private let eventChannels: OpaquePointer
  private var resource: OpaquePointer?

  init(_ domain: DomainID) throws(XenError) {
    self.domain = domain
    guard let deviceModel = xendevicemodel_open(nil, 0) else { throw XenError("xendevicemodel_open", Errno.last) }
    guard let foreignMemory = xenforeignmemory_open(nil, 0) else {
      let failure = XenError("xenforeignmemory_open", Errno.last)
      xendevicemodel_close(deviceModel)
      throw failure
    }
    guard let eventChannels = xenevtchn_open(nil, 0) else {
      let failure = XenError("xenevtchn_open", Errno.last)
      xendevicemodel_close(deviceModel)
      xenforeignmemory_close(foreignMemory)
      throw failure
    }
    self.deviceModel = deviceModel
    self.foreignMemory = foreignMemory
    self.eventChannels = eventChannels
    try check("xendevicemodel_restrict", xendevicemodel_restrict(deviceModel, domain))
    try check("xenforeignmemory_restrict", xenforeignmemory_restrict(foreignMemory, domain))
    try restrict(eventChannels, to: domain)
    // The descriptor is blocking when opened, and a spurious wake-up must not stop the ioreq thread.
    let descriptor = xenevtchn_fd(eventChannels)
    _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK)
  }

  deinit {
    unmapIOReqPage()
    xenevtchn_close(eventChannels)
    xenforeignmemory_close(foreignMemory)
    xendevicemodel_close(deviceModel)
  }

  private func check(_ operation: String, _ result: Int32) throws(XenError) {
    guard result >= 0 else { throw XenError(operation, Errno.last) }
  }

  func createIOReqServer() throws(XenError) -> UInt16 {
    var server: ioservid_t = 0
    try check(
      "create_ioreq_server",
      xendevicemodel_create_ioreq_server(deviceModel, domain, 0 /* HVM_IOREQSRV_BUFIOREQ_OFF */, &server))
    return server
  }

  func destroyIOReqServer(_ server: UInt16) throws(XenError) {
    try check("destroy_ioreq_server", xendevicemodel_destroy_ioreq_server(deviceModel, domain, server))
  }

  func setIOReqServer(_ server: UInt16, enabled: Bool) throws(XenError) {
    try check(
      "set_ioreq_server_state", xendevicemodel_set_ioreq_server_state(deviceModel, domain, server, enabled ? 1 : 0))
  }

  func claim(_ range: AccessRange, for server: UInt16) throws(XenError) {
    let result =
      switch range {
      case .memory(let range):
        xendevicemodel_map_io_range_to_ioreq_server(
          deviceModel, domain, server, 1, range.lowerBound, range.upperBound)
      case .ports(let range):
        xendevicemodel_map_io_range_to_ioreq_server(
          deviceModel, domain, server, 0, range.lowerBound, range.upperBound)
      case .configuration(let address):
        xendevicemodel_map_pcidev_to_ioreq_server(
          deviceModel, domain, server, 0, 0, address.device, address.function)
      }
    try check("claim of \(range)", result)
  }

  func release(_ range: AccessRange, from server: UInt16) throws(XenError) {
    let result =
      switch range {
      case .memory(let range):
        xendevicemodel_unmap_io_range_from_ioreq_server(
          deviceModel, domain, server, 1, range.lowerBound, range.upperBound)
      case .ports(let range):
        xendevicemodel_unmap_io_range_from_ioreq_server(
          deviceModel, domain, server, 0, range.lowerBound, range.upperBound)
      case .configuration(let address):
        xendevicemodel_unmap_pcidev_from_ioreq_server(
          deviceModel, domain, server, 0, 0, address.device, address.function)
      }
    try check("release of \(range)", result)
  }

  func mapIOReqPage(_ server: UInt16) throws(XenError) -> UnsafeMutableRawPointer {
    var address: UnsafeMutableRawPointer?
    // Frame 0 is the buffered page, frame 1 holds the synchronous slots (XENMEM_resource_ioreq_server_frame_ioreq(0)).
    resource = xenforeignmemory_map_resource(
      foreignMemory, domain, UInt32(XENMEM_resource_ioreq_server), UInt32(server), 1, 1, &address,
      PROT_READ | PROT_WRITE, 0)
    guard resource != nil, let address else { throw XenError("map_resource of the ioreq page", Errno.last) }
    return address
  }

  func unmapIOReqPage() {
    guard let mapped = resource else { return }
    xenforeignmemory_unmap_resource(foreignMemory, mapped)
    resource = nil
  }

  var eventDescriptor: Int32 { xenevtchn_fd(eventChannels) }

  func bind(remotePort: UInt32) throws(XenError) -> UInt32 {
    let port = xenevtchn_bind_interdomain(eventChannels, UInt32(domain), remotePort)
    try check("bind_interdomain", port)
    return UInt32(port)
  }

  func unbind(_ port: UInt32) { xenevtchn_unbind(eventChannels, port) }

  func notify(_ port: UInt32) { xenevtchn_notify(eventChannels, port) }

  func nextEvent() -> UInt32? {
    // xenevtchn_pending reads one port; -1 with EAGAIN when there is none.
    let port = xenevtchn_pending(eventChannels)
    return port < 0 ? nil : UInt32(port)
  }

  func unmask(_ port: UInt32) { xenevtchn_unmask(eventChannels, port) }

  func setPCIIntx(device: UInt8, pin: UInt8, high: Bool) {
    xendevicemodel_set_pci_intx_level(deviceModel, domain, 0, 0, device, pin, high ? 1 : 0)
  }

  func setIRQ(_ irq: UInt32, high: Bool) {
    xendevicemodel_set_irq_level(deviceModel, domain, irq, high ? 1 : 0)
  }

  func injectMSI(address: UInt64, data: UInt32) -> Bool {
    xendevicemodel_inject_msi(deviceModel, domain, address, data) >= 0
  }

  func map(
    frames: UnsafePointer<UInt64>, count: Int, errors: UnsafeMutablePointer<Int32>
  ) -> UnsafeMutableRawPointer? {
    // xen_pfn_t has 64 bits on every architecture that vxd runs on.
    UnsafeRawPointer(frames).withMemoryRebound(to: xen_pfn_t.self, capacity: count) {
      xenforeignmemory_map(foreignMemory, UInt32(domain), PROT_READ | PROT_WRITE, count, $0, errors)
    }
  }

  func unmap(_ start: UnsafeMutableRawPointer, count: Int) {
    xenforeignmemory_unmap(foreignMemory, start, count)
  }
}
