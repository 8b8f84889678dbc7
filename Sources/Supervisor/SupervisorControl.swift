import Backends
package import ControlAPI
import Devices
import EventLoop
import Glibc
import Synchronization
import Xen

/// The control socket's methods: they read the status board and never wait for the supervisor.
package enum SupervisorControl {
  package static let version = "0.1.0"

  /// What operators can have done; the supervisor exists later than its control socket.
  package final class Actions: Sendable {
    private let supervisor = Mutex<Supervisor?>(nil)
    private let profilePath: String?

    /// - Parameter profilePath: the file that `config.reload` reads; nil when profiles are off.
    package init(profilePath: String? = nil) { self.profilePath = profilePath }

    package func connect(_ supervisor: Supervisor) { self.supervisor.withLock { $0 = supervisor } }

    func resize(_ key: DeviceKey, _ backend: BlockBackend, to bytes: UInt64?) {
      supervisor.withLock { $0 }?.resize(key, backend, to: bytes)
    }

    /// Reads the profiles again; a bad file changes nothing.
    package func reload() throws(ControlFault) {
      guard let profilePath else { return }
      do throws(ProfileFault) {
        let profiles = try DiskProfiles(path: profilePath, isOptional: true)
        supervisor.withLock { $0 }?.onLoop { $0.use(profiles: profiles) }
      } catch {
        throw ControlFault(
          code: -32003, message: error.message,
          data: [
            "field": .string(error.field), "remedy": .string("correct \(profilePath); the old profiles stay in force"),
          ])
      }
    }
  }

  package static func methods(board: StatusBoard, isSimulated: Bool, actions: Actions = Actions()) -> ControlMethods {
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
          describe(device: try find(parameters, board.current), counters: true)
        },
        ControlMethod(
          "device.resume", "Tries what failed again, after a device was held by errors of its store.",
          parameters: [guest, device], result: object
        ) { parameters throws(ControlFault) in
          let found = try find(parameters, board.current)
          guard case .held = found.phase, let backend = found.backend else {
            throw ControlFault(
              code: -32002, message: "'\(found.guestName)/\(found.name)' is not held, it is \(found.phase.name)",
              data: ["field": "params.device", "remedy": "resume a device whose state is 'held'"])
          }
          backend.resume()
          return ["accepted": true]
        },
        ControlMethod(
          "device.resize",
          "Makes a disk follow its image's size, or grows a regular file first; event device.resized or device.notResized tells the outcome.",
          parameters: [
            guest, device,
            ControlParameter("bytes", "integer", required: false, "Size that a regular file is to grow to."),
          ], result: object
        ) { parameters throws(ControlFault) in
          let found = try find(parameters, board.current)
          guard let backend = found.backend else {
            throw .notFound(
              "'\(found.guestName)/\(found.name)' is \(found.phase.name): it has no open image", field: "device")
          }
          var bytes: UInt64?
          if let wanted = parameters["bytes"]?.integerValue {
            guard wanted >= 512, wanted % 512 == 0 else {
              throw .invalidParameters("'bytes' must be a positive multiple of 512, not \(wanted)", field: "bytes")
            }
            bytes = UInt64(wanted)
          }
          actions.resize(found.key, backend, to: bytes)
          return ["accepted": true]
        },
        ControlMethod(
          "config.reload", "Reads the profiles again, for the disks that are opened from now on.", result: object
        ) { _ throws(ControlFault) in
          try actions.reload()
          return ["accepted": true]
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

  private static func find(
    _ parameters: JSONValue, _ contents: StatusBoard.Contents
  ) throws(ControlFault) -> StatusBoard.Device {
    let guest = try find(parameters["guest"]?.stringValue ?? "", contents)
    let name = parameters["device"]?.stringValue ?? ""
    guard let match = guest.devices.first(where: { $0.name == name || "\($0.key.device)" == name }) else {
      throw .notFound("guest '\(guest.name)' has no device '\(name)'", field: "device")
    }
    return match
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
      "xenstoreWatches": .count(contents.watches), "xenstoreConnected": .bool(contents.hasXenstore),
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
      members.append(.init(name: "bytes", value: .count(backend.capacity)))
      members.append(.init(name: "directIO", value: .bool(backend.isDirect)))
      let all = backend.counters
      members.append(.init(name: "inFlight", value: .count(sum(all) { $0.inFlight.load(ordering: .relaxed) })))
      members.append(.init(name: "requests", value: .count(sum(all, requests))))
      if counters {
        members.append(.init(name: "queues", value: .count(all.count)))
        members.append(.init(name: "threads", value: .count(backend.threadCount)))
        members.append(.init(name: "store", value: .string(backend.mode)))
        members.append(.init(name: "cache", value: .string(backend.settings.cache.rawValue)))
        members.append(.init(name: "requestsByQueue", value: .array(all.map { .count(requests($0)) })))
        members.append(.init(name: "counters", value: describe(all, device)))
      }
    }
    if let stuck = device.stuck {
      members.append(
        .init(
          name: "stuck",
          value: [
            "queue": .count(stuck.queue), "layer": .string(stuck.layer.rawValue), "milliseconds": .count(stuck.age),
          ]))
    }
    if counters, let transport = device.transport {
      members.append(.init(name: "driverStatus", value: .count(transport.currentStatus.rawValue)))
    }
    return .object(members)
  }

  private static func sum(_ counters: [BlockCounters], _ value: (BlockCounters) -> UInt64) -> UInt64 {
    counters.reduce(0) { $0 &+ value($1) }
  }

  private static func requests(_ counters: BlockCounters) -> UInt64 {
    counters.reads.value &+ counters.writes.value &+ counters.flushes.value &+ counters.discards.value
      &+ counters.writeZeroes.value &+ counters.others.value
  }

  private static func describe(_ counters: [BlockCounters], _ device: StatusBoard.Device) -> JSONValue {
    let values: [(String, (BlockCounters) -> UInt64)] = [
      ("reads", { $0.reads.value }), ("writes", { $0.writes.value }), ("flushes", { $0.flushes.value }),
      ("discards", { $0.discards.value }), ("writeZeroes", { $0.writeZeroes.value }), ("others", { $0.others.value }),
      ("readBytes", { $0.readBytes.value }), ("writtenBytes", { $0.writtenBytes.value }),
      ("failed", { $0.failed.value }), ("unsupported", { $0.unsupported.value }), ("retries", { $0.retries.value }),
      ("waiting", { $0.waiting.load(ordering: .relaxed) }), ("notifications", { $0.notifications.value }),
      ("batches", { $0.batches.value }), ("translationHits", { $0.translationHits.value }),
      ("translationMisses", { $0.translationMisses.value }),
    ]
    var members = values.map { JSONValue.Member(name: $0.0, value: .count(sum(counters, $0.1))) }
    let interrupts = device.transport?.interrupts.raised.load(ordering: .relaxed) ?? 0
    members.append(.init(name: "interrupts", value: .count(interrupts)))
    return .object(members)
  }

  private static func describe(poolOf guest: StatusBoard.Guest) -> JSONValue? {
    guard let statistics = guest.pool?.statistics else { return nil }
    let counters = guest.devices.flatMap { $0.backend?.counters ?? [] }
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
