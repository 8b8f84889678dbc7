import ArgumentParser
import ControlAPI
import Glibc
import Xen

/// `vxctl explain GUEST[/DEVICE]`: every step from the Xenstore entry to the backing storage, up to the first problem.
struct Explain: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract:
      "Check every step from the Xenstore entry to the backing storage; report the first problem and how to fix it.")

  struct Target: CommandValue {
    static let expected = "GUEST or GUEST/DEVICE (GUEST is a name, name:NAME, or id:N without leading zeros)"

    let guest: GuestName
    let device: DeviceName?

    init?(argument: String) {
      device = DeviceName(argument: argument)
      guard let guest = device?.guest ?? GuestName(argument: argument) else { return nil }
      self.guest = guest
    }
  }

  @OptionGroup var connection: ConnectionOptions
  @Argument(help: "GUEST for all its devices, or GUEST/DEVICE.", transform: Target.value)
  var target: Target
  @Option(help: .hidden, transform: Value.path)
  var qemuFolder = QEMUMonitor.folder

  /// The first problem.
  private struct Wrong: Error {
    var words: String
    var remedy: String
    /// Where it is that a request to the daemon failed.
    var trouble: Trouble?
  }

  /// What was found so far, for the end: an array of findings in JSON, or lines that were printed at once.
  private final class Report {
    private let asJSON: Bool
    private var findings: [Finding] = []

    init(json: Bool) { asJSON = json }

    func add(_ verdict: Finding.Verdict, _ text: String, remedy: String? = nil, _ trouble: Trouble? = nil) {
      guard !asJSON else {
        return findings.append(Finding(verdict, remedy ?? "", text, trouble))
      }
      Output.line("\(verdict.rawValue.padded(to: 4)) \(Output.printable(text))")
      if let remedy { Output.line("     \(Output.printable(remedy))") }
    }

    func end() {
      guard asJSON else { return }
      Output.json(
        .array(
          findings.map { finding in
            var members: [JSONValue.Member] = [
              .init(name: "ok", value: .bool(finding.verdict != .bad)),
              .init(name: "verdict", value: .string(finding.verdict.rawValue.lowercased())),
              .init(name: "text", value: .string(finding.text)),
            ]
            if !finding.subject.isEmpty { members.append(.init(name: "remedy", value: .string(finding.subject))) }
            if let trouble = finding.trouble { members.append(.init(name: "error", value: trouble.error)) }
            return .object(members)
          }))
    }
  }

  func validate() throws {
    guard connection.domain == nil else {
      throw ValidationError(
        "--domain: explain looks at the domain that it runs in; 'vxctl list --domain' gives reasons too")
    }
  }

  func run() throws {
    let (guest, name) = (target.guest, target.device)
    let report = Report(json: connection.json)
    defer { report.end() }
    do throws(Wrong) {
      let client = try reachDaemon(report)
      let domain = try findDomain(guest, report)
      let known = try findGuest(guest, client)
      let number = domain ?? known?["domain"]?.integerValue.flatMap { DomainID(exactly: $0) }
      let entries = try number.map { number throws(Wrong) in try checkEntries(number, report) } ?? 0
      guard let known else {
        guard entries == 0 else {
          throw Wrong(words: "vxd does not know the guest", remedy: "look at vxd's log: journalctl -u vxd")
        }
        throw Wrong(
          words: "the guest has no virtio device whose backend is this domain, in Xenstore or in the profiles",
          remedy: "its disk line needs backendtype=standalone, specification=virtio, and no backend= of another domain")
      }
      let devices = try devices(of: known, client, report)
      if let note = (known["warning"] ?? known["note"])?.stringValue { report.add(.note, note) }
      for device in devices
      where name == nil || device.cell("device") == name?.device || device.cell("id") == name?.device {
        try explain(device, client, report, guestNeeds: known.cell("guestNeeds"))
      }
      if let name, !devices.contains(where: { $0.cell("device") == name.device || $0.cell("id") == name.device }) {
        throw Wrong(
          words: "guest '\(guest.plain)' has no device '\(name.device)'",
          remedy: "it has \(devices.map { $0.cell("device") }.joined(separator: ", "))")
      }
      if entries > devices.count(where: { ["virtio_disk", "virtio"].contains($0.cell("kind")) }) {
        throw Wrong(
          words: "Xenstore has \(entries) entries for the guest, but vxd serves fewer devices",
          remedy: "look at vxd's log: journalctl -u vxd")
      }
      report.add(.good, "no problem found")
    } catch {
      report.add(.bad, error.words, remedy: error.remedy, error.trouble)
      throw ExitCode(1)
    }
  }

  private func reachDaemon(_ report: Report) throws(Wrong) -> ControlClient {
    do throws(ControlClient.Failure) {
      let client = try ControlClient(path: connection.socket)
      let info = try client.call("system.info")
      report.add(.good, "vxd \(info.cell("version")) answers, on \(info.cell("hypervisor"))")
      guard info["xenstoreConnected"]?.boolValue == true else {
        throw .protocolBroken("vxd has lost its connection to xenstored; it retries every 5 s")
      }
      return client
    } catch {
      throw Wrong(
        words: error.message, remedy: "see 'systemctl status vxd', 'journalctl -u vxd' and 'vxctl doctor'",
        trouble: Trouble(error))
    }
  }

  private func openXenstore() -> XenStore? { try? XenStore() }

  /// The guest's domain as Xenstore has it; nil where domains cannot be read, as in a driver domain.
  private func findDomain(_ guest: GuestName, _ report: Report) throws(Wrong) -> DomainID? {
    guard let xenstore = openXenstore(), xenstore.list("/local/domain")?.isEmpty == false else { return nil }
    do throws(ToolstackDevice.Fault) {
      let domain = try guest.domain(in: xenstore)
      report.add(.good, "the guest runs as domain \(domain)")
      return domain
    } catch {
      throw Wrong(words: error.message, remedy: "check with 'xl list' whether it is running")
    }
  }

  /// Checks the guest's entries in Xenstore.
  ///
  /// - Returns: how many there are.
  private func checkEntries(_ domain: DomainID, _ report: Report) throws(Wrong) -> Int {
    guard let xenstore = openXenstore() else {
      report.add(.note, "Xenstore is not readable here: entries are not checked")
      return 0
    }
    var count = 0
    for kind in ["virtio_disk", "virtio"] {
      for entry in xenstore.list("backend/\(kind)/\(domain)") ?? [] {
        let path = "backend/\(kind)/\(domain)/\(entry)"
        let name = xenstore.read("\(path)/dev") ?? "\(kind) \(entry)"
        if let fault = xenstore.read("\(path)/error") {
          throw Wrong(
            words: "the entry of \(name) was refused: \(fault)",
            remedy: "correct the guest's configuration, or the image")
        }
        let what = xenstore.read("\(path)/params") ?? xenstore.read("\(path)/type") ?? "?"
        report.add(.good, "entry \(name): \(what), backend state \(xenstore.read("\(path)/state") ?? "?")")
        count += 1
      }
    }
    return count
  }

  /// The guest as vxd knows it; nil when it does not.
  private func findGuest(_ guest: GuestName, _ client: ControlClient) throws(Wrong) -> JSONValue? {
    do throws(ControlClient.Failure) {
      let known = try guest.known(to: client)
      let guests = try client.call("guest.list").arrayValue ?? []
      return known.domain.flatMap { domain in guests.first { $0["domain"]?.integerValue == domain } }
    } catch {
      throw Wrong(words: error.message, remedy: "see 'journalctl -u vxd' and 'vxctl doctor'", trouble: Trouble(error))
    }
  }

  private func devices(
    of guest: JSONValue, _ client: ControlClient, _ report: Report
  ) throws(Wrong) -> [JSONValue] {
    guard guest.cell("state") == "running" else {
      throw Wrong(
        words: "the guest is \(guest.cell("state")): \(guest.cell("reason"))",
        remedy: "see 'journalctl -u vxd' and 'vxctl doctor'"
      )
    }
    for fact in guest["facts"]?.arrayValue ?? [] {
      report.add(.good, "\(fact.cell("name")): \(fact.cell("value"))")
    }
    do throws(ControlClient.Failure) {
      return try client.call("device.list", ["guest": .string(guest.cell("name"))]).arrayValue ?? []
    } catch {
      throw Wrong(words: error.message, remedy: "see 'journalctl -u vxd' and 'vxctl doctor'", trouble: Trouble(error))
    }
  }

  /// Looks whether QEMU has a device in the place of one of ours, where it has devices beside them.
  private func checkCollision(_ name: String, _ device: JSONValue) throws(Wrong) {
    guard let address = device["addressBesideQEMU"]?.stringValue,
      let domain = device["domain"]?.integerValue.flatMap({ DomainID(exactly: $0) }),
      let others = QEMUMonitor.functions(of: domain, folder: qemuFolder),
      others.contains(where: { "\(PCIAddress(device: $0.device, function: $0.function))" == address })
    else { return }
    throw Wrong(
      words: "\(name): QEMU has a device at PCI function \(address) too, and the guest finds only one of them",
      remedy: "move QEMU's (pci= with '@', addr= in the guest's configuration), or vxd's with the option \"slot\"")
  }

  private static let remedies = [
    "failed": "fix the cause; vxd retries automatically",
    "faulted": "the guest's driver must reset the device: unbind and bind it, or restart the guest",
    "held": "free space or fix the storage, then 'vxctl resume'",
    "quarantined": "fix the cause, then 'vxctl restart'",
    "paused": "'vxctl resume'", "restarting": "wait, and watch 'vxctl events'",
    "opening": "opening the image takes long: check that its storage or server answers",
  ]

  private func explain(
    _ device: JSONValue, _ client: ControlClient, _ report: Report, guestNeeds: String
  ) throws(Wrong) {
    func good(_ text: String) { report.add(.good, text) }
    let name = "\(device.cell("guest"))/\(device.cell("device"))"
    let state = device.cell("state")
    if let remedy = Self.remedies[state] {
      throw Wrong(words: "\(name) is \(state)\(device["reason"]?.stringValue.map { ": \($0)" } ?? "")", remedy: remedy)
    }
    guard
      let full = try? client.call(
        "device.get", ["guest": .string(device.cell("guest")), "device": .string(device.cell("device"))])
    else { throw Wrong(words: "\(name) has gone in the meantime", remedy: "run this again") }
    let what = full["image"]?.stringValue ?? full.cell("type")
    let place = (full["facts"]?.arrayValue ?? []).map { "; \($0.cell("name")) \($0.cell("value"))" }.joined()
    good("\(name): \(what) is open (\(full.cell(full["mode"] == nil ? "store" : "mode")))\(place)")
    try checkCollision(name, full)
    guard state == "connected" else {
      if device.cell("kind") == "spare" { return good("\(name): an empty spare, no driver needed") }
      throw Wrong(
        words: "\(name): the guest's driver has not connected (driver status \(full.cell("driverStatus")))",
        remedy: "check that the guest is running; it needs \(full["guestNeeds"]?.stringValue ?? guestNeeds)")
    }
    if let stuck = full["stuck"] {
      throw Wrong(
        words:
          "\(name): a request of queue \(stuck.cell("queue")) is \(stuck.cell("milliseconds")) ms old, in the \(stuck.cell("layer"))",
        remedy: "the storage does not answer: check the disk or the NBD server")
    }
    good("\(name): the driver works, \(full.cell("requests")) requests, \(full.cell("inFlight")) in flight")
    let throttled = full["counters"]?["throttled"]?.integerValue ?? 0
    if throttled > 0 { good("\(name): \(throttled) requests were delayed by limits (vxctl limit \(name))") }
    if full["counters"]?["failed"]?.integerValue ?? 0 > 0 {
      report.add(.note, "\(name): \(full["counters"]?.cell("failed") ?? "?") requests have failed so far")
    }
  }
}

extension String {
  fileprivate func padded(to width: Int) -> String { self + String(repeating: " ", count: max(0, width - count)) }
}
