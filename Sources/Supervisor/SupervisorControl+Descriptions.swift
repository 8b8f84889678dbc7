import ControlAPI
import DeviceHost
import Devices
import EventLoop
import Glibc
import Lifecycle
import Xen

/// How guests and devices are told to clients.
extension SupervisorControl {
  static func info(_ contents: StatusBoard.Contents, _ started: UInt64, _ isSimulated: Bool) -> JSONValue {
    let guests = contents.guests.values
    let pools = guests.compactMap { $0.mappings }
    return [
      "version": .string(version), "hypervisor": .string(contents.hypervisor), "simulated": .bool(isSimulated),
      "pid": .count(getpid()), "uptimeSeconds": .count((EventLoop.now() - started) / 1_000_000_000),
      "guests": .count(guests.count), "devices": .count(guests.reduce(0) { $0 + $1.devices.count }),
      "devicesInTrouble": .count(
        guests.reduce(0) { $0 + $1.devices.filter { $0.phase.reason != nil }.count }),
      "ioreqServers": .count(guests.filter { $0.server != nil }.count),
      "mappedPages": .count(pools.reduce(0) { $0 + $1.mappedPages.value }),
      "grantedPages": .count(
        guests.flatMap(\.devices).reduce(0) { $0 + ($1.grants?.pages.mappedPages.value ?? 0) }),
      "xenstoreWatches": .count(contents.watches), "xenstoreConnected": .bool(contents.hasXenstore),
      "hostNodes": .array(contents.hostNodes.map { .string($0) }), "limits": contents.limits.json,
    ]
  }

