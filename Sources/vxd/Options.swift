import CLinux
import ControlAPI
import DeviceHost
import EventLoop
import Glibc
import Supervisor

/// The command line of vxd.
struct Options {
  var socket = "/run/vxd/control.sock"
  var simulate = false
  var verbose = false
  var settings = SupervisorSettings()
  /// Socket of a simulated Xen in another process.
  var simulatedXen: String?
  /// Where what must survive the daemon is kept; empty for nowhere.
  var state = ""
  /// Where metrics are read; empty for nowhere.
  var metricsSocket = ""
  /// The same on the loopback.
  var metricsPort: UInt16?
  var access = ControlAccess()
  /// Sockets for 'vxctl console', and what consoles remember: beside the control socket.
  var consoleFolder = ""
  /// Where the profiles are; a default that is not there is an empty one.
  var profiles = "/etc/vxd/profiles.json"
  var profilesAreWanted = false

  static let usage = """
    usage: vxd [OPTION...]

    Provides virtio devices to the guests of this Xen host. vxd watches Xenstore, and serves each device whose entry names
    this domain as its backend.

      -s, --socket=PATH          control socket (default /run/vxd/control.sock)
      -p, --profiles=PATH        profiles of guests and devices (default /etc/vxd/profiles.json)
          --slots=N              virtio-mmio slots of an x86 guest, 1 to 32 (default 8); see vxctl acpi-table
          --mapping-budget=MIB   how much memory of each guest may stay mapped, 4 to 1048576 (default 1024)
          --grant-budget=MIB     how much granted memory of all guests together may stay mapped, 16 to 65536 (default 512)
          --grant-share=MIB      how much of that one guest may use, 1 to 65536 (default a quarter); the rest is copied
          --state=PATH           folder for the state that the next vxd needs to resume devices (default: 'state' beside
                                 the control socket; empty: save no state; devices then end with the daemon)
          --metrics-socket=PATH  serve metrics over HTTP on this socket (default: 'metrics.sock' beside the control
                                 socket; empty: do not serve them)
          --metrics-port=N       also serve metrics on port N of 127.0.0.1
          --operate-group=GROUP  members may change devices (vxctl attach, limit, restart, ...)
          --admin-group=GROUP    members may also change the daemon, as root always may; anyone else who can connect
                                 has read-only access
          --describe-api         print the control socket's methods as OpenRPC, and exit
          --describe-options     print the tables of options in docs/profiles.md, and exit
          --buffered             do not use O_DIRECT
          --simulate             run on a simulated Xen, with a guest that does I/O
      -v, --verbose              log more
      -V, --version              print the version, and exit
      -h, --help                 print this text, and exit

    """

  /// Options by number, as getopt_long reports them; the names are those of the command line.
  private enum Name: String, CaseIterable {
    case socket, profiles, slots, state, simulate, verbose, version, help, buffered
    case mappingBudget = "mapping-budget"
    case grantBudget = "grant-budget"
    case grantShare = "grant-share"
    case metricsSocket = "metrics-socket"
    case metricsPort = "metrics-port"
    case operateGroup = "operate-group"
    case adminGroup = "admin-group"
    case describeAPI = "describe-api"
    case describeOptions = "describe-options"
    // Not in the usage. The first corrupts data, which the testbed shows; the others are for tests that kill vxd: a simulated Xen and
    // xenstored in another process.
    case ignoreInvalidations = "test-ignore-invalidations"
    case simulatedXen = "simulated-xen"
    case simulatedXenstore = "simulated-xenstore"

    var takesValue: Bool {
      switch self {
      case .simulate, .verbose, .version, .help, .buffered, .describeAPI, .describeOptions, .ignoreInvalidations: false
      default: true
      }
    }

    var letter: Character? {
      switch self {
      case .socket: "s"
      case .profiles: "p"
      case .verbose: "v"
      case .version: "V"
      case .help: "h"
      default: nil
      }
    }
  }

