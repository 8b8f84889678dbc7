import ControlAPI
import Glibc
import SimulatedXen
import Supervisor
import TestSupport
import Testing

/// The metrics, and what deploy/ makes of them.
@Suite struct MetricsTests {
  private static let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")

  private func text(_ path: String) throws -> String {
    let file = try #require(fopen(Self.root + "/" + path, "re"), "\(path)")
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes[..<count], as: UTF8.self)
  }

  /// Words of a text that look like names of metrics.
  private func names(_ text: String) -> Set<String> {
    let words = text.split { !($0.isASCII && ($0.isLetter || $0.isNumber || $0 == "_")) }
    return Set(words.map(String.init).filter { $0.hasPrefix("vxd_") })
  }

  @Test(arguments: ["deploy/grafana/vxd.json", "deploy/prometheus/alerts.yml", "docs/metrics.md"])
  func everyNameThatDeployUsesExists(path: String) throws {
    let known = Set(Metrics.families.flatMap(\.sampleNames))
    let used = names(try text(path))
    #expect(used.count > 8)
    #expect(used.subtracting(known).isEmpty, "\(path): \(used.subtracting(known).sorted())")
  }

  @Test func dashboardIsJSON() throws {
    let dashboard = try JSONText.parse(Array(try text("deploy/grafana/vxd.json").utf8))
    #expect(dashboard["panels"]?.arrayValue?.count ?? 0 > 12)
  }

  @Test func textTellsWhatHappenedAndIsOpenMetrics() throws {
    let world = try World()
    defer { world.end() }
    try world.start()
    let domain = try world.domain(5, name: "a \"quoted\" guest")
    try world.toolstack.attach(disk: "xvde", image: world.image(), to: 5)
    #expect(world.toolstack.wait(for: "2", of: "state", disk: "xvde", domain: 5))
    let guest = try world.boot(domain)
    for _ in 0..<7 { #expect(try guest.read(sector: 0, count: 4096).status == 0) }
    #expect(eventually { world.metrics.contains(#"operation="read"} 7"#) })
    world.settle()
    let lines = world.metrics.split(separator: "\n").map(String.init)
    #expect(lines.last == "# EOF")
    let device = #"guest="a \"quoted\" guest",device="xvde""#
    #expect(lines.contains(#"vxd_device_requests_total{\#(device),operation="read"} 7"#))
    #expect(lines.contains(#"vxd_device_bytes_total{\#(device),operation="read"} 28672"#))
    #expect(lines.contains(#"vxd_device_state{\#(device),vxd_device_state="connected"} 1"#))
    #expect(
      lines.contains(#"vxd_device_latency_seconds_bucket{\#(device),operation="read",stage="total",le="+Inf"} 7"#))
    #expect(lines.contains("vxd_guests 1"))
    // Each sample belongs to the family that was announced last, and each family is announced once.
    var announced: Set<String> = []
    var family: Metrics.Family?
    for line in lines.dropLast() {
      if line.hasPrefix("# TYPE ") {
        let words = line.split(separator: " ").map(String.init)
        #expect(announced.insert(words[2]).inserted, "\(line)")
        family = Metrics.families.first { $0.name == words[2] }
        #expect(family?.type == words[3])
      } else if !line.hasPrefix("#") {
        let name = String(line.prefix { $0 != "{" && $0 != " " })
        #expect(family?.sampleNames.contains(name) == true, "\(line)")
        #expect(Double(line.split(separator: " ").last ?? "") != nil, "\(line)")
      }
    }
    #expect(announced == Set(Metrics.families.map(\.name)))
  }

  @Test func describedMethodsAreThoseOfTheFileInDeploy() throws {
    let file = try text("deploy/control-api.json")
    let methods = SupervisorControl.methods(board: StatusBoard(), isSimulated: false)
    #expect(file == JSONText.text(methods.discovery, pretty: true) + "\n", "make api writes it anew")
  }
}
