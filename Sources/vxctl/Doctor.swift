import ArgumentParser
import ControlAPI
import Glibc

/// `vxctl doctor`: what keeps this host, or a guest on it, from working.
struct Doctor: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Checks this host and the guests' configuration, and says what to do.")

  @OptionGroup var connection: ConnectionOptions

  private struct Finding {
    var isGood: Bool
    var subject: String
    var words: String
  }

  func run() throws {
    var findings: [Finding] = []
    do throws(ControlClient.Failure) {
      let client = try ControlClient(path: connection.socket)
      let nodes = try client.call("system.info")["hostNodes"]?.arrayValue?.compactMap(\.stringValue)
      let devices = try client.call("device.list")
      findings = hostFindings(nodes ?? Self.allNodes)
      findings.append(Finding(isGood: true, subject: "vxd", words: "answers on \(connection.socket)"))
      findings += guestFindings(devices)
    } catch {
      findings = hostFindings(Self.allNodes)
      findings.append(Finding(isGood: false, subject: "vxd", words: error.message))
    }
    if connection.json {
      printJSON(
        .array(
          findings.map {
            ["ok": .bool($0.isGood), "subject": .string($0.subject), "text": .string($0.words)]
          }))
    } else {
      for finding in findings { print("\(finding.isGood ? "ok  " : "BAD ") \(finding.subject): \(finding.words)") }
    }
    if findings.contains(where: { !$0.isGood }) { throw ExitCode(1) }
  }

  /// What vxd needs in dom0; it says itself when it needs less.
  private static let allNodes = ["evtchn", "gntdev", "privcmd"]

  /// - Parameter nodes: below /dev/xen.
  private func hostFindings(_ nodes: [String]) -> [Finding] {
    var findings: [Finding] = []
    let isXen = access("/sys/hypervisor/type", F_OK) == 0
    findings.append(
      Finding(
        isGood: isXen, subject: "hypervisor",
        words: isXen ? "this system runs on Xen" : "this system does not run on Xen; try 'vxd --simulate'"))
    for node in nodes {
      let isThere = access("/dev/xen/\(node)", R_OK | W_OK) == 0
      findings.append(
        Finding(
          isGood: isThere, subject: "/dev/xen/\(node)",
          words: isThere ? "can be used" : "cannot be used: modprobe xen-\(node), and run as root"))
    }
    let operations = Self.number("/proc/sys/fs/aio-max-nr")
    findings.append(
      Finding(
        isGood: operations >= 262_144, subject: "fs.aio-max-nr",
        words: operations >= 262_144
          ? "\(operations) operations"
          : "\(operations) operations are few: 256 for each queue; sysctl fs.aio-max-nr=1048576"))
    return findings
  }

  /// The number that a file of /proc holds; 0 when there is none.
  private static func number(_ path: String) -> UInt64 {
    guard let file = fopen(path, "re") else { return 0 }
    defer { fclose(file) }
    var text = [CChar](repeating: 0, count: 64)
    guard fgets(&text, 64, file) != nil else { return 0 }
    return UInt64(String(decoding: text.prefix { $0 > 32 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)) ?? 0
  }

  private func guestFindings(_ devices: JSONValue) -> [Finding] {
    (devices.arrayValue ?? []).compactMap { device in
      let subject = "\(device.cell("guest"))/\(device.cell("device"))"
      guard let reason = device["warning"]?.stringValue ?? device["reason"]?.stringValue else { return nil }
      return Finding(isGood: false, subject: subject, words: reason)
    }
  }
}
