import DeviceHost
import Devices
import Lifecycle
import Transport
import Xen

/// What vxd counts, as OpenMetrics text (openmetrics.io, version 1.0). Reads the status board and counters that data threads write; it
/// waits for nobody.
package enum Metrics {
  package static let contentType = "application/openmetrics-text; version=1.0.0; charset=utf-8"

  /// One metric: its name without suffix, its type, and what it says.
  package struct Family: Sendable {
    package var name: String
    package var type: String
    package var help: String

    /// The names that samples of it have.
    package var sampleNames: [String] {
      switch type {
      case "counter": ["\(name)_total"]
      case "histogram": ["\(name)_bucket", "\(name)_count", "\(name)_sum"]
      case "info": ["\(name)_info"]
      default: [name]
      }
    }
  }

  private struct Sample {
    var labels: [(String, String)]
    var value: String
    var suffix: String = ""
  }

  private struct Writer {
    var text = ""
    var families: [Family] = []

    mutating func put(_ name: String, _ type: String, _ help: String, _ samples: [Sample]) {
      let family = Family(name: name, type: type, help: help)
      families.append(family)
      text += "# TYPE \(name) \(type)\n# HELP \(name) \(help)\n"
      let suffix = type == "counter" ? "_total" : type == "info" ? "_info" : ""
      for sample in samples {
        text += name + (sample.suffix.isEmpty ? suffix : sample.suffix)
        if !sample.labels.isEmpty {
          text +=
            "{" + sample.labels.map { "\($0.0)=\"\(Metrics.escaped($0.1))\"" }.joined(separator: ",") + "}"
        }
        text += " \(sample.value)\n"
      }
    }
  }

  private static func escaped(_ text: String) -> String {
    var result = ""
    for character in text.unicodeScalars {
      switch character {
      case "\\": result += "\\\\"
      case "\"": result += "\\\""
      case "\n": result += "\\n"
      default: result.unicodeScalars.append(character)
      }
    }
    return result
  }

  /// Every metric that there is, for the dashboard's test and for `vxctl metrics --names`.
  package static var families: [Family] { write(StatusBoard.Contents(), started: 0, now: 0).families }

  /// The text of the moment.
  ///
  /// - Parameter started: when the daemon was, in monotonic nanoseconds, as `now`.
  package static func text(_ board: StatusBoard, started: UInt64, now: UInt64) -> String {
    write(board.current, started: started, now: now).text + "# EOF\n"
  }

  private static func seconds(_ nanoseconds: UInt64) -> String { "\(Double(nanoseconds) / 1e9)" }

  /// The names that every Prometheus client library has for its process.
  private static func writeProcess(_ writer: inout Writer) {
    let process = HostUsage.process
    writer.put(
      "process_cpu_seconds", "counter", "CPU time of the process, user and system.",
      [Sample(labels: [], value: seconds(HostUsage.cpuTime))])
    for (name, help, value) in [
      ("process_open_fds", "Open file descriptors.", Optional(Double(HostUsage.descriptors))),
      ("process_max_fds", "Maximum number of open file descriptors.", Double(HostUsage.descriptorLimit)),
      ("process_virtual_memory_bytes", "Size of the address space.", process.map { Double($0.virtualBytes) }),
      ("process_resident_memory_bytes", "Memory in use.", process.map { Double($0.residentBytes) }),
      ("process_threads", "Threads.", process.map { Double($0.threads) }),
      ("process_start_time_seconds", "Start time of the process, in seconds since 1970.", process?.started),
    ] {
      writer.put(name, "gauge", help, value.map { [Sample(labels: [], value: "\(UInt64(max(0, $0)))")] } ?? [])
    }
  }

  private static func write(_ contents: StatusBoard.Contents, started: UInt64, now: UInt64) -> Writer {
    var writer = Writer()
    let guests = contents.guests.values.sorted { $0.domain < $1.domain }
    writer.put(
      "vxd_build", "info", "Version of the daemon and of Xen.",
      [Sample(labels: [("version", SupervisorControl.version), ("hypervisor", contents.hypervisor)], value: "1")])
    func gauge(_ name: String, _ help: String, _ value: String) {
      writer.put(name, "gauge", help, [Sample(labels: [], value: value)])
    }
    gauge("vxd_uptime_seconds", "Time since the daemon was started.", seconds(now &- started))
    gauge("vxd_xenstore_connected", "Whether xenstored answers.", contents.hasXenstore ? "1" : "0")
    gauge("vxd_xenstore_watches", "Watches in Xenstore.", "\(contents.watches)")
    gauge("vxd_guests", "Guests with devices of vxd.", "\(guests.count)")
    gauge("vxd_descriptors", "Open descriptors of the daemon.", "\(HostUsage.descriptors)")
    gauge("vxd_descriptors_limit", "Maximum number of open descriptors.", "\(HostUsage.descriptorLimit)")
    gauge(
      "vxd_event_channels", "Event channels bound to ioreq servers and to queues of Xenbus devices.",
      "\(guests.reduce(0) { $0 + $1.channels + $1.devices.reduce(0) { $0 + Int(clamping: $1.channels?.value ?? 0) } })")
    gauge(
      "vxd_event_channels_limit", "Maximum number of event channels of a domain (FIFO ABI).",
      "\(HostUsage.eventChannelLimit)")
    gauge(
      "vxd_ioreq_servers", "Ioreq servers in use, one for each guest.", "\(guests.filter { $0.server != nil }.count)")
    let granted = guests.flatMap(\.devices).compactMap { $0.grants?.pages.statistics }
    gauge(
      "vxd_grants", "Granted pages that are mapped; virtio-mmio uses none.",
      "\(granted.reduce(0) { $0 + $1.mappedPages })")
    gauge("vxd_grants_limit", "Maximum number of granted pages that are mapped.", "\(granted.first?.budgetPages ?? 0)")
    gauge("vxd_cpu_seconds", "CPU time of the whole daemon.", seconds(HostUsage.cpuTime))
    writeProcess(&writer)
    writeGuests(&writer, guests)
    writeDevices(&writer, guests.flatMap(\.devices))
    return writer
  }

  private static func writeGuests(_ writer: inout Writer, _ guests: [StatusBoard.Guest]) {
    func put(_ name: String, _ type: String, _ help: String, _ value: (StatusBoard.Guest) -> String?) {
      writer.put(
        name, type, help,
        guests.compactMap { guest in
          value(guest).map { Sample(labels: [("guest", guest.name), ("domain", "\(guest.domain)")], value: $0) }
        })
    }
    put("vxd_guest_devices", "gauge", "Devices of a guest.") { "\($0.devices.count)" }
    put("vxd_guest_mapped_pages", "gauge", "Pages of a guest that are mapped.") {
      $0.mappings.map { "\($0.mappedPages.value)" }
    }
    put("vxd_guest_mapped_pages_limit", "gauge", "Maximum number of mapped pages of a guest.") {
      $0.mappings.map { "\($0.budgetPages.value)" }
    }
    put("vxd_guest_map_calls", "counter", "Mapping calls to Xen.") { $0.mappings.map { "\($0.mapCalls.value)" } }
    put("vxd_guest_evictions", "counter", "Buckets unmapped to make room.") {
      $0.mappings.map { "\($0.evictions.value)" }
    }
    put("vxd_guest_accesses", "counter", "Register accesses.") {
      $0.server.map { "\($0.counters.accesses.value)" }
    }
    put("vxd_guest_invalidations", "counter", "Invalidations after a guest gave pages back.") {
      $0.server.map { "\($0.counters.invalidations.value)" }
    }
  }

  private static func labels(_ device: StatusBoard.Device) -> [(String, String)] {
    [("guest", device.guestName), ("device", device.name)]
  }

  private static func writeDevices(_ writer: inout Writer, _ devices: [StatusBoard.Device]) {
    let phases = DevicePhase.names
    writer.put(
      "vxd_device_state", "stateset", "State of a device.",
      devices.flatMap { device in
        phases.map { phase in
          Sample(
            labels: labels(device) + [("vxd_device_state", phase)], value: device.phase.name == phase ? "1" : "0")
        }
      })
    func sum(_ device: StatusBoard.Device, _ value: (QueueCounters) -> UInt64) -> UInt64 {
      device.accounts.reduce(0) { $0 &+ value($1.counters) }
    }
    func put(_ name: String, _ type: String, _ help: String, _ value: (StatusBoard.Device) -> String?) {
      writer.put(
        name, type, help,
        devices.compactMap { device in value(device).map { Sample(labels: labels(device), value: $0) } })
    }
    func split(
      _ name: String, _ help: String, _ label: String, _ parts: [(String, (QueueCounters) -> UInt64)]
    ) {
      writer.put(
        name, "counter", help,
        devices.flatMap { device in
          parts.map { Sample(labels: labels(device) + [(label, $0.0)], value: "\(sum(device, $0.1))") }
        })
    }
    split(
      "vxd_device_requests", "Requests taken, by operation.", "operation",
      [
        ("read", { $0.reads.value }), ("write", { $0.writes.value }), ("flush", { $0.flushes.value }),
        ("discard", { $0.discards.value }), ("write_zeroes", { $0.writeZeroes.value }), ("other", { $0.others.value }),
      ])
    split(
      "vxd_device_bytes", "Bytes of data, by direction.", "operation",
      [("read", { $0.readBytes.value }), ("write", { $0.writtenBytes.value })])
    split(
      "vxd_device_errors", "Requests that failed, by kind.", "kind",
      [("io", { $0.failed.value }), ("unsupported", { $0.unsupported.value })])
    split(
      "vxd_device_retries", "Steps that were retried after the storage had failed them.", "layer",
      [("engine", { $0.retries.value })])
    split(
      "vxd_device_throttled", "Requests that were delayed by a limit.", "layer", [("budget", { $0.throttled.value })])
    split(
      "vxd_device_adopted", "Requests taken over from a backend that was stopped.", "layer",
      [("journal", { $0.adopted.value })])
    split(
      "vxd_device_shortages", "How often a device could not accept more requests because the saved state had no room.",
      "layer",
      [("journal", { $0.shortages.value })])
    split(
      "vxd_device_notifications", "Notifications of the driver.", "direction",
      [("received", { $0.notifications.value })])
    split(
      "vxd_device_batches", "Runs of the queue: with notifications, how many were suppressed.", "layer",
      [("queue", { $0.batches.value })])
    split(
      "vxd_device_interrupts", "Published batches, by whether the driver wanted an interrupt.", "outcome",
      [("sent", { $0.interrupts.value }), ("suppressed", { $0.interruptsSuppressed.value })])
    split(
      "vxd_device_drops", "Packets of network devices and bytes of consoles that were not delivered, by reason.",
      "reason",
      DropReason.allCases.map { reason in ("\(reason)", { $0.drops(reason).value }) })
    put("vxd_device_link_up", "gauge", "Whether the link of a network device is up.") {
      $0.readings?.isLinkUp.map { $0 ? "1" : "0" }
    }
    put("vxd_device_in_flight", "gauge", "Requests under way.") {
      "\(sum($0) { $0.inFlight.load(ordering: .relaxed) })"
    }
    put(
      "vxd_device_slots", "gauge", "Maximum number of requests in flight: ring occupancy is in_flight divided by this."
    ) {
      $0.readings.map { "\($0.requestLimit)" }
    }
    put("vxd_device_capacity_bytes", "gauge", "Size of the disk.") { $0.readings?.capacity.map { "\($0)" } }
    put("vxd_device_cpu_seconds", "counter", "CPU time of the data threads since the backend was started.") {
      $0.readings.map { seconds($0.cpuTime) }
    }
    put("vxd_device_restarts", "counter", "Restarts of the backend.") { "\($0.restarts)" }
    put("vxd_device_faults", "counter", "Faults of the guest's driver.") { "\($0.faults)" }
    put("vxd_device_stuck_seconds", "gauge", "Age of a stuck request; 0 if there is none.") {
      "\(Double($0.stuck?.age ?? 0) / 1000)"
    }
    writeLatencies(&writer, devices)
  }

  /// Limits of the histogram's buckets in nanoseconds; ends of buckets of `LatencyHistogram`.
  private static let bounds: [UInt64] = (0..<13).map { 16_384 << UInt64(2 * $0) }

  private static func writeLatencies(_ writer: inout Writer, _ devices: [StatusBoard.Device]) {
    var samples: [Sample] = []
    for device in devices {
      for operation in QueueLatencies.Operation.allCases {
        for stage in QueueLatencies.Stage.allCases {
          var counts = LatencyCounts()
          for account in device.accounts { counts += account.latencies.counts(operation, stage) }
          let count = counts.count
          guard count > 0 else { continue }
          let names = labels(device) + [("operation", "\(operation)"), ("stage", "\(stage)")]
          for bound in bounds {
            samples.append(
              Sample(labels: names + [("le", seconds(bound))], value: "\(counts.below(bound))", suffix: "_bucket"))
          }
          samples.append(Sample(labels: names + [("le", "+Inf")], value: "\(count)", suffix: "_bucket"))
          samples.append(Sample(labels: names, value: "\(count)", suffix: "_count"))
          samples.append(Sample(labels: names, value: seconds(counts.sum), suffix: "_sum"))
        }
      }
    }
    writer.put(
      "vxd_device_latency_seconds", "histogram",
      "Time of a request by operation and stage: throttle, queue, engine, total.",
      samples)
  }
}
