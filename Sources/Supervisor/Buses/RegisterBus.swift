import DeviceHost
import Lifecycle
import Synchronization
import Transport
import Virtqueue
import Xen

/// A bus whose devices have trapped registers: the guest's ioreq server answers for them. What the buses of this kind do alike is here; each says
/// what a place on it is, makes its transports, and tells the server of them.
protocol RegisterBus: GuestBus {
  associatedtype Place: Equatable, Sendable
  associatedtype Transport: DeviceTransport
  var host: BusHost { get }
  var server: RegisterServer { get }
  var seats: RegisterSeats<Place, Transport> { get }
  /// The INTx pin that a device drives there.
  static func pin(_ place: Place) -> DeviceSlot.Interrupt
  /// A place in messages.
  static func name(_ place: Place) -> String
  /// What a guest must do whose device is lost.
  static var remedy: String { get }
  /// Claims what is the bus's own, and puts devices of an earlier daemon in their places: before a server that is started answers the first access, or
  /// before the first device of a bus that came later is put in its place.
  func prepare(_ server: IOReqServer, _ here: OnGuestThread) throws(XenError)
  func makeTransport(_ key: DeviceKey, _ place: Place, _ backend: DeviceBackend, needsReset: Bool) -> Transport
  func attach(_ transport: Transport, _ place: Place, _ server: IOReqServer, _ here: OnGuestThread) throws(XenError)
  func detach(_ place: Place, _ server: IOReqServer)
}

extension RegisterBus {
  static var hasServer: Bool { true }
  static var style: BusStyle { .registers }
  static var hostNodes: [String] { ["evtchn", "privcmd"] }

  /// Gives a device a place, which another of the guest's devices does not have.
  func take(_ key: DeviceKey, _ place: Place) {
    seats.take(key, place)
    server.setPin(Self.pin(place), of: key)
  }

  /// Of two files that name one place, the one whose device a driver uses holds, or else the first: the other is of a device that was not there
  /// when the daemon ended.
  func restore(_ key: DeviceKey, _ place: Place, _ transport: Transport, _ state: DeviceState) {
    if let other = seats.places.first(where: { $0.value == place })?.key {
      let staysOther = isInUse(other) || transport.currentStatus.isEmpty
      host.settings.stateFolder?.forget(staysOther ? key : other)
      if staysOther { return }
      seats.drop(other)
      server.setPin(nil, of: other)
    }
    seats.restore(key, place, transport, state)
    server.setPin(Self.pin(place), of: key)
  }

  /// Whether a driver has found the device.
  func isInUse(_ key: DeviceKey) -> Bool { seats.transport(of: key)?.currentStatus.isEmpty == false }

  var unclaimed: [DeviceKey] { seats.unclaimed }

  func earlier(_ key: DeviceKey, _ nodes: [String: String], frontend: XenbusState?) -> (Earlier, DeviceState?) {
    if let state = seats.claim(key) {
      if let transport = seats.transport(of: key) { return (.adoptable(Driver(transport.currentStatus)), state) }
      // It has been taken out of its place, before a driver found it there.
      host.settings.stateFolder?.forget(key)
      return (.nothing, nil)
    }
    if host.settings.stateFolder != nil, nodes["state"] == XenbusState.connected.rawValue {
      return (.lost("no saved state for a device in use: the guest must \(Self.remedy)"), nil)
    }
    return (.nothing, nil)
  }

  /// Part of `prepare`.
  func attachRestored(_ server: IOReqServer, _ here: OnGuestThread) throws(XenError) {
    // The server of an earlier daemon has claims of those too that were taken away before there was a server to say so to.
    for (place, transport) in seats.left { try attach(transport, place, server, here) }
    for (place, _) in seats.takeLeft() { detach(place, server) }
    for (place, transport) in seats.restored { try attach(transport, place, server, here) }
  }

  func vacate(_ key: DeviceKey) { forget(key) }

  func forget(_ key: DeviceKey) {
    seats.forget(key)
    server.setPin(nil, of: key)
  }

  func memory(of key: DeviceKey) -> (any GuestMemorySource)? { server.pool }

  func transport(of key: DeviceKey) -> (any DeviceTransport)? { seats.transport(of: key) }

