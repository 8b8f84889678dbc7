import ArgumentParser
import CLinux
import ControlAPI
import Glibc

/// `vxctl doctor`: what keeps this host, or a guest on it, from working.
struct Doctor: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Check this host and the guests' configuration; report problems and how to fix them.")

  @OptionGroup var connection: ConnectionOptions

  func validate() throws {
    guard connection.domain == nil else {
      throw ValidationError("--domain: doctor looks at the domain that it runs in")
    }
  }

  func run() throws {
    var findings: [Finding] = []
    do throws(ControlClient.Failure) {
      let client = try ControlClient(path: connection.socket)
      let nodes = try client.call("system.info")["hostNodes"]?.arrayValue?.compactMap(\.stringValue)
      let devices = try client.call("device.list")
      // vxd says itself which nodes it needs where it runs.
      findings = HostFacts.current(nodes: nodes).findings
      findings.append(Finding(.good, "vxd", "answers on \(connection.socket)"))
      findings += guestFindings(devices)
      findings += (try client.call("guest.list").arrayValue ?? []).compactMap { guest in
        guest["warning"]?.stringValue.map { Finding(.note, guest.cell("name"), $0) }
      }
    } catch {
      findings = HostFacts.current(nodes: nil).findings
      findings.append(Finding(.bad, "vxd", error.message, Trouble(error)))
    }
    if connection.json {
      Output.json(.array(findings.map(\.json)))
    } else {
      for finding in findings { Output.line(finding.line) }
    }
    if findings.contains(where: { $0.verdict == .bad }) { throw ExitCode(1) }
  }

  private func guestFindings(_ devices: JSONValue) -> [Finding] {
    (devices.arrayValue ?? []).compactMap { device in
      let subject = "\(device.cell("guest"))/\(device.cell("device"))"
      return (device["warning"]?.stringValue ?? device["reason"]?.stringValue).map { Finding(.bad, subject, $0) }
    }
  }
}

/// One line of a report.
struct Finding {
  enum Verdict: String {
    case good = "ok"
    case bad = "BAD"
    /// Nothing is wrong, as far as can be told.
    case note
  }

  var verdict: Verdict
  var subject: String
  var text: String
  /// Where a request to the daemon failed: what every other verb answers with.
  var trouble: Trouble?

  init(_ verdict: Verdict, _ subject: String, _ text: String, _ trouble: Trouble? = nil) {
    self.verdict = verdict
    self.subject = subject
    self.text = text
    self.trouble = trouble
  }

  var line: String {
    let mark = verdict.rawValue + String(repeating: " ", count: 4 - verdict.rawValue.count)
    return "\(mark) \(Output.printable(subject)): \(Output.printable(text))"
  }

  var json: JSONValue {
    var members: [JSONValue.Member] = [
      .init(name: "ok", value: .bool(verdict != .bad)),
      .init(name: "verdict", value: .string(verdict.rawValue.lowercased())),
      .init(name: "subject", value: .string(subject)), .init(name: "text", value: .string(text)),
    ]
    if let trouble { members.append(.init(name: "error", value: trouble.error)) }
    return .object(members)
  }
}

/// What doctor looks at on the host, apart from what it makes of it.
struct HostFacts {
  /// Whether the kernel runs on Xen, and in the control domain.
  var isXen = true
  var isControlDomain = true
  /// The caller has every permission: what it cannot use, nobody can.
  var isRoot = true
  /// Errors of access to nodes below /dev/xen, by name; 0 for none.
  var nodes: [String: Int32] = [:]
  /// The nodes that are needed; nil where vxd does not say: those of its domain's kind then.
  var wanted: [String]?
  /// 0, or why the kernel makes no aio context.
  var aio: Int32 = 0
  var aioLimit: UInt64?
  var aioInUse: UInt64?
  /// 0, or why the kernel makes no io_uring for this program.
  var ring: Int32 = 0

