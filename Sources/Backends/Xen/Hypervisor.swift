/// The hypervisor as vxd uses it. libxen implements it, and so does the simulator.
package protocol Hypervisor: AnyObject, Sendable {
  /// A line for the operator: which Xen this is.
  var summary: String { get }
  /// Handles on one guest. Fails when the privilege or a device node is missing.
  func open(_ domain: DomainID) throws(XenError) -> any GuestHandle
  /// Grants and event channels of one guest, for which no privilege is needed.
  func openGrants(_ domain: DomainID) throws(XenError) -> any GrantHandle
  /// Whether an HVM guest has Xen's drivers, as libxl finds out: by their event channels' callback. With them its kernel suspends itself before it is
  /// saved, and its drivers reset their devices then. nil where that cannot be asked.
  func hasXenDrivers(_ domain: DomainID) -> Bool?
}

/// One guest's ioreq server, memory, event channels and interrupt lines.
///
/// The ioreq server, its page and the event channels belong to the guest's ioreq thread. Mapping calls and interrupt lines
/// may be used from any thread.
package protocol GuestHandle: AnyObject, Sendable {
  // Ioreq server (xen: public/hvm/dm_op.h)
  func createIOReqServer() throws(XenError) -> UInt16
  func destroyIOReqServer(_ server: UInt16) throws(XenError)
  func setIOReqServer(_ server: UInt16, enabled: Bool) throws(XenError)
  /// Has the guest's accesses to a range answered by the server. EEXIST when a part of it is the server's already; that another server
  /// has it is not noticed, and then the server that was made last is asked.
  func claim(_ range: AccessRange, for server: UInt16) throws(XenError)
  func release(_ range: AccessRange, from server: UInt16) throws(XenError)
  /// Maps the page with the synchronous slots; it must be mapped before the server is enabled, or the slots get no ports.
  func mapIOReqPage(_ server: UInt16) throws(XenError) -> UnsafeMutableRawPointer
  func unmapIOReqPage()

  // Event channels (xen: public/event_channel.h)
  /// Readable when an event is pending.
  var eventDescriptor: Int32 { get }
  /// Binds a port that the guest (or Xen for it) allocated for us; returns our port.
  func bind(remotePort: UInt32) throws(XenError) -> UInt32
  func unbind(_ port: UInt32)
  func notify(_ port: UInt32)
  /// Takes the next pending port, which stays masked until `unmask`; nil when there is none.
  func nextEvent() -> UInt32?
  func unmask(_ port: UInt32)

  // Interrupts
  /// x86: level of an INTx pin of a slot on bus 0.
  func setPCIIntx(device: UInt8, pin: UInt8, high: Bool)
  /// Arm: level of a shared peripheral interrupt.
  func setIRQ(_ irq: UInt32, high: Bool)
  /// x86: sends a message-signalled interrupt; false when Xen does not accept it.
  func injectMSI(address: UInt64, data: UInt32) -> Bool

  // Memory
  /// Maps frames read-write and contiguously. A frame that cannot be mapped has its errno in `errors`.
  ///
  /// - Returns: nil when nothing could be mapped at all.
  func map(
    frames: UnsafePointer<UInt64>, count: Int, errors: UnsafeMutablePointer<Int32>
  ) -> UnsafeMutableRawPointer?
  func unmap(_ start: UnsafeMutableRawPointer, count: Int)
}
