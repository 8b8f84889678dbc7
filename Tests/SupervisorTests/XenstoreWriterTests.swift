import Lifecycle
import Logging
import SimulatedXen
import TestSupport
import Testing
import Xen

@testable import Supervisor

/// What is written to entries that others change at the same time.
@Suite struct XenstoreWriterTests {
  private func stage() throws -> (World, XenStore, XenstoreWriter, DeviceKey) {
    let world = try World()
    let reader = XenstoreReader(socketPath: world.server.path)
    try reader.connect { _ in }
    let log = Logger(label: "test", factory: { _ in SwiftLogNoOpLogHandler() })
    let key = DeviceKey(kind: .disk, domain: 5, device: SimulatedToolstack.deviceNumber("xvde"))
    return (world, try XenStore(socketPath: world.server.path), XenstoreWriter(reader, log: log), key)
  }

  /// A device ends, and before that is said another entry has its place: which begins, and must not be ended.
  @Test(arguments: [
    ("5", "0", "6"), ("5", "1", "6"), ("4", "0", "6"), ("1", "0", "6"), ("1", "1", "1"), ("6", "1", "6"),
  ])
  func closedIsNotSaidOfAnEntryThatBegins(state: String, online: String, after: String) throws {
    let (world, xenstore, writer, key) = try stage()
    defer { world.end() }
    try xenstore.write("\(key.path)/state", state)
    try xenstore.write("\(key.path)/online", online)
    let frontend = "/local/domain/5/device/virtio_disk/\(key.device)"
    try xenstore.write("\(key.path)/frontend", frontend)
    try xenstore.write("\(frontend)/backend", "/local/domain/0/\(key.path)")
    writer.writeClosed(key)
    #expect(xenstore.read("\(key.path)/state") == after)
  }

  @Test func nothingBringsAnEntryBackThatIsGone() throws {
    let (world, xenstore, writer, key) = try stage()
    defer { world.end() }
    writer.writeClosed(key)
    writer.writeError(key, "late")
    writer.writeState(key, .initWait, over: [.initialising])
    writer.offer(key, "offer", configuration: "0 0 ")
    #expect(xenstore.list("backend") == nil)
  }

  @Test(arguments: [("1", "2"), ("2", "2"), ("5", "5")])
  func stateIsWrittenOverThoseThatAreNamed(state: String, after: String) throws {
    let (world, xenstore, writer, key) = try stage()
    defer { world.end() }
    try xenstore.write("\(key.path)/state", state)
    writer.writeState(key, .initWait, over: [.initialising])
    #expect(xenstore.read("\(key.path)/state") == after)
  }
}