  func insert(
    _ key: DeviceKey, _ id: BackendID, _ backend: DeviceBackend, needsReset: Bool, _ here: OnGuestThread
  ) -> BusEvent {
    guard let place = seats.place(of: key) else { return .device(key, .insertFailed(id, "the device has no place")) }
    let transport = makeTransport(key, place, backend, needsReset: needsReset)
    let server: IOReqServer
    do throws(XenError) {
      server = try self.server.server(preparedFor: self, here)
      try attach(transport, place, server, here)
    } catch {
      return .device(key, .insertFailed(id, "\(Self.name(place)): \(error)"))
    }
    guard seats.fill(key, place, transport) else {
      detach(place, server)
      return .device(key, .insertFailed(id, "\(Self.name(place)): the device has another place by now"))
    }
    if needsReset { transport.interruptForConfiguration() }
    return .device(key, .plugged(id, Driver(transport.currentStatus)))
  }

  func remove(_ key: DeviceKey) -> @Sendable (OnGuestThread) -> Void {
    guard let place = seats.place(of: key) else { return { _ in } }
    return { [self] here in
      guard let server = try? server.server(here) else { return seats.leaveLater(key, place) }
      seats.leave(key, place)
      detach(place, server)
    }
  }
}

/// Where a bus has its devices, and with what the guest's thread answers for them. The supervisor gives places, the guest's thread fills them.
final class RegisterSeats<Place: Equatable & Sendable, Transport: DeviceTransport>: Sendable {
  private struct Seat {
    var place: Place
    var transport: Transport?
    /// Of an earlier daemon, until its entry asks for it.
    var state: DeviceState?
  }

  private struct Content {
    var seats: [DeviceKey: Seat] = [:]
    /// Of an earlier daemon, until they are taken out of their places: the server has claims of theirs, also when nobody asks for them.
    var restored: [DeviceKey: (place: Place, transport: Transport)] = [:]
    /// Of those, what was taken out while there was no server.
    var left: [(Place, Transport)] = []

    /// - Returns: what a restored device was put there with.
    mutating func leave(_ key: DeviceKey, _ place: Place) -> Transport? {
      if seats[key]?.place == place { seats[key]?.transport = nil }
      guard restored[key]?.place == place else { return nil }
      return restored.removeValue(forKey: key)?.transport
    }
  }

  private let content = Mutex(Content())

  func take(_ key: DeviceKey, _ place: Place) { content.withLock { $0.seats[key] = Seat(place: place) } }

  func restore(_ key: DeviceKey, _ place: Place, _ transport: Transport, _ state: DeviceState) {
    content.withLock {
      $0.seats[key] = Seat(place: place, transport: transport, state: state)
      $0.restored[key] = (place, transport)
    }
  }

  /// - Returns: false where the device has another place by now, or none.
  func fill(_ key: DeviceKey, _ place: Place, _ transport: Transport) -> Bool {
    content.withLock { content in
      guard content.seats[key]?.place == place else { return false }
      content.seats[key]?.transport = transport
      return true
    }
  }
  func forget(_ key: DeviceKey) { content.withLock { $0.seats[key] = nil } }
  /// A restored device is not what is in its place.
  func drop(_ key: DeviceKey) {
    content.withLock {
      $0.seats[key] = nil
      $0.restored[key] = nil
    }
  }
  /// The device is not there any more. It may have another place by now, which it keeps.
  func leave(_ key: DeviceKey, _ place: Place) { content.withLock { _ = $0.leave(key, place) } }
  /// The same where there is no server to take the device out of.
  func leaveLater(_ key: DeviceKey, _ place: Place) {
    content.withLock { content in
      if let transport = content.leave(key, place) { content.left.append((place, transport)) }
    }
  }
  var left: [(Place, Transport)] { content.withLock { $0.left } }
  func takeLeft() -> [(Place, Transport)] {
    content.withLock { content in
      defer { content.left = [] }
      return content.left
    }
  }
  /// The state of a restored device, which is asked for now.
  func claim(_ key: DeviceKey) -> DeviceState? { content.withLock { $0.seats[key]?.state.take() } }

  func place(of key: DeviceKey) -> Place? { content.withLock { $0.seats[key]?.place } }
  func transport(of key: DeviceKey) -> Transport? { content.withLock { $0.seats[key]?.transport } }
  var places: [DeviceKey: Place] { content.withLock { $0.seats.mapValues(\.place) } }
  var unclaimed: [DeviceKey] { content.withLock { $0.seats.filter { $0.value.state != nil } }.map(\.key) }
  var restored: [(Place, Transport)] { content.withLock { $0.restored.values.map { ($0.place, $0.transport) } } }
}
