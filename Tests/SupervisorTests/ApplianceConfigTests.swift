import Glibc
import TestSupport
import Testing

/// 'vxctl appliance-config': what the appliance's init reads.
@Suite struct ApplianceConfigTests {
  private let folder = TemporaryFolder()

  @Test func theImageIsAnArchiveOfWhatInitReadsAndTheSameEachTime() throws {
    let profiles = folder.file("profiles.json", text: "{\"version\": 1}")
    let images = ["one", "two"].map { "\(folder.path)/\($0).img" }
    for image in images {
      let run = ProgramRun.vxctl(
        "appliance-config", image, "--profiles", profiles, "--bridge", "br0=eth0,eth1", "--address", "br0=192.0.2.7/24",
        "--gateway", "192.0.2.1", "--mount", "xvdb1=/srv/images,ro", "--mount", "xvdc=/data")
      #expect(run.status == 0, "\(run.errors)")
    }
    #expect(ProgramRun("/usr/bin/cmp", images).status == 0)
    let list = ProgramRun("/usr/bin/env", ["tar", "-tf", images[0]])
    #expect(list.status == 0, "\(list.errors)")
    #expect(list.output == "profiles.json\nnetwork\nmounts\n")
    func contents(_ name: String) -> String { ProgramRun("/usr/bin/env", ["tar", "-xOf", images[0], name]).output }
    #expect(contents("profiles.json") == "{\"version\": 1}")
    #expect(contents("network") == "bridge br0 eth0 eth1\naddress br0 192.0.2.7/24\ngateway 192.0.2.1\n")
    #expect(contents("mounts") == "xvdb1 /srv/images ro\nxvdc /data rw\n")
    var status = stat()
    #expect(stat(images[0], &status) == 0 && status.st_size == 65536)
  }

  @Test(arguments: [
    ["--bridge", "br0"], ["--bridge", "br 0=eth0"], ["--bridge", "-x=eth0"], ["--bridge", "a=b;c"],
    ["--bridge", "=eth0"],
    ["--bridge", "abcdefghijklmnop=eth0"], ["--address", "br0=192.0.2.7/24"],
    ["--bridge", "b=", "--address", "b=x y/24"],
    ["--bridge", "b=", "--address", "b=192.0.2.7"], ["--bridge", "b=", "--address", "b=192.0.2.7/129"],
    ["--mount", "xvdb=srv"], ["--mount", "xvdb=/a/../b"], ["--mount", "xvdb=/a b"], ["--mount", "../b=/srv"],
    ["--mount", "xvdb=/"], ["--gateway", "$(x)"], ["--profiles", "/dev/null/x"],
  ])
  func whatInitWouldMisreadIsRefused(_ options: [String]) {
    let image = "\(folder.path)/image"
    let run = ProgramRun(ProgramRun.path("vxctl"), ["appliance-config", image] + options)
    #expect(run.status == 64, "\(run.output)\(run.errors)")
    #expect(access(image, F_OK) != 0)
  }

  @Test func whatIsNoJSONIsRefusedAndTheOldImageStays() {
    let image = folder.file("image", text: "old")
    let profiles = folder.file("profiles.json", text: "{")
    #expect(ProgramRun.vxctl("appliance-config", image, "--profiles", profiles).status == 64)
    #expect(ProgramRun("/usr/bin/env", ["cat", image]).output == "old")
  }
}
