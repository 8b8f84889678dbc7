package import ControlAPI
package import Lifecycle
package import Xen

/// Something that happened to a guest or a device, for those who subscribed on the control socket and for the log.
package struct SupervisorEvent: Sendable {
  package typealias Kind = News

  package var kind: Kind
  package var domain: DomainID
  package var guest: String
  package var device: String?
  package var reason: String?

  package var json: JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "event", value: .string(kind.rawValue)), .init(name: "domain", value: .count(domain)),
      .init(name: "guest", value: .string(guest)),
    ]
    if let device { members.append(.init(name: "device", value: .string(device))) }
    if let reason { members.append(.init(name: "reason", value: .string(reason))) }
    return .object(members)
  }
}
