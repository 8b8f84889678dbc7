import EventLoop
import Glibc
package import Synchronization
import Transport
import Xen

/// A simulated domain's grant table and the event channels it allocated: what it gives to a backend in an unprivileged domain.
package final class SimulatedGrants: Sendable {
  struct Entry {
    var frame: UInt64
    var isWritable: Bool
    var mappings = 0
  }

  private struct State {
    var entries: [UInt32: Entry] = [:]
    var nextReference: UInt32 = 8
    /// Allocated ports, and the backend's end of each.
    var ports: [UInt32: SimulatedDoorbell?] = [:]
    var nextPort: UInt32 = 5
    var isDestroyed = false
  }

  private let state = Mutex(State())
  /// Opened whenever a backend notifies the guest: the domain's own, so that a driver waits for any interrupt alike.
  private let gate: Latch
  /// Notifications in both directions, mapping calls and copies: what a request costs.
  package let sent = Atomic<UInt64>(0)
  package let received = Atomic<UInt64>(0)
  package let mapCalls = Atomic<UInt64>(0)
  package let copies = Atomic<UInt64>(0)
  /// Faults: so many mapping calls of more than `largeMapping` pages, or of any size, fail as if maptrack were full.
  package let largeMapFailures = Atomic<Int>(0)
  package let mapFailures = Atomic<Int>(0)
  package static let largeMapping = 32

  init(gate: Latch) { self.gate = gate }

  // MARK: The guest

  package func grant(frame: UInt64, writable: Bool) -> UInt32 {
    state.withLock { state in
      let reference = state.nextReference
      state.nextReference += 1
      state.entries[reference] = Entry(frame: frame, isWritable: writable)
      return reference
    }
  }

  /// Ends a grant.
  ///
  /// - Returns: false when a backend still has it mapped; the page must not be used for anything else then.
  @discardableResult
  package func revoke(_ reference: UInt32) -> Bool {
    state.withLock { state in
      guard state.entries[reference]?.mappings == 0 else { return false }
      state.entries[reference] = nil
      return true
    }
  }

  /// Pages that backends have mapped, counted once for each mapping.
  package var mappedPages: Int { state.withLock { $0.entries.values.reduce(0) { $0 + $1.mappings } } }
  /// Ports with a backend at their other end.
  package var boundPorts: Int { state.withLock { $0.ports.values.filter { $0 != nil }.count } }

  package func allocatePort() -> UInt32 {
    state.withLock { state in
      let port = state.nextPort
      state.nextPort += 1
      state.ports[port] = .some(nil)
      return port
    }
  }

  package func send(_ port: UInt32) {
    sent.wrappingAdd(1, ordering: .relaxed)
    let other = state.withLock { $0.ports[port] ?? nil }
    other?.raise()
  }

  package func destroy() { state.withLock { $0.isDestroyed = true } }

  // MARK: The backend

  func arrive() {
    received.wrappingAdd(1, ordering: .relaxed)
    gate.open()
  }

  func bind(_ port: UInt32, _ doorbell: SimulatedDoorbell) -> Bool {
    state.withLock { state in
      guard !state.isDestroyed, let end = state.ports[port], end == nil else { return false }
      state.ports[port] = doorbell
      return true
    }
  }

  func unbind(_ port: UInt32) { state.withLock { $0.ports[port] = .some(nil) } }

  /// Frames of granted pages, each counted as mapped once more; nil when one cannot be had.
  func take(_ references: [UInt32], writable: Bool) -> [UInt64]? {
    state.withLock { state in
      var frames: [UInt64] = []
      for reference in references {
        guard !state.isDestroyed, let entry = state.entries[reference], entry.isWritable || !writable else {
          return nil
        }
        frames.append(entry.frame)
      }
      for reference in references { state.entries[reference]?.mappings += 1 }
      return frames
    }
  }

  func give(_ references: [UInt32]) {
    state.withLock { state in for reference in references { state.entries[reference]?.mappings -= 1 } }
  }

  func frame(_ reference: UInt32, writable: Bool) -> UInt64? {
    state.withLock { state in
      guard !state.isDestroyed, let entry = state.entries[reference], entry.isWritable || !writable else { return nil }
      return entry.frame
    }
  }
}

