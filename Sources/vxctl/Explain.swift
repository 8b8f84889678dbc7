import ArgumentParser
import ControlAPI
import Glibc
import Xen

/// `vxctl explain GUEST[/DEVICE]`: the whole way from the entry in Xenstore to the store, up to the first thing that is wrong.
struct Explain: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Walks the whole chain of a guest's devices and names the first thing that is wrong, and what to do.")

  @OptionGroup var connection: ConnectionOptions
  @Argument(help: "GUEST or GUEST/DEVICE.")
  var target: String

  /// The first thing that is wrong.
  private struct Wrong: Error {
    var words: String
    var remedy: String
  }

  func run() throws {
    let name = DeviceName(argument: target)
    let guest = name?.guest ?? target
    do throws(Wrong) {
      let client = try reachDaemon()
      let domain = try findDomain(guest)
      let known = try findGuest(guest, client)
      let entries = try (domain ?? known?.cell("domain")).map { domain throws(Wrong) in try checkEntries(domain) } ?? 0
      guard let known else {
        guard entries == 0 else {
          throw Wrong(words: "vxd does not know the guest", remedy: "look at vxd's log: journalctl -u vxd")
        }
        throw Wrong(
          words: "the guest has no virtio device whose backend is this domain, in Xenstore or in the profiles",
          remedy: "its disk line needs backendtype=standalone, specification=virtio, and no backend= of another domain")
      }
      let devices = try devices(of: known, client)
      for device in devices
      where name == nil || device.cell("device") == name?.device || device.cell("id") == name?.device {
        try explain(device, client, guestNeeds: known.cell("guestNeeds"))
      }
      if let name, !devices.contains(where: { $0.cell("device") == name.device || $0.cell("id") == name.device }) {
        throw Wrong(
          words: "guest '\(guest)' has no device '\(name.device)'",
          remedy: "it has \(devices.map { $0.cell("device") }.joined(separator: ", "))")
      }
      if entries > devices.count(where: { ["virtio_disk", "virtio"].contains($0.cell("kind")) }) {
        throw Wrong(
          words: "Xenstore has \(entries) entries, vxd serves fewer", remedy: "look at vxd's log: journalctl -u vxd")
      }
      if let note = known["note"]?.stringValue { print("note: \(note)") }
      print("nothing is wrong")
    } catch {
      print("BAD  \(error.words)")
      print("     \(error.remedy)")
      throw ExitCode(1)
    }
  }

  private func good(_ words: String) { print("ok   \(words)") }

  private func reachDaemon() throws(Wrong) -> ControlClient {
    do throws(ControlClient.Failure) {
      let client = try ControlClient(path: connection.socket)
      let info = try client.call("system.info")
      good("vxd \(info.cell("version")) answers, on \(info.cell("hypervisor"))")
      guard info["xenstoreConnected"]?.boolValue == true else {
        throw .protocolBroken("vxd has lost xenstored; it looks for it every 5 s")
      }
      return client
    } catch {
      throw Wrong(words: error.message, remedy: "systemctl status vxd; journalctl -u vxd; vxctl doctor")
    }
  }

  private func openStore() -> XenStore? { try? XenStore() }

  /// The guest's domain as Xenstore has it; nil where domains cannot be read, as in a driver domain.
  private func findDomain(_ guest: String) throws(Wrong) -> String? {
    guard let store = openStore(), let domains = store.list("/local/domain") else { return nil }
    for domain in domains {
      guard domain == guest || store.read("/local/domain/\(domain)/name") == guest else { continue }
      good("the guest runs as domain \(domain)")
      return domain
    }
    throw Wrong(words: "there is no guest '\(guest)'", remedy: "xl list; is it running?")
  }

  /// Checks the guest's entries in Xenstore.
  ///
  /// - Returns: how many there are.
  private func checkEntries(_ domain: String) throws(Wrong) -> Int {
    guard let store = openStore() else {
      good("(Xenstore cannot be read from here: entries are not checked)")
      return 0
    }
    var count = 0
    for kind in ["virtio_disk", "virtio"] {
      for entry in store.list("backend/\(kind)/\(domain)") ?? [] {
        let path = "backend/\(kind)/\(domain)/\(entry)"
        let name = store.read("\(path)/dev") ?? "\(kind) \(entry)"
        if let fault = store.read("\(path)/error") {
          throw Wrong(
            words: "the entry of \(name) is refused: \(fault)",
            remedy: "correct the guest's configuration, or the image")
        }
        let what = store.read("\(path)/params") ?? store.read("\(path)/type") ?? "?"
        good("entry \(name): \(what), backend state \(store.read("\(path)/state") ?? "?")")
        count += 1
      }
    }
    return count
  }

  /// The guest as vxd knows it; nil when it does not.
  private func findGuest(_ guest: String, _ client: ControlClient) throws(Wrong) -> JSONValue? {
    do throws(ControlClient.Failure) {
      let guests = try client.call("guest.list").arrayValue ?? []
      return guests.first { $0.cell("name") == guest || $0.cell("domain") == guest }
    } catch {
      throw Wrong(words: error.message, remedy: "journalctl -u vxd; vxctl doctor")
    }
  }

  private func devices(of guest: JSONValue, _ client: ControlClient) throws(Wrong) -> [JSONValue] {
    guard guest.cell("state") == "running" else {
      throw Wrong(
        words: "the guest is \(guest.cell("state")): \(guest.cell("reason"))", remedy: "journalctl -u vxd; vxctl doctor"
      )
    }
    for fact in guest["facts"]?.arrayValue ?? [] { good("\(fact.cell("name")): \(fact.cell("value"))") }
    do throws(ControlClient.Failure) {
      return try client.call("device.list", ["guest": .string(guest.cell("name"))]).arrayValue ?? []
    } catch {
      throw Wrong(words: error.message, remedy: "journalctl -u vxd; vxctl doctor")
    }
  }

  private static let remedies = [
    "failed": "correct what it names; vxd tries again by itself",
    "faulted": "the guest's driver must reset the device: unbind and bind it, or restart the guest",
    "held": "mend the store, then 'vxctl resume'", "quarantined": "'vxctl device restart' when the cause is gone",
    "paused": "'vxctl resume'", "restarting": "wait, and watch 'vxctl events'",
    "opening": "the image takes long to open: is its server there?",
  ]

  private func explain(_ device: JSONValue, _ client: ControlClient, guestNeeds: String) throws(Wrong) {
    let name = "\(device.cell("guest"))/\(device.cell("device"))"
    let state = device.cell("state")
    if let remedy = Self.remedies[state] {
      throw Wrong(words: "\(name) is \(state)\(device["reason"]?.stringValue.map { ": \($0)" } ?? "")", remedy: remedy)
    }
    guard
      let full = try? client.call(
        "device.get", ["guest": .string(device.cell("guest")), "device": .string(device.cell("device"))])
    else { throw Wrong(words: "\(name) has gone meanwhile", remedy: "ask again") }
    let what = full["image"]?.stringValue ?? full.cell("type")
    let place = (full["facts"]?.arrayValue ?? []).map { "; \($0.cell("name")) \($0.cell("value"))" }.joined()
    good("\(name): \(what) is open (\(full.cell("store")))\(place)")
    guard state == "connected" else {
      if device.cell("kind") == "spare" { return good("\(name): an empty spare, no driver needed") }
      throw Wrong(
        words: "\(name): the guest's driver has not taken the device (driver status \(full.cell("driverStatus")))",
        remedy: "is the guest up? It needs \(guestNeeds)")
    }
    if let stuck = full["stuck"] {
      throw Wrong(
        words:
          "\(name): a request of queue \(stuck.cell("queue")) is \(stuck.cell("milliseconds")) ms old, in the \(stuck.cell("layer"))",
        remedy: "the store does not answer: look at the disk or the NBD server behind it")
    }
    good("\(name): the driver works, \(full.cell("requests")) requests, \(full.cell("inFlight")) under way")
    let throttled = full["counters"]?["throttled"]?.integerValue ?? 0
    if throttled > 0 { good("\(name): \(throttled) requests waited for their rate (vxctl limit \(name))") }
    if full["counters"]?["failed"]?.integerValue ?? 0 > 0 {
      good("\(name): note that \(full["counters"]?.cell("failed") ?? "?") requests have failed so far")
    }
  }
}
