import CXen
import EventLoop
import Glibc
import Transport

/// Grants of one guest by libxengnttab, its event channels by libxenevtchn.
final class LibxenGrants: GrantHandle, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: the handle is immutable, and its library may be called from any thread.

  private let domain: DomainID
  private let grants: OpaquePointer

  init(_ domain: DomainID) throws(XenError) {
    self.domain = domain
    guard let grants = xengnttab_open(nil, 0) else { throw XenError("xengnttab_open", Errno.last) }
    self.grants = grants
  }

  deinit { xengnttab_close(grants) }

  func map(_ references: [UInt32], writable: Bool) throws(XenError) -> UnsafeMutableRawPointer {
    var references = references
    let mapped = xengnttab_map_domain_grant_refs(
      grants, UInt32(references.count), UInt32(domain), &references, writable ? PROT_READ | PROT_WRITE : PROT_READ)
    guard let mapped else { throw XenError("map of \(references.count) grants", Errno.last) }
    return mapped
  }

  func unmap(_ start: UnsafeMutableRawPointer, count: Int) { xengnttab_unmap(grants, start, UInt32(count)) }

  func copy(
    _ reference: UInt32, offset: Int, count: Int, local: UnsafeMutableRawPointer, toGuest: Bool
  ) throws(XenError) -> Bool {
    guard offset >= 0, count >= 0, offset + count <= 4096 else { return false }
    // The local side must not cross a page of ours.
    var done = 0
    while done < count {
      let start = local + done
      let room = 4096 - Int(UInt(bitPattern: start) & 4095)
      let step = min(count - done, room)
      var segment = xengnttab_grant_copy_segment()
      segment.len = UInt16(step)
      if toGuest {
        segment.source.virt = start
        segment.dest.foreign.ref = reference
        segment.dest.foreign.offset = UInt16(offset + done)
        segment.dest.foreign.domid = domain
        segment.flags = 2  // GNTCOPY_dest_gref
      } else {
        segment.source.foreign.ref = reference
        segment.source.foreign.offset = UInt16(offset + done)
        segment.source.foreign.domid = domain
        segment.dest.virt = start
        segment.flags = 1  // GNTCOPY_source_gref
      }
      guard xengnttab_grant_copy(grants, 1, &segment) == 0 else { throw XenError("grant copy", Errno.last) }
      guard segment.status == 0 else { return false }  // GNTST_okay
      done += step
    }
    return true
  }

  func doorbell(remotePort: UInt32) throws(XenError) -> any QueueDoorbell {
    try LibxenDoorbell(domain, remotePort)
  }
}

/// A queue's event channel, with an open file of its own: calls on one file take a lock in the kernel.
final class LibxenDoorbell: QueueDoorbell, @unchecked Sendable {
  // Invariant behind @unchecked Sendable: handle and port never change; the data thread alone calls, after the guest's thread made it.

  private let channels: OpaquePointer
  private let port: UInt32

  init(_ domain: DomainID, _ remotePort: UInt32) throws(XenError) {
    guard let channels = xenevtchn_open(nil, 0) else { throw XenError("xenevtchn_open", Errno.last) }
    do { try restrict("xenevtchn_restrict", xenevtchn_restrict(channels, domain)) } catch {
      xenevtchn_close(channels)
      throw error
    }
    let port = xenevtchn_bind_interdomain(channels, UInt32(domain), remotePort)
    guard port >= 0 else {
      let failure = XenError("bind_interdomain of port \(remotePort)", Errno.last)
      xenevtchn_close(channels)
      throw failure
    }
    self.channels = channels
    self.port = UInt32(port)
    let descriptor = xenevtchn_fd(channels)
    _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK)
  }

  /// Closing the file unbinds the port.
  deinit { xenevtchn_close(channels) }

  var descriptor: Int32 { xenevtchn_fd(channels) }

  /// Linux has masked the port when it tells of an event (evtchn.c).
  func acknowledge() { _ = xenevtchn_pending(channels) }

  func rearm() { xenevtchn_unmask(channels, port) }

  func ring() { xenevtchn_notify(channels, port) }
}
