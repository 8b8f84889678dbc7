import ControlAPI
import DeviceHost
import Devices
import SimulatedXen
import Supervisor
import TestSupport
import Testing
import Xen

/// Devices that no disk is: declared by profiles, or by the toolstack with options from there.
@Suite struct ProfileDeviceTests {
  private static let profile = #"""
    {"version": 1, "guests": [{"guest": "web*", "devices": [
      {"type": "entropy"}, {"type": "console", "ports": [{"name": "vx.test"}]}]}]}
    """#

  @Test func guestWithoutADiskGetsWhatItsProfileDeclares() throws {
    let world = try World()
    defer { world.end() }
    try world.start(profiles: Self.profile)
    let domain = try world.domain(5, name: "web1")
    _ = try world.domain(6, name: "db1")
    #expect(eventually { world.state("web1", "rng0") == "ready" && world.state("web1", "console0") == "ready" })
    #expect(world.device("web1", "console0")["type"] == "console")
    let registers = TrappedRegisters(domain: domain, base: SlotTable.slot(7).base, vcpu: 0)
    let driver = SimulatedDriver(registers: registers, memory: domain.memory, area: 1 << 20)
    try driver.start(deviceID: 4, wanted: [.eventIndex], queueSize: 16)
    #expect(eventually { world.state("web1", "rng0") == "connected" })
    let guest = SimulatedBlockGuest(domain: domain, driver: driver)
    _ = driver.add([.init(guest.dataAddress, 64, writable: true)])
    driver.notify()
    #expect(try guest.waitForUsed().length == 64)
    world.settle()
    #expect(world.call("device.get", ["guest": "db1", "device": "rng0"])["message"] != nil)
    _ = try world.toolstack.destroy(5, disks: [])
    #expect(eventually { world.info("guests") == 0 })
  }

  @Test func guestThatIsThereBeforeTheDaemonIsFound() throws {
    let world = try World()
    defer { world.end() }
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.start(profiles: Self.profile)
    #expect(eventually { world.state("web1", "rng0") == "ready" && world.state("web1", "xvde") == "ready" })
    // With its last disk of the toolstack's the guest is at its end.
    #expect(try world.toolstack.destroy(5, disks: ["xvde"]))
    #expect(eventually { world.info("guests") == 0 })
  }

  @Test func genericDeviceOfTheToolstackTakesItsOptionsFromTheProfileAndTheEntry() throws {
    let world = try World()
    defer { world.end() }
    try world.start(
      profiles: #"""
        {"version": 1, "guests": [{"guest": "web*", "devices": [
          {"type": "console", "create": false, "historyBytes": 100, "ports": [{"name": "a"}]},
          {"type": "entropy"},
          {"type": "entropy", "create": false, "limits": {"readOps": 50}, "restart": "never"},
          {"type": "network", "create": false},
          {"type": "console", "create": false}]}]}
        """#)
    _ = try world.domain(5, name: "web1")
    try world.toolstack.attachGeneric(type: "virtio,device3", device: 0, to: 5)
    try world.toolstack.attachGeneric(
      type: "virtio,device4", device: 1, to: 5, options: #"{"restart": "always"}"#)
    try world.toolstack.attachGeneric(type: "virtio,device1", device: 2, to: 5, options: #"{"mac": "nonsense"}"#)
    #expect(eventually { world.state("web1", "console0") == "ready" && world.state("web1", "rng1") == "ready" })
    #expect(world.device("web1", "console0")["ports"]?.arrayValue?.count == 2)
    #expect(world.device("web1", "rng1")["limits"]?["readOps"] == 50)
    #expect(world.device("web1", "rng1")["restartPolicy"] == "always")
    #expect(eventually { world.state("web1", "rng0") == "ready" })
    #expect(eventually { world.state("web1", "net2") == "failed" })
    #expect(world.device("web1", "net2")["reason"]?.stringValue?.contains("vx-options.mac") == true)
    try world.toolstack.attachGeneric(type: "virtio,device4", device: 3, to: 5)
    #expect(eventually { world.state("web1", "rng3") == "failed" })
    #expect(world.device("web1", "rng3")["reason"]?.stringValue?.contains("has a console device") == true)
  }

  @Test(arguments: [
    (#"{"type": "floppy"}"#, "type"), (#"{"type": "network", "bridge": "a/b"}"#, "bridge"),
    (#"{"type": "network", "bridge": "averyveryverylongname"}"#, "bridge"),
    (#"{"type": "network", "mac": "01:00:5e:00:00:01"}"#, "mac"), (#"{"type": "network", "mac": "1:2:3"}"#, "mac"),
    (#"{"type": "network", "mtu": 10}"#, "mtu"), (#"{"type": "network", "queues": 17}"#, "queues"),
    (#"{"type": "network", "queueSize": 100}"#, "queueSize"), (#"{"type": "network", "link": true}"#, "link"),
    (#"{"type": "network", "bridge": "br0", "tap": "tap0"}"#, "bridge"),
    (#"{"type": "network", "addresses": ["10.0.0.256"]}"#, "addresses[0]"),
    (#"{"type": "network", "colour": "red"}"#, "colour"), (#"{"type": "console", "pty": "relative"}"#, "pty"),
    (#"{"type": "console", "ports": [{"overflow": "wait"}]}"#, "ports[0].name"),
    (#"{"type": "console", "ports": [{"name": "a/b"}]}"#, "ports[0].name"),
    (#"{"type": "console", "ports": [{"name": "a"}, {"name": "a"}]}"#, "ports"),
    (#"{"type": "console", "ports": [{"name": "a", "socket": {"listen": "x"}}]}"#, "ports[0].socket.listen"),
    (#"{"type": "console", "socket": {"listen": "/a", "connect": "/b"}}"#, "socket"),
    (#"{"type": "console", "socket": {"listen": "/a", "whenOpen": true}}"#, "socket.whenOpen"),
    (#"{"type": "console", "socket": {"whenOpen": true}}"#, "socket"),
    (#"{"type": "console", "log": {"maxBytes": 4096}}"#, "log.path"),
    (#"{"type": "console", "log": {"path": "/a", "keep": -1}}"#, "log.keep"),
    (#"{"type": "entropy", "create": 1}"#, "create"), (#"{"type": "entropy", "limits": {"speed": 1}}"#, "limits.speed"),
    (#"{"type": "entropy", "restart": "maybe"}"#, "restart"), ("17", ""),
  ]) func mistakeInAProfileIsNamedByItsField(device: String, field: String) throws {
    let text = #"{"version": 1, "guests": [{"devices": [\#(device)]}]}"#
    let place = "guests[0].devices[0]" + (field.isEmpty ? "" : ".\(field)")
    let value = try JSONText.parse(Array(text.utf8))
    do throws(SettingFault) {
      _ = try Profiles(value)
      Issue.record("'\(device)' is accepted")
    } catch {
      #expect(error.field == place, "\(error.message)")
    }
  }

  /// New profiles: limits and restart policies hold at once for devices of every type, and `config.diff` says what they would change.
  @Test func newProfilesHoldForDevicesOfEveryType() throws {
    let world = try World()
    defer { world.end() }
    // The network device has no interface, so that it is not served; its options are looked at all the same.
    let devices = [
      ("rng0", #""type": "entropy""#), ("console0", #""type": "console""#),
      ("net0", #""type": "network", "tap": "vx-none""#),
    ]
    func profiles(_ options: String) -> String {
      let list = devices.map { "{\($0.1)\(options)}" }.joined(separator: ", ")
      return #"{"version": 1, "guests": [{"devices": [\#(list)]}]}"#
    }
    let path = world.folder.file("profiles.json", text: profiles(#", "limits": {"readBytes": 4096}"#))
    let loaded = try Profiles(path: path, isOptional: false)
    let actions = SupervisorControl.Actions(profilePath: path, profiles: loaded)
    try world.start(actions: actions) { $0.profiles = loaded }
    _ = try world.domain(5, name: "web1")
    #expect(eventually { world.state("web1", "rng0") == "ready" && world.state("web1", "console0") == "ready" })
    #expect(eventually { world.state("web1", "net0") == "failed" })
    let new = profiles(#", "limits": {"readBytes": 8192}, "restart": "never""#)
    let methods = SupervisorControl.methods(board: world.board, isSimulated: true, actions: actions)
    let request: JSONValue = [
      "jsonrpc": "2.0", "id": 1, "method": "config.diff",
      "params": ["profiles": try JSONText.parse(Array(new.utf8))],
    ]
    let answer = methods.answer(Array(JSONText.text(request).utf8), subscribe: { _ in .null })?["result"]
    let changes = answer?.arrayValue ?? []
    #expect(changes.count == 3)
    _ = world.folder.file("profiles.json", text: new)
    for (name, _) in devices { #expect(world.device("web1", name)["limits"]?["readBytes"] == 4096, "\(name)") }
    try actions.reload()
    for (name, _) in devices {
      let change = changes.first { $0["device"]?.stringValue == name }?["changes"]
      #expect(change == ["limits: readBytes 4096 -> readBytes 8192", "restart: on-failure -> never"], "\(name)")
      #expect(eventually { world.device("web1", name)["limits"]?["readBytes"] == 8192 }, "\(name)")
      #expect(eventually { world.device("web1", name)["restartPolicy"] == "never" }, "\(name)")
    }
  }
}