/// The backend's end of a channel.
final class SimulatedDoorbell: QueueDoorbell {
  private let events: SimulatedEvents
  private let grants: SimulatedGrants
  private let port: UInt32

  init(_ grants: SimulatedGrants, port: UInt32) throws(Errno) {
    events = try SimulatedEvents()
    self.grants = grants
    self.port = port
  }

  var descriptor: Int32 { events.raw }

  func acknowledge() { while events.next() != nil {} }

  func rearm() { events.unmask(1) }

  func raise() { events.raise(1) }

  func ring() { grants.arrive() }
}

/// Keeps a doorbell's port bound for as long as the transport has it.
private final class BoundDoorbell: QueueDoorbell {
  private let inner: SimulatedDoorbell
  private let grants: SimulatedGrants
  private let port: UInt32

  init(_ inner: SimulatedDoorbell, _ grants: SimulatedGrants, _ port: UInt32) {
    self.inner = inner
    self.grants = grants
    self.port = port
  }

  deinit { grants.unbind(port) }

  var descriptor: Int32 { inner.descriptor }
  func acknowledge() { inner.acknowledge() }
  func rearm() { inner.rearm() }
  func ring() { inner.ring() }
}

/// The simulator's side of `GrantHandle`.
final class SimulatedGrantHandle: GrantHandle {
  private let domain: SimulatedDomain
  private let mapped = Mutex<[UInt: [UInt32]]>([:])

  init(_ domain: SimulatedDomain) { self.domain = domain }

  func map(_ references: [UInt32], writable: Bool) throws(XenError) -> UnsafeMutableRawPointer {
    let grants = domain.grants
    grants.mapCalls.wrappingAdd(1, ordering: .relaxed)
    let isLarge = references.count > SimulatedGrants.largeMapping
    let refused =
      SimulatedDomain.strikes(grants.mapFailures) || isLarge && SimulatedDomain.strikes(grants.largeMapFailures)
    // A bad reference and a full table are the same to whoever asks, as in Linux.
    guard !refused, let frames = grants.take(references, writable: writable) else {
      throw XenError("map of \(references.count) grants", Errno(EINVAL))
    }
    var errors = [Int32](repeating: 0, count: frames.count)
    guard let start = domain.memory.map(frames: frames, count: frames.count, errors: &errors) else {
      grants.give(references)
      throw XenError("map of \(references.count) grants", Errno(ENOMEM))
    }
    mapped.withLock { $0[UInt(bitPattern: start)] = references }
    return start
  }

  func unmap(_ start: UnsafeMutableRawPointer, count: Int) {
    guard let references = mapped.withLock({ $0.removeValue(forKey: UInt(bitPattern: start)) }) else { return }
    munmap(start, count * 4096)
    domain.grants.give(references)
  }

  func copy(
    _ reference: UInt32, offset: Int, count: Int, local: UnsafeMutableRawPointer, toGuest: Bool
  ) throws(XenError) -> Bool {
    domain.grants.copies.wrappingAdd(1, ordering: .relaxed)
    guard let frame = domain.grants.frame(reference, writable: toGuest), offset >= 0, count >= 0,
      offset + count <= 4096, frame < UInt64(domain.memory.pageCount)
    else { return false }
    let guest = domain.memory.pointer(frame << 12) + offset
    if toGuest { memcpy(guest, local, count) } else { memcpy(local, guest, count) }
    return true
  }

  func doorbell(remotePort: UInt32) throws(XenError) -> any QueueDoorbell {
    let doorbell: SimulatedDoorbell
    do throws(Errno) {
      doorbell = try SimulatedDoorbell(domain.grants, port: remotePort)
    } catch {
      throw XenError("xenevtchn_open", error)
    }
    guard domain.grants.bind(remotePort, doorbell) else {
      throw XenError("bind_interdomain of port \(remotePort)", Errno(EINVAL))
    }
    // A binding raises an event of its own.
    doorbell.raise()
    return BoundDoorbell(doorbell, domain.grants, remotePort)
  }
}