  /// - Parameter hasXenDrivers: whether it has, as Xen says now; nil where it does not.
  static func describe(guest: StatusBoard.Guest, hasXenDrivers: (DomainID) -> Bool?) -> JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "domain", value: .count(guest.domain)), .init(name: "name", value: .string(guest.name)),
      .init(name: "uuid", value: guest.uuid.map(JSONValue.string) ?? .null),
      .init(name: "state", value: .string(guest.phase)), .init(name: "vcpus", value: .count(guest.vcpus)),
      .init(name: "devices", value: .count(guest.devices.count)),
    ]
    members.append(.init(name: "limits", value: guest.limits.json))
    members.append(.init(name: "facts", value: describe(guest.facts)))
    members.append(.init(name: "guestNeeds", value: .string(guest.guestNeeds)))
    members += guest.notes.map { describe($0, hasXenDrivers(guest.domain)) }
    if let reason = guest.reason { members.append(.init(name: "reason", value: .string(reason))) }
    if let server = guest.server {
      members.append(
        .init(
          name: "ioreqServer",
          value: [
            "id": .count(server.identifier),
            "accesses": .count(server.counters.accesses.value),
            "invalidations": .count(server.counters.invalidations.value),
            "strays": .count(server.counters.strays.value),
          ]))
    }
    return .object(members)
  }

  private static func describe(_ note: GuestNote, _ hasXenDrivers: @autoclosure () -> Bool?) -> JSONValue.Member {
    switch note {
    case .note(let words): return .init(name: "note", value: .string(words))
    case .warning(let words): return .init(name: "warning", value: .string(words))
    case .byXenDrivers(let present, let absent, let unknown):
      let answer = hasXenDrivers()
      return describe(answer.map { $0 ? present : absent } ?? unknown, answer)
    }
  }

  private static func describe(_ facts: [Fact]) -> JSONValue {
    .array(facts.map { ["name": .string($0.name), "value": .string($0.value.words)] })
  }

  static func describe(device: StatusBoard.Device, counters: Bool = false) -> JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "guest", value: .string(device.guestName)), .init(name: "domain", value: .count(device.key.domain)),
      .init(name: "device", value: .string(device.name)), .init(name: "id", value: .count(device.key.device)),
      .init(name: "kind", value: .string(device.key.kind.rawValue)),
      .init(name: "type", value: .string(device.type)),
      .init(name: "state", value: .string(device.phase.name)),
      .init(name: "reason", value: device.phase.reason.map(JSONValue.string) ?? .null),
      .init(name: "image", value: device.path.map(JSONValue.string) ?? .null),
      .init(name: "readOnly", value: .bool(device.readOnly)),
    ]
    members.append(.init(name: "transport", value: .string(device.bus)))
    members.append(.init(name: "guestNeeds", value: .string(device.guestNeeds)))
    members.append(.init(name: "facts", value: describe(device.facts)))
    if let address = device.addressBesideQEMU {
      members.append(.init(name: "addressBesideQEMU", value: .string(address)))
    }
    if let warning = device.warning { members.append(.init(name: "warning", value: .string(warning))) }
    if counters, let grants = device.grants {
      let statistics = grants.pages.statistics
      members.append(
        .init(
          name: "grants",
          value: [
            "access": grants.access.json, "mappedPages": .count(statistics.mappedPages),
            "budgetPages": .count(statistics.budgetPages), "mapCalls": .count(statistics.mapCalls),
            "unmapCalls": .count(statistics.unmapCalls), "copiedBytes": .count(grants.copiedBytes.value),
          ]))
    }
    if let slot = device.slot {
      if let index = slot.index { members.append(.init(name: "slot", value: .count(index))) }
      members.append(.init(name: "base", value: .string("0x" + String(slot.base, radix: 16))))
    }
    if let readings = device.readings {
      members += readings.facts.map(\.json)
      let all = readings.counters
      members.append(.init(name: "inFlight", value: .count(sum(all) { $0.inFlight.load(ordering: .relaxed) })))
      members.append(.init(name: "requests", value: .count(sum(all, requests))))
      members.append(.init(name: "reads", value: .count(sum(all) { $0.reads.value })))
      members.append(.init(name: "writes", value: .count(sum(all) { $0.writes.value })))
      members.append(.init(name: "readBytes", value: .count(sum(all) { $0.readBytes.value })))
      members.append(.init(name: "writtenBytes", value: .count(sum(all) { $0.writtenBytes.value })))
      if counters {
        members.append(.init(name: "queues", value: .count(all.count)))
        members.append(.init(name: "threads", value: .count(readings.threadCount)))
        members.append(.init(name: "mode", value: .string(readings.mode)))
        // Its name before 0.3, which says the wrong thing of devices other than disks; until 0.4.
        members.append(.init(name: "store", value: .string(readings.mode)))
        members.append(.init(name: "requestsByQueue", value: .array(all.map { .count(requests($0)) })))
        members.append(.init(name: "counters", value: describe(all, device)))
      }
    }
    members.append(.init(name: "restarts", value: .count(device.restarts)))
    if counters {
      if device.type != "disk" { members.append(.init(name: "drops", value: drops(device.accounts))) }
      members.append(.init(name: "faults", value: .count(device.faults)))
      members.append(.init(name: "restartPolicy", value: .string(device.policy.mode.rawValue)))
      members.append(.init(name: "limits", value: device.limits.json))
      members.append(.init(name: "latencies", value: latencies(device.accounts)))
    }
    if let stuck = device.stuck {
      members.append(
        .init(
          name: "stuck",
          value: [
            "queue": .count(stuck.queue), "layer": .string(stuck.layer.rawValue), "milliseconds": .count(stuck.age),
          ]))
    }
    if counters, let status = device.driverStatus {
      members.append(.init(name: "driverStatus", value: .count(status.rawValue)))
    }
    return .object(members)
  }

  /// Quantiles of each operation and stage that occurred, in microseconds.
  static func latencies(_ accounts: [QueueAccount]) -> JSONValue {
    var operations: [JSONValue.Member] = []
    for operation in QueueLatencies.Operation.allCases {
      var stages: [JSONValue.Member] = []
      for stage in QueueLatencies.Stage.allCases {
        var counts = LatencyCounts()
        for account in accounts { counts += account.latencies.counts(operation, stage) }
        guard counts.count > 0 else { continue }
        func microseconds(_ share: Double) -> JSONValue { .count(counts.quantile(share) / 1000) }
        stages.append(
          .init(
            name: "\(stage)",
            value: [
              "count": .count(counts.count), "p50": microseconds(0.5), "p99": microseconds(0.99),
              "p999": microseconds(0.999), "mean": .count(counts.sum / counts.count / 1000),
            ]))
      }
      if !stages.isEmpty { operations.append(.init(name: "\(operation)", value: .object(stages))) }
    }
    return .object(operations)
  }

  static func sum(_ counters: [QueueCounters], _ value: (QueueCounters) -> UInt64) -> UInt64 {
    counters.reduce(0) { $0 &+ value($1) }
  }

  static func requests(_ counters: QueueCounters) -> UInt64 {
    counters.reads.value &+ counters.writes.value &+ counters.flushes.value &+ counters.discards.value
      &+ counters.writeZeroes.value &+ counters.others.value
  }

  static func describe(_ counters: [QueueCounters], _ device: StatusBoard.Device) -> JSONValue {
    let values: [(String, (QueueCounters) -> UInt64)] = [
      ("reads", { $0.reads.value }), ("writes", { $0.writes.value }), ("flushes", { $0.flushes.value }),
      ("discards", { $0.discards.value }), ("writeZeroes", { $0.writeZeroes.value }), ("others", { $0.others.value }),
      ("readBytes", { $0.readBytes.value }), ("writtenBytes", { $0.writtenBytes.value }),
      ("failed", { $0.failed.value }), ("unsupported", { $0.unsupported.value }), ("retries", { $0.retries.value }),
      ("throttled", { $0.throttled.value }), ("adopted", { $0.adopted.value }),
      ("stateShortages", { $0.shortages.value }),
      ("interruptsSent", { $0.interrupts.value }), ("interruptsSuppressed", { $0.interruptsSuppressed.value }),
      ("waiting", { $0.waiting.load(ordering: .relaxed) }), ("notifications", { $0.notifications.value }),
      ("batches", { $0.batches.value }), ("translationHits", { $0.translationHits.value }),
      ("translationMisses", { $0.translationMisses.value }),
    ]
    var members = values.map { JSONValue.Member(name: $0.0, value: .count(sum(counters, $0.1))) }
    members.append(.init(name: "interrupts", value: .count(device.interrupts?.value ?? 0)))
    return .object(members)
  }

  static func describe(poolOf guest: StatusBoard.Guest) -> JSONValue? {
    guard let statistics = guest.mappings?.statistics else { return nil }
    let counters = guest.devices.flatMap { $0.readings?.counters ?? [] }
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
