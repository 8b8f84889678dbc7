import ControlAPI
import DeviceHost
import Devices
import Supervisor
import TestSupport
import Testing

@Suite struct DiskProfileTests {
  private func profiles(_ text: String) throws -> Profiles {
    try Profiles(try JSONText.parse(Array(text.utf8)))
  }

  private func settings(_ profiles: Profiles, guest: String = "db1", uuid: String? = nil, device: String = "xvde")
    -> BlockSettings
  {
    var settings = BlockSettings(path: "/x", readOnly: false, discard: true, serial: "")
    profiles.apply(to: &settings, guest: guest, uuid: uuid, device: device, number: 51776)
    return settings
  }

  @Test func entriesThatMatchAreAppliedInTheirOrder() throws {
    let profiles = try profiles(
      """
      {"version": 1, "disks": [
        {"queues": 2, "cache": "writethrough"},
        {"guest": "db*", "device": "xvde", "queues": 4, "threads": 4, "onNoSpace": "hold", "onError": "retry", "retrySeconds": 5},
        {"guest": "db1", "device": "51776", "packed": true, "queueSize": 100},
        {"guest": "c0ffee*", "stuckSeconds": 7},
        {"guest": "web", "queues": 9}]}
      """)
    let db = settings(profiles, uuid: "c0ffee00-1111")
    #expect((db.queues, db.threads, db.packed, db.queueSize) == (4, 4, true, 100))
    #expect(db.cache == .writethrough)
    #expect(db.errors.onNoSpace == .hold)
    #expect(db.errors.onError == .retry(milliseconds: 5000))
    #expect(db.stuckMilliseconds == 7000)
    let other = settings(profiles, guest: "other", device: "xvdf")
    #expect((other.queues, other.packed, other.stuckMilliseconds) == (2, false, 30_000))
  }

  static let mistakes = [
    (#"[]"#, "file: expected an object, not an array"),
    (#"{"version": 2}"#, "version: expected 1, not 2"),
    (
      #"{"version": 1, "disk": []}"#,
      #"disk: unknown option; did you mean "disks"? (expected one of version, disks, guests, daemon)"#
    ),
    (#"{"version": 1, "disks": {}}"#, "disks: expected an array, not an object"),
    (#"{"version": 1, "disks": [1]}"#, "disks[0]: expected an object, not 1"),
    (#"{"version": 1, "disks": [{"queues": 0}]}"#, "disks[0].queues: expected a whole number from 1 to 64, not 0"),
    (
      #"{"version": 1, "disks": [{"queues": "4"}]}"#, #"disks[0].queues: expected a whole number from 1 to 64, not "4""#
    ),
    (
      #"{"version": 1, "disks": [{}, {"cache": "none"}]}"#,
      #"disks[1].cache: expected one of writeback, writethrough, unsafe, not "none""#
    ),
    (
      #"{"version": 1, "disks": [{"onError": "panic"}]}"#,
      #"disks[0].onError: expected one of report, retry, hold, not "panic""#
    ),
    (#"{"version": 1, "disks": [{"packed": 1}]}"#, "disks[0].packed: expected true or false, not 1"),
    (
      #"{"version": 1, "disks": [{"queueSize": 100}]}"#,
      #"disks[0].queueSize: expected a power of two for split rings, not 100; or set "packed" to true"#
    ),
    (#"{"version": 1, "disks": [{"guest": 4}]}"#, "disks[0].guest: expected a string, not 4"),
    (
      #"{"version": 1, "disks": [{"nbd": "http://x"}]}"#,
      "disks[0].nbd: expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; 'http://x' is not a valid NBD address: 'http' is neither 'nbd' nor 'nbd+unix'"
    ),
    (
      #"{"version": 1, "daemon": {"limits": {"readBytes": 5}}}"#,
      "daemon.limits.readBytes: expected a whole number from 512 to 1000000000000, or 0 for no limit, not 5"
    ),
    (
      #"{"version": 1, "guests": [{"spareDisk": 5}]}"#,
      #"guests[0].spareDisk: unknown option; did you mean "spareDisks"? (expected one of guest, limits, spareDisks, transport, spareImages, devices)"#
    ),
  ]

  @Test(arguments: mistakes) func mistakeIsNamedWithItsPlace(text: String, message: String) {
    let fault = #expect(throws: SettingFault.self) { _ = try profiles(text) }
    #expect(fault?.message == message)
  }

  /// Options that refer to each other mean the same in any order, and over several entries.
  @Test func orderOfOptionsDoesNotMatter() throws {
    let text =
      #"{"version": 1, "disks": [{"retrySeconds": 7, "onError": "retry"}, {"onNoSpace": "retry", "retrySeconds": 9}]}"#
    let disk = settings(try profiles(text))
    #expect(disk.errors.onError == .retry(milliseconds: 9000) && disk.errors.onNoSpace == .retry(milliseconds: 9000))
  }

  @Test func exampleThatIsInstalledIsCorrect() throws {
    let path = #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
    let profiles = try Profiles(path: "/\(path)/deploy/profiles.example.json", isOptional: false)
    #expect(settings(profiles, guest: "db7").queues == 4)
    #expect(settings(profiles, guest: "archive", device: "xvdf").path.hasPrefix("nbd+unix://"))
  }

  @Test func unknownOptionListsTheKnownOnes() {
    let fault = #expect(throws: SettingFault.self) { _ = try profiles(#"{"version": 1, "disks": [{"queue": 1}]}"#) }
    #expect(fault?.field == "disks[0].queue")
    #expect(fault?.reason.contains("queues, threads") == true)
  }

  @Test func missingFileIsEmptyOnlyWhereItMayBe() throws {
    let folder = TemporaryFolder()
    #expect(try Profiles(path: folder.path + "/none", isOptional: true) == Profiles())
    #expect(throws: SettingFault.self) { _ = try Profiles(path: folder.path + "/none", isOptional: false) }
  }
}
