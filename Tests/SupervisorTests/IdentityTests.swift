import ControlAPI
import SimulatedXen
import TestSupport
import Testing
import Xen

@testable import Supervisor

/// Who a guest is to a driver domain, which may not see its name: the UUID that dom0 wrote, and never its number.
@Suite struct IdentityTests {
  private static let uuid = "00000000-0000-4000-8000-0000000000aa"

  /// A vxd in a domain that is not dom0, with one guest whose own nodes it cannot read.
  private func world(_ profiles: String, uuid: String? = nil) throws -> World {
    let world = try World()
    let xenstore = try XenStore(socketPath: world.server.path)
    try xenstore.write("/local/domain/0/domid", "3")
    _ = try world.domain(5, name: "web1", type: "pvh")
    for node in ["name", "vm"] { try xenstore.remove("/local/domain/5/\(node)") }
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5, changes: uuid.map { ["vx-uuid": $0] } ?? [:])
    try world.start(profiles: profiles)
    #expect(eventually { world.state("domain-5", "xvde") == "ready" })
    return world
  }

  private func limits(_ world: World) -> JSONValue? { world.device("domain-5", "xvde")["limits"]?["readOps"] }

  private func profiles(_ guest: String) -> String {
    #"{"version": 1, "disks": [{"guest": "\#(guest)", "limits": {"readOps": 77}}]}"#
  }

  /// The number was another guest's before the host was rebooted.
  @Test(arguments: ["domain-5", "domain-*", "5", "web1"])
  func numberIsNobodysIdentity(pattern: String) throws {
    let world = try world(profiles(pattern))
    defer { world.end() }
    #expect(limits(world) == nil || limits(world) == .null)
  }

  @Test(arguments: ["*", IdentityTests.uuid]) func uuidOfDom0IsWhoTheGuestIs(pattern: String) throws {
    let world = try world(profiles(pattern), uuid: Self.uuid)
    defer { world.end() }
    #expect(limits(world) == 77)
    #expect(world.call("guest.list").arrayValue?.first?["uuid"]?.stringValue == Self.uuid)
  }

  /// A domain number has one form, and what is none is no guest that might come.
  @Test(arguments: ["id:05", "id:x", "id:", "id:+5", "name:", ""]) func wordThatCanBeNoGuestIsRefused(word: String)
    throws
  {
    let world = try world(#"{"version": 1}"#)
    defer { world.end() }
    #expect(world.call("device.list", ["guest": "id:5"]).arrayValue?.count == 1)
    let refused = world.call("device.list", ["guest": .string(word)])
    #expect(refused["code"] == -32602)
    #expect(refused["data"]?["field"] == "params.guest")
    #expect(refused["message"]?.stringValue?.hasPrefix("'\(word)': expected a guest: ") == true)
    #expect(world.call("device.list", ["guest": "05"])["code"] == -32001)
  }

  /// Devices of an xl configuration are there before dom0 can say whose they are.
  @Test func guestThatIsIdentifiedLaterGetsItsProfile() throws {
    let world = try world(
      #"{"version": 1, "disks": [{"guest": "\#(Self.uuid)", "limits": {"readOps": 77}, "queues": 3}],"#
        + #" "guests": [{"guest": "\#(Self.uuid)", "limits": {"readOps": 99}}]}"#)
    defer { world.end() }
    #expect(limits(world) == nil || limits(world) == .null)
    #expect(world.device("domain-5", "xvde")["queues"] == 1)
    try world.toolstack.set("vx-uuid", Self.uuid, disk: "xvde", of: 5)
    #expect(eventually { limits(world) == 77 })
    #expect(eventually { world.call("guest.list").arrayValue?.first?["uuid"]?.stringValue == Self.uuid })
    // It was offered with one queue, and stays so; a device that comes now has all of its options.
    #expect(world.device("domain-5", "xvde")["queues"] == 1)
    try world.toolstack.attach(disk: "xvdf", image: world.image("other.img"), to: 5)
    #expect(eventually { world.device("domain-5", "xvdf")["queues"] == 3 })
  }

  private static let threeQueues = #"{"version": 1, "disks": [{"guest": "\#(uuid)", "queues": 3}]}"#

  /// `vxctl attach` for a guest that has a disk of its xl configuration, which nobody has said whose it is.
  @Test func uuidThatComesWithAnotherDeviceHoldsForThatDeviceAtOnce() throws {
    let world = try world(Self.threeQueues)
    defer { world.end() }
    try world.toolstack.attach(disk: "xvdf", image: world.image("other.img"), to: 5, changes: ["vx-uuid": Self.uuid])
    #expect(eventually { world.state("domain-5", "xvdf") == "ready" })
    #expect(world.device("domain-5", "xvdf")["queues"] == 3)
    #expect(world.call("guest.list").arrayValue?.first?["uuid"]?.stringValue == Self.uuid)
  }

  /// vxd starts after dom0 wrote the UUID into one of the entries, and not the first.
  @Test func uuidOfAnyEntryIsWhoTheGuestIs() throws {
    let world = try World()
    defer { world.end() }
    let xenstore = try XenStore(socketPath: world.server.path)
    try xenstore.write("/local/domain/0/domid", "3")
    _ = try world.domain(5, name: "web1", type: "pvh")
    for node in ["name", "vm"] { try xenstore.remove("/local/domain/5/\(node)") }
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    try world.toolstack.attach(disk: "xvdf", image: world.image("other.img"), to: 5, changes: ["vx-uuid": Self.uuid])
    try world.start(profiles: Self.threeQueues)
    for disk in ["xvde", "xvdf"] {
      #expect(eventually { world.state("domain-5", disk) == "ready" })
      #expect(world.device("domain-5", disk)["queues"] == 3)
    }
  }

  /// An address that is derived from the number would be another guest's after a reboot of the host.
  @Test func networkDeviceOfAGuestThatNobodyNamedNeedsAnAddress() throws {
    let world = try world(
      #"{"version": 1, "guests": [{"guest": "*", "devices": [{"type": "network", "create": false, "tap": "vx-none"}]}]}"#
    )
    defer { world.end() }
    func reason(_ device: String) -> String { world.device("domain-5", device)["reason"]?.stringValue ?? "" }
    // With its options from the profile, and from its entry.
    try world.toolstack.attachGeneric(type: "virtio,device1", device: 0, to: 5)
    try world.toolstack.attachGeneric(type: "virtio,device1", device: 7, to: 5, options: #"{"tap": "vx-none"}"#)
    for device in ["net0", "net7"] {
      #expect(eventually { world.state("domain-5", device) == "failed" })
      #expect(reason(device).contains("vx-options.mac: not given"), "\(reason(device))")
      #expect(reason(device).contains("run 'vxctl identify' in dom0"), "\(reason(device))")
    }
    // One with an address comes as far as its interface, which does not exist.
    try world.toolstack.attachGeneric(
      type: "virtio,device1", device: 8, to: 5, options: #"{"tap": "vx-none", "mac": "00:16:3e:01:02:03"}"#)
    #expect(eventually { reason("net8").contains("vx-none") }, "\(reason("net8"))")
    // Dom0 says who the guest is: the others are tried again at once.
    try world.toolstack.set("vx-uuid", Self.uuid, disk: "xvde", of: 5)
    for device in ["net0", "net7"] { #expect(eventually { reason(device).contains("vx-none") }, "\(reason(device))") }
  }

  /// What dom0 writes, as `vxctl attach` and `vxctl identify` do.
  @Test func toolstackWritesTheUUIDWhereTheBackendReadsIt() throws {
    let world = try World()
    defer { world.end() }
    _ = try world.domain(5, name: "web1", type: "pvh")
    let xenstore = try XenStore(socketPath: world.server.path)
    let disk = ToolstackDevice(xenstore, guest: 5, device: try ToolstackDevice.number("xvdf"))
    try disk.create(backend: 3, target: "/image", readOnly: false)
    let path = "/local/domain/3/backend/virtio_disk/5/\(disk.device)/vx-uuid"
    let uuid = xenstore.read(path)
    #expect(uuid == "00000000-0000-4000-8000-000000001005")
    try xenstore.remove(path)
    #expect(try disk.identify() == uuid)
    #expect(xenstore.read(path) == uuid)
    try disk.move(to: 4)
    #expect(xenstore.read("/local/domain/4/backend/virtio_disk/5/\(disk.device)/vx-uuid") == uuid)
  }
}