  /// - Parameter wanted: nodes below /dev/xen that vxd says it needs; nil when it does not answer.
  static func current(nodes wanted: [String]?) -> HostFacts {
    var facts = HostFacts()
    facts.wanted = wanted
    facts.isXen = text("/sys/hypervisor/type") == "xen"
    facts.isControlDomain = text("/proc/xen/capabilities")?.contains("control_d") == true
    facts.isRoot = geteuid() == 0
    for name in wanted ?? ["evtchn", "gntdev", "privcmd"] {
      facts.nodes[name] = access("/dev/xen/\(name)", R_OK | W_OK) == 0 ? 0 : errno
    }
    facts.aio = clinux_probe_aio()
    facts.ring = clinux_probe_ring()
    facts.aioLimit = text("/proc/sys/fs/aio-max-nr").flatMap { UInt64($0) }
    facts.aioInUse = text("/proc/sys/fs/aio-nr").flatMap { UInt64($0) }
    return facts
  }

  /// The first line of a file of /proc or /sys.
  private static func text(_ path: String) -> String? {
    guard let file = fopen(path, "re") else { return nil }
    defer { fclose(file) }
    var text = [CChar](repeating: 0, count: 256)
    guard fgets(&text, 256, file) != nil else { return nil }
    return String(decoding: text.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  var findings: [Finding] {
    var findings = [
      isXen
        ? Finding(.good, "hypervisor", "this is \(isControlDomain ? "dom0" : "a domain other than dom0") on Xen")
        : Finding(.bad, "hypervisor", "this system does not run on Xen; only 'vxd --simulate' works here")
    ]
    if isXen {
      // A driver domain has no use for privcmd: it has no rights over guests.
      let wanted = wanted ?? ["evtchn", "gntdev"] + (isControlDomain ? ["privcmd"] : [])
      findings += wanted.map { node($0, nodes[$0] ?? ENOENT) }
    }
    findings += [asynchronousIO, ioUring]
    return findings
  }

  private func node(_ name: String, _ error: Int32) -> Finding {
    let subject = "/dev/xen/\(name)"
    switch error {
    case 0: return Finding(.good, subject, "usable")
    case ENOENT: return Finding(.bad, subject, "missing: run 'modprobe xen-\(name)'")
    case EACCES where !isRoot:
      return Finding(.note, subject, "present; only root can check whether it is usable")
    default: return Finding(.bad, subject, "not usable: \(String(cString: strerror(error)))")
    }
  }

  private var ioUring: Finding {
    switch ring {
    case 0: Finding(.good, "io_uring", "available: disks with \"engine\": \"io_uring\" use it")
    case EPERM: Finding(.note, "io_uring", "not permitted (sysctl kernel.io_uring_disabled); all disks use libaio")
    case ENOSYS, ENOTSUP: Finding(.note, "io_uring", "not supported by this kernel, or too old; all disks use libaio")
    default: Finding(.note, "io_uring", "not available: \(String(cString: strerror(ring))); all disks use libaio")
    }
  }

  private var asynchronousIO: Finding {
    let (limit, used) = (aioLimit.map { "\($0)" } ?? "unknown", aioInUse.map { "\($0)" } ?? "unknown")
    let subject = "asynchronous I/O"
    switch aio {
    case 0:
      guard let aioLimit, aioLimit < 262_144 else {
        return Finding(.good, subject, "available; fs.aio-max-nr is \(limit), \(used) in use")
      }
      return Finding(
        .bad, subject,
        "fs.aio-max-nr is \(limit), which is enough for only \(aioLimit / 256) virtqueues of disks: run 'sysctl fs.aio-max-nr=1048576'"
      )
    case EAGAIN:
      return Finding(.bad, subject, "fs.aio-max-nr (\(limit)) is used up: run 'sysctl fs.aio-max-nr=1048576'")
    case ENOSYS: return Finding(.bad, subject, "this kernel has no asynchronous I/O (CONFIG_AIO), which disks need")
    default: return Finding(.bad, subject, "io_setup fails: \(String(cString: strerror(aio)))")
    }
  }
}
