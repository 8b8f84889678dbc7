import Backends
package import ControlAPI
import Devices
import EventLoop
import Glibc
import Xen

/// The control socket's methods: they read the status board and never wait for the supervisor.
package enum SupervisorControl {
  package static let version = "0.1.0"

  package static func methods(board: StatusBoard, isSimulated: Bool) -> ControlMethods {
    let started = EventLoop.now()
    let guest = ControlParameter("guest", "string", required: true, "Name or domain number of the guest.")
    let device = ControlParameter("device", "string", required: true, "Name (xvde) or number of the device.")
    let object: JSONValue = ["type": "object"]
    let list: JSONValue = ["type": "array", "items": ["type": "object"]]
    return ControlMethods(
      [
        ControlMethod("system.info", "The daemon: version, hypervisor, uptime, resources in use.", result: object) {
          _ throws(ControlFault) in info(board.current, started, isSimulated)
        },
        ControlMethod("guest.list", "The guests that have devices served here.", result: list) {
          _ throws(ControlFault) in .array(sorted(board.current).map(describe(guest:)))
        },
        ControlMethod(
          "device.list", "The devices, of all guests or of one.",
          parameters: [ControlParameter("guest", "string", required: false, guest.summary)], result: list
        ) { parameters throws(ControlFault) in
          let contents = board.current
          guard let name = parameters["guest"]?.stringValue else {
            return .array(sorted(contents).flatMap(\.devices).map { describe(device: $0) })
          }
          return .array(try find(name, contents).devices.map { describe(device: $0) })
        },
        ControlMethod(
          "device.get", "One device with its counters, slot, features and state.", parameters: [guest, device],
          result: object
        ) { parameters throws(ControlFault) in
          let found = try find(parameters["guest"]?.stringValue ?? "", board.current)
          let name = parameters["device"]?.stringValue ?? ""
          guard let match = found.devices.first(where: { $0.name == name || "\($0.key.device)" == name }) else {
            throw .notFound("guest '\(found.name)' has no device '\(name)'", field: "device")
          }
          return describe(device: match, counters: true)
        },
        ControlMethod("pool.stats", "The foreign-mapping pool of each guest; pages have 4096 bytes.", result: list) {
          _ throws(ControlFault) in .array(sorted(board.current).compactMap(describe(poolOf:)))
        },
        ControlMethod(
          "event.subscribe",
          "From now on, events of guests and devices come as notifications named 'event' on this connection.",
          result: object
        ) { _ throws(ControlFault) in ["subscribed": true] },
      ], version: version)
  }

  private static func sorted(_ contents: StatusBoard.Contents) -> [StatusBoard.Guest] {
    contents.guests.values.sorted { $0.domain < $1.domain }
  }

  private static func find(
    _ name: String, _ contents: StatusBoard.Contents
  ) throws(ControlFault) -> StatusBoard.Guest {
    let guests = sorted(contents)
    guard let found = guests.first(where: { $0.name == name }) ?? guests.first(where: { "\($0.domain)" == name }) else {
      throw .notFound("there is no guest '\(name)' with devices of vxd", field: "guest")
    }
    return found
  }

  // MARK: Descriptions

  private static func info(_ contents: StatusBoard.Contents, _ started: UInt64, _ isSimulated: Bool) -> JSONValue {
    let guests = contents.guests.values
    let pools = guests.compactMap { $0.pool?.statistics }
    return [
      "version": .string(version), "hypervisor": .string(contents.hypervisor), "simulated": .bool(isSimulated),
      "pid": .count(getpid()), "uptimeSeconds": .count((EventLoop.now() - started) / 1_000_000_000),
      "guests": .count(guests.count), "devices": .count(guests.reduce(0) { $0 + $1.devices.count }),
      "devicesInTrouble": .count(
        guests.reduce(0) { $0 + $1.devices.filter { $0.phase.reason != nil }.count }),
      "ioreqServers": .count(guests.filter { $0.server != nil }.count),
      "mappedPages": .count(pools.reduce(0) { $0 + $1.mappedPages }),
      "xenstoreWatches": .count(contents.watches),
    ]
  }

  private static func describe(guest: StatusBoard.Guest) -> JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "domain", value: .count(guest.domain)), .init(name: "name", value: .string(guest.name)),
      .init(name: "uuid", value: guest.uuid.map(JSONValue.string) ?? .null),
      .init(name: "state", value: .string(guest.phase)), .init(name: "vcpus", value: .count(guest.vcpus)),
      .init(name: "devices", value: .count(guest.devices.count)),
    ]
    if let reason = guest.reason { members.append(.init(name: "reason", value: .string(reason))) }
    if let server = guest.server {
      members.append(
        .init(
          name: "ioreqServer",
          value: [
            "id": .count(server.identifier),
            "accesses": .count(server.counters.accesses.load(ordering: .relaxed)),
            "invalidations": .count(server.counters.invalidations.load(ordering: .relaxed)),
            "strays": .count(server.counters.strays.load(ordering: .relaxed)),
          ]))
    }
    return .object(members)
  }

  private static func describe(device: StatusBoard.Device, counters: Bool = false) -> JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "guest", value: .string(device.guestName)), .init(name: "domain", value: .count(device.key.domain)),
      .init(name: "device", value: .string(device.name)), .init(name: "id", value: .count(device.key.device)),
      .init(name: "kind", value: .string(device.key.kind.rawValue)),
      .init(name: "state", value: .string(device.phase.name)),
      .init(name: "reason", value: device.phase.reason.map(JSONValue.string) ?? .null),
      .init(name: "image", value: device.path.map(JSONValue.string) ?? .null),
      .init(name: "readOnly", value: .bool(device.readOnly)),
    ]
    if let slot = device.slot {
      members.append(.init(name: "slot", value: .count(slot.index)))
      members.append(.init(name: "base", value: .string("0x" + String(slot.base, radix: 16))))
    }
    if let backend = device.backend {
      members.append(.init(name: "bytes", value: .count(backend.geometry.capacity)))
      members.append(.init(name: "directIO", value: .bool(backend.isDirect)))
      members.append(.init(name: "inFlight", value: .count(backend.counters.inFlight.load(ordering: .relaxed))))
      members.append(.init(name: "requests", value: .count(requests(backend.counters))))
      if counters { members.append(.init(name: "counters", value: describe(backend.counters, device))) }
    }
    if counters, let transport = device.transport {
      members.append(.init(name: "driverStatus", value: .count(transport.currentStatus.rawValue)))
    }
    return .object(members)
  }

  private static func requests(_ counters: BlockCounters) -> UInt64 {
    counters.reads.value &+ counters.writes.value &+ counters.flushes.value &+ counters.discards.value
      &+ counters.writeZeroes.value &+ counters.others.value
  }

  private static func describe(_ counters: BlockCounters, _ device: StatusBoard.Device) -> JSONValue {
    [
      "reads": .count(counters.reads.value), "writes": .count(counters.writes.value),
      "flushes": .count(counters.flushes.value), "discards": .count(counters.discards.value),
      "writeZeroes": .count(counters.writeZeroes.value), "others": .count(counters.others.value),
      "readBytes": .count(counters.readBytes.value), "writtenBytes": .count(counters.writtenBytes.value),
      "failed": .count(counters.failed.value), "unsupported": .count(counters.unsupported.value),
      "notifications": .count(counters.notifications.value), "batches": .count(counters.batches.value),
      "interrupts": .count(device.transport?.interrupts.raised.load(ordering: .relaxed) ?? 0),
      "translationHits": .count(counters.translationHits.value),
      "translationMisses": .count(counters.translationMisses.value),
    ]
  }

  private static func describe(poolOf guest: StatusBoard.Guest) -> JSONValue? {
    guard let statistics = guest.pool?.statistics else { return nil }
    let counters = guest.devices.compactMap { $0.backend?.counters }
    return [
      "guest": .string(guest.name), "domain": .count(guest.domain), "mappedPages": .count(statistics.mappedPages),
      "budgetPages": .count(statistics.budgetPages), "buckets": .count(statistics.buckets),
      "holePages": .count(statistics.holePages), "ringPages": .count(statistics.rangePages),
      "hits": .count(counters.reduce(0) { $0 &+ $1.translationHits.value }), "misses": .count(statistics.misses),
      "evictions": .count(statistics.evictions), "invalidations": .count(statistics.invalidations),
      "mapCalls": .count(statistics.mapCalls), "unmapCalls": .count(statistics.unmapCalls),
    ]
  }
}
