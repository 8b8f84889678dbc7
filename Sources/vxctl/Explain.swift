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
      let domain = try findGuest(guest)
      let entries = try findEntries(guest, domain, client)
      let devices = try knownDevices(guest, client)
      for device in devices
      where name == nil || device.cell("device") == name?.device || device.cell("id") == name?.device {
        try explain(device, client)
      }
      if let name, !devices.contains(where: { $0.cell("device") == name.device || $0.cell("id") == name.device }) {
        throw Wrong(
          words: "guest '\(guest)' has no device '\(name.device)'",
          remedy: "it has \(devices.map { $0.cell("device") }.joined(separator: ", "))")
      }
      if entries > devices.filter({ $0.cell("kind") != "spare" }).count {
        throw Wrong(
          words: "Xenstore has \(entries) entries, vxd serves fewer", remedy: "look at vxd's log: journalctl -u vxd")
      }
      if devices.contains(where: { $0.cell("transport") != "xenbus" }) {
        print(
          "note: xl save and migrate do not carry the state of these devices (ioreq-based): shut the guest down instead"
        )
      }
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

  private func findGuest(_ guest: String) throws(Wrong) -> String? {
    guard let store = openStore() else {
      good("(Xenstore cannot be read from here: entries are not checked)")
      return nil
    }
    for domain in store.list("/local/domain") ?? [] {
      guard domain == guest || store.read("/local/domain/\(domain)/name") == guest else { continue }
      good("the guest runs as domain \(domain)")
      return domain
    }
    throw Wrong(words: "there is no guest '\(guest)'", remedy: "xl list; is it running?")
  }

  private func findEntries(_ guest: String, _ domain: String?, _ client: ControlClient) throws(Wrong) -> Int {
    guard let domain, let store = openStore() else { return 0 }
    let entries = store.list("backend/virtio_disk/\(domain)") ?? []
    guard !entries.isEmpty else {
      throw Wrong(
        words: "Xenstore has no virtio disk of the guest whose backend is this domain",
        remedy: "its disk line needs backendtype=standalone, specification=virtio, and no backend= of another domain")
    }
    for entry in entries {
      let path = "backend/virtio_disk/\(domain)/\(entry)"
      let name = store.read("\(path)/dev") ?? entry
      if let fault = store.read("\(path)/error") {
        throw Wrong(
          words: "the entry of \(name) is refused: \(fault)", remedy: "correct the guest's configuration, or the image")
      }
      good("entry \(name): \(store.read("\(path)/params") ?? "?"), backend state \(store.read("\(path)/state") ?? "?")")
    }
    return entries.count
  }

  private func knownDevices(_ guest: String, _ client: ControlClient) throws(Wrong) -> [JSONValue] {
    do throws(ControlClient.Failure) {
      let guests = try client.call("guest.list").arrayValue ?? []
      guard let found = guests.first(where: { $0.cell("name") == guest || $0.cell("domain") == guest }) else {
        throw .protocolBroken("vxd does not know the guest")
      }
      guard found.cell("state") == "running", found["ioreqServer"] != nil else {
        throw .protocolBroken("the guest is \(found.cell("state")): \(found.cell("reason"))")
      }
      good("ioreq server \(found["ioreqServer"]?.cell("id") ?? "?") is there, for \(found.cell("vcpus")) vCPUs")
      return try client.call("device.list", ["guest": .string(guest)]).arrayValue ?? []
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

  private func explain(_ device: JSONValue, _ client: ControlClient) throws(Wrong) {
    let name = "\(device.cell("guest"))/\(device.cell("device"))"
    let state = device.cell("state")
    if let remedy = Self.remedies[state] {
      throw Wrong(words: "\(name) is \(state)\(device["reason"]?.stringValue.map { ": \($0)" } ?? "")", remedy: remedy)
    }
    guard
      let full = try? client.call(
        "device.get", ["guest": .string(device.cell("guest")), "device": .string(device.cell("device"))])
    else { throw Wrong(words: "\(name) has gone meanwhile", remedy: "ask again") }
    good(
      "\(name): \(full.cell("image")) is open (\(full.cell("store"))), in slot \(full.cell("slot")) at \(full.cell("base"))"
    )
    guard state == "connected" else {
      if device.cell("kind") == "spare" { return good("\(name): an empty spare, no driver needed") }
      throw Wrong(
        words: "\(name): the guest's driver has not taken the device (driver status \(full.cell("driverStatus")))",
        remedy: "is the guest up? It needs virtio_mmio and virtio_blk, and the slots' ACPI table: "
          + "acpi_firmware=\"/usr/share/vxd/slots.aml\" in its configuration")
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
