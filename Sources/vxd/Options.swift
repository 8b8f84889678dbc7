import ControlAPI
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

    Serves virtio devices to the guests of this Xen host: watches Xenstore and runs a backend for each device whose
    backend is this domain.

      --socket PATH            control socket (default /run/vxd/control.sock)
      --slots N                virtio-mmio slots of an x86 guest, 1 to 32 (default 8); see vxctl acpi-table
      --mapping-budget MIB     guest memory kept mapped per guest at most (default 1024)
      --profiles PATH          options of disks that libxl cannot carry (default /etc/vxd/profiles.json)
      --state PATH             where the state of running devices is kept, which a restarted vxd goes on from
                               (default: 'state' beside the control socket; '' keeps none, and devices end
                               with the daemon)
      --metrics-socket PATH    OpenMetrics by HTTP (default: 'metrics.sock' beside the control socket; '' for none)
      --metrics-port N         the same on 127.0.0.1
      --operate-group GROUP    members may change devices (vxctl attach, limit, restart, ...)
      --admin-group GROUP      members may change the daemon too; root always may, and whoever can connect may look
      --describe-api           print the control socket's methods as OpenRPC, and end
      --buffered               do not try O_DIRECT
      --simulate               run on a simulated Xen with a guest that does I/O, without any Xen at all
      --verbose                log more
      --version, --help

    """

  /// - Returns: nil when the options ask for nothing but a text, which is printed.
  static func parse(_ arguments: [String]) throws(OptionFault) -> Options? {
    var options = Options()
    var rest = arguments.dropFirst()[...]
    func value(_ name: String) throws(OptionFault) -> String {
      guard let text = rest.popFirst() else { throw OptionFault("\(name) needs a value") }
      return text
    }
    func number(_ name: String, _ range: ClosedRange<UInt64>) throws(OptionFault) -> UInt64 {
      let text = try value(name)
      guard let number = UInt64(text), range.contains(number) else {
        throw OptionFault("\(name): '\(text)' is no number from \(range.lowerBound) to \(range.upperBound)")
      }
      return number
    }
    func group(_ name: String) throws(OptionFault) -> UInt32 {
      let text = try value(name)
      do throws(Errno) { return try ControlAccess.group(text) } catch {
        throw OptionFault("\(name): there is no group '\(text)'")
      }
    }
    var isGiven: Set<String> = []
    while let argument = rest.popFirst() {
      isGiven.insert(argument)
      switch argument {
      case "--socket": options.socket = try value(argument)
      case "--slots": options.settings.slots = Int(try number(argument, 1...32))
      case "--mapping-budget": options.settings.mappingBudget = try number(argument, 4...1_048_576) << 20
      case "--profiles":
        options.profiles = try value(argument)
        options.profilesAreWanted = true
      // Not in the usage: it corrupts data, which the testbed shows.
      case "--test-ignore-invalidations": options.settings.ignoresInvalidations = true
      // For tests that kill vxd: a simulated Xen and xenstored in another process.
      case "--simulated-xen": options.simulatedXen = try value(argument)
      case "--simulated-xenstore": options.settings.xenstoreSocket = try value(argument)
      case "--state": options.state = try value(argument)
      case "--metrics-socket": options.metricsSocket = try value(argument)
      case "--metrics-port": options.metricsPort = UInt16(try number(argument, 1...65535))
      case "--operate-group": options.access.operators.insert(try group(argument))
      case "--admin-group": options.access.admins.insert(try group(argument))
      case "--describe-api":
        let methods = SupervisorControl.methods(board: StatusBoard(), isSimulated: false)
        print(JSONText.text(methods.discovery, pretty: true))
        return nil
      case "--buffered": options.settings.direct = false
      case "--simulate": options.simulate = true
      case "--verbose": options.verbose = true
      case "--version":
        print("vxd \(SupervisorControl.version)")
        return nil
      case "--help":
        print(usage, terminator: "")
        return nil
      default: throw OptionFault("there is no option '\(argument)' (vxd --help)")
      }
    }
    // Beside the control socket, unless said otherwise.
    let folder = options.socket.lastIndex(of: "/").map { options.socket[..<$0] + "/" } ?? ""
    options.consoleFolder = folder + "console"
    if !isGiven.contains("--state") { options.state = folder + "state" }
    if !isGiven.contains("--metrics-socket") { options.metricsSocket = folder + "metrics.sock" }
    do throws(ProfileFault) {
      options.settings.profiles = try DiskProfiles(path: options.profiles, isOptional: !options.profilesAreWanted)
    } catch {
      throw OptionFault("--profiles \(options.profiles): \(error.message)")
    }
    return options
  }
}

/// What is wrong with the command line.
struct OptionFault: Error {
  let message: String

  init(_ message: String) { self.message = message }
}
