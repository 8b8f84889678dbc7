import Backends
import ControlAPI
import Devices
import Supervisor
import TestSupport
import Testing

@Suite struct DiskProfileTests {
  private func profiles(_ text: String) throws -> DiskProfiles {
    try DiskProfiles(try JSONText.parse(Array(text.utf8)))
  }

  private func settings(_ profiles: DiskProfiles, guest: String = "db1", uuid: String? = nil, device: String = "xvde")
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
    (#"[]"#, "file: an object is wanted"),
    (#"{"version": 2}"#, "version: it must be 1"),
    (#"{"version": 1, "disk": []}"#, "disk: there is no such key; 'version', 'disks', 'guests' and 'daemon' are"),
    (#"{"version": 1, "disks": {}}"#, "disks: an array is wanted"),
    (#"{"version": 1, "disks": [1]}"#, "disks[0]: an object is wanted"),
    (#"{"version": 1, "disks": [{"queues": 0}]}"#, "disks[0].queues: a whole number from 1 to 64 is wanted"),
    (#"{"version": 1, "disks": [{"queues": "4"}]}"#, "disks[0].queues: a whole number from 1 to 64 is wanted"),
    (
      #"{"version": 1, "disks": [{}, {"cache": "none"}]}"#,
      "disks[1].cache: one of writeback, writethrough, unsafe is wanted"
    ),
    (#"{"version": 1, "disks": [{"onError": "panic"}]}"#, "disks[0].onError: one of report, retry, hold is wanted"),
    (#"{"version": 1, "disks": [{"packed": 1}]}"#, "disks[0].packed: true or false is wanted"),
    (#"{"version": 1, "disks": [{"queueSize": 100}]}"#, "disks[0].queueSize: a split ring's size is a power of two"),
    (#"{"version": 1, "disks": [{"guest": 4}]}"#, "disks[0].guest: a string is wanted"),
    (
      #"{"version": 1, "disks": [{"nbd": "http://x"}]}"#,
      "disks[0].nbd: 'http://x' is no NBD address: 'http' is neither 'nbd' nor 'nbd+unix'"
    ),
  ]

  @Test(arguments: mistakes) func mistakeIsNamedWithItsPlace(text: String, message: String) {
    let fault = #expect(throws: ProfileFault.self) { _ = try profiles(text) }
    #expect(fault?.message == message)
  }

  @Test func exampleThatIsInstalledIsCorrect() throws {
    let path = #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
    let profiles = try DiskProfiles(path: "/\(path)/deploy/profiles.example.json", isOptional: false)
    #expect(settings(profiles, guest: "db7").queues == 4)
    #expect(settings(profiles, guest: "archive", device: "xvdf").path.hasPrefix("nbd+unix://"))
  }

  @Test func unknownOptionListsTheKnownOnes() {
    let fault = #expect(throws: ProfileFault.self) { _ = try profiles(#"{"version": 1, "disks": [{"queue": 1}]}"#) }
    #expect(fault?.field == "disks[0].queue")
    #expect(fault?.reason.contains("queues, threads") == true)
  }

  @Test func missingFileIsEmptyOnlyWhereItMayBe() throws {
    let folder = TemporaryFolder()
    #expect(try DiskProfiles(path: folder.path + "/none", isOptional: true) == DiskProfiles())
    #expect(throws: ProfileFault.self) { _ = try DiskProfiles(path: folder.path + "/none", isOptional: false) }
  }
}