  /// What the command line says, in its order; by getopt_long, so with `--socket=PATH`, `--socket PATH`, `-s PATH`, `-sPATH` and unambiguous
  /// beginnings of names.
  private static func read(_ arguments: [String]) throws(OptionFault) -> [(name: Name, shown: String, value: String)] {
    let names = Name.allCases
    let texts = names.map { strdup($0.rawValue) }
    var words = arguments.map { strdup($0) } + [nil]
    defer { (texts + words).forEach { free($0) } }
    // Values above those of letters, so that both forms of an option can be told apart.
    let first: Int32 = 1000
    let table =
      zip(names, texts).enumerated().map { index, entry in
        option(
          name: UnsafePointer(entry.1), has_arg: entry.0.takesValue ? required_argument : no_argument, flag: nil,
          val: first + Int32(index))
      } + [option(name: nil, has_arg: 0, flag: nil, val: 0)]
    // A colon at the beginning tells a missing value from an unknown option.
    let letters = ":" + names.compactMap { name in name.letter.map { "\($0)\(name.takesValue ? ":" : "")" } }.joined()
    var result: [(Name, String, String)] = []
    var found = clinux_option()
    while true {
      clinux_next_option(Int32(arguments.count), &words, letters, table, &found)
      if found.value == -1 { break }
      let letter = UInt8(exactly: found.value).map { Character(UnicodeScalar($0)) }
      if letter == "?" || letter == ":" {
        let last = Int(found.index) - 1
        let word = arguments.indices.contains(last) ? arguments[last] : ""
        // A short option may stand among others in its word.
        let short = UInt8(exactly: found.refused).map { "-\(Character(UnicodeScalar($0)))" }
        let shown = found.refused == 0 || word.hasPrefix("--") ? word : short ?? word
        if letter == ":" { throw OptionFault("\(shown): expected a value") }
        if found.refused >= first { throw OptionFault("\(word): this option takes no value") }
        let near = word.hasPrefix("--") ? candidates(word) : []
        guard near.count < 2 else {
          throw OptionFault("'\(word)' is ambiguous: expected one of \(near.joined(separator: ", "))")
        }
        throw OptionFault("unknown option '\(shown)' (see vxd --help)")
      }
      let known = found.value >= first ? names[Int(found.value - first)] : names.first { $0.letter == letter }
      guard let known else { throw OptionFault("unknown option (see vxd --help)") }
      result.append((known, "--\(known.rawValue)", found.argument.map { String(cString: $0) } ?? ""))
    }
    // getopt_long has moved them after the options.
    if Int(found.index) < arguments.count, let word = words[Int(found.index)] {
      throw OptionFault("unexpected argument '\(String(cString: word))' (see vxd --help)")
    }
    return result
  }

  /// The options whose names begin as a word does.
  private static func candidates(_ word: String) -> [String] {
    let beginning = word.prefix { $0 != "=" }
    return Name.allCases.map { "--\($0.rawValue)" }.filter { $0.hasPrefix(beginning) }.sorted()
  }

  /// - Returns: nil when the options ask for nothing but a text, which is printed.
  static func parse(_ arguments: [String]) throws(OptionFault) -> Options? {
    var options = Options()
    var isGiven: Set<Name> = []
    for (name, shown, value) in try read(arguments) {
      func number(_ range: ClosedRange<UInt64>) throws(OptionFault) -> UInt64 {
        guard let number = UInt64(value), range.contains(number) else {
          throw OptionFault("\(shown): '\(value)': expected an integer from \(range.lowerBound) to \(range.upperBound)")
        }
        return number
      }
      func group() throws(OptionFault) -> UInt32 {
        do throws(Errno) { return try ControlAccess.group(value) } catch {
          throw OptionFault("\(shown): '\(value)': no such group")
        }
      }
      isGiven.insert(name)
      switch name {
      case .socket: options.socket = value
      case .slots: options.settings.slots = Int(try number(1...32))
      case .grantBudget: options.settings.grantBudget = Int(try number(16...65536)) << 8
      case .grantShare: options.settings.grantShare = Int(try number(1...65536)) << 8
      case .mappingBudget: options.settings.mappingBudget = try number(4...1_048_576) << 20
      case .profiles:
        options.profiles = value
        options.profilesAreWanted = true
      case .ignoreInvalidations: options.settings.ignoresInvalidations = true
      case .simulatedXen: options.simulatedXen = value
      case .simulatedXenstore: options.settings.xenstoreSocket = value
      case .state: options.state = value
      case .metricsSocket: options.metricsSocket = value
      case .metricsPort: options.metricsPort = UInt16(try number(1...65535))
      case .operateGroup: options.access.operators.insert(try group())
      case .adminGroup: options.access.admins.insert(try group())
      case .describeAPI:
        let methods = SupervisorControl.methods(board: StatusBoard(), isSimulated: false)
        print(JSONText.text(methods.discovery, pretty: true))
        return nil
      case .describeOptions:
        for table in Profiles.documents { print("## \(table.title)\n\n\(table.markdown)") }
        return nil
      case .buffered: options.settings.direct = false
      case .simulate: options.simulate = true
      case .verbose: options.verbose = true
      case .version:
        print("vxd \(SupervisorControl.version)")
        return nil
      case .help:
        print(usage, terminator: "")
        return nil
      }
    }
    guard !options.socket.isEmpty else { throw OptionFault("--socket: expected a path") }
    // Beside the control socket by default.
    let folder = options.socket.lastIndex(of: "/").map { options.socket[..<$0] + "/" } ?? ""
    options.consoleFolder = folder + "console"
    if !isGiven.contains(.state) { options.state = folder + "state" }
    if !isGiven.contains(.metricsSocket) { options.metricsSocket = folder + "metrics.sock" }
    do throws(SettingFault) {
      options.settings.profiles = try Profiles(path: options.profiles, isOptional: !options.profilesAreWanted)
    } catch {
      throw OptionFault("--profiles \(options.profiles): \(error.message)")
    }
    return options
  }
}

/// A mistake on the command line.
struct OptionFault: Error {
  let message: String

  init(_ message: String) { self.message = message }
}
